"""Tests of the examples, each started as a user would."""
