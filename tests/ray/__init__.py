"""Tests of the engine on one shared Ray cluster, with real driver processes beside the test's own."""
