"""Run the comparisons, print their table, and write ``benchmarks/results/latest.json``.

Usage: python -m benchmarks [--quick] [--check]
"""

from __future__ import annotations

import argparse
import sys

import ray

from benchmarks import classes
from benchmarks.measure import report


def main() -> int:
    """Measure on a cluster of its own; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--check", action="store_true", help="fail when a limit is exceeded")
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, namespace="apothic", logging_level="ERROR")
    rows = list(classes.measure(arguments.quick))
    good = report(rows)
    return 1 if arguments.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())
