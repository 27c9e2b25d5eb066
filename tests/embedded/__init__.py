"""Tests of clusters that a process starts for itself; they run before the shared one exists."""
