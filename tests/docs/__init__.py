"""Tests of the guide: what it shows, runs."""
