"""Run the comparisons, print their table, and write ``benchmarks/results/latest.json``.

Usage: python -m benchmarks [--quick] [--check] [placement] [classes] [sandboxes]
"""

from __future__ import annotations

import argparse
import os
import sys

import ray

from benchmarks import classes, placement, sandboxes
from benchmarks.measure import Row, report

PARTS = ("placement", "classes", "sandboxes")


def main() -> int:
    """Measure, on a cluster of its own where it takes one; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--check", action="store_true", help="fail when a limit is exceeded")
    parser.add_argument("only", nargs="*", help=f"of {', '.join(PARTS)}; all without it")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only) - set(PARTS)):
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    parts = arguments.only or PARTS
    notes: list[str] = []
    rows: list[Row] = []
    if "placement" in parts:  # first, while no cluster of ours takes its share of the machine
        rows += placement.measure(arguments.quick)
    if {"classes", "sandboxes"} & set(parts):
        os.environ["RAY_USE_UVLOOP"] = "0"  # a plain Ray has none
        ray.init(num_cpus=2, include_dashboard=False, namespace="apothic", logging_level="ERROR")
    if "classes" in parts:
        rows += classes.measure(arguments.quick)
    if "sandboxes" in parts:
        rows += sandboxes.measure(arguments.quick, notes)
    good = report(rows, notes)
    return 1 if arguments.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())
