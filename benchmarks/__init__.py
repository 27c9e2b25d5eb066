"""Measurements against hand-written Ray actors, side by side in one run: ``python -m benchmarks``."""
