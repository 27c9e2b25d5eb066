"""Tests of clusters that others started: `ray job submit`, addresses, tokens; each head is private."""
