"""Tests without Ray."""
