"""Suites that every engine passes."""
