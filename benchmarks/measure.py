"""Measuring side by side: two ways of the same, in turn in one run, as medians, p95 and a ratio."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Row", "compare", "report", "row_of"]

RESULTS = Path(__file__).parent / "results" / "latest.json"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was done.
        unit: of the figures, ``ms`` or ``MiB``.
        ours: the median of ours.
        ours_p95: its 95th percentile.
        other: the median of what it is compared with.
        other_p95: its 95th percentile.
        against: what it is compared with.
        limit: the greatest ratio that is good enough; None where none is set.
    """

    name: str
    unit: str
    ours: float
    ours_p95: float
    other: float
    other_p95: float
    against: str
    limit: float | None

    @property
    def ratio(self) -> float:
        return self.ours / self.other

    @property
    def is_good(self) -> bool:
        return self.limit is None or self.ratio <= self.limit


def row_of(
    name: str,
    ours: Sequence[float],
    other: Sequence[float],
    *,
    against: str,
    limit: float | None,
    unit: str = "ms",
) -> Row:
    return Row(
        name,
        unit,
        statistics.median(ours),
        _p95(ours),
        statistics.median(other),
        _p95(other),
        against,
        limit,
    )


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int,
    *,
    against: str,
    limit: float | None,
) -> Row:
    """Time two functions in turn; who goes first alternates, so that noise meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (ours, other)[which]()
            times[which].append((time.perf_counter() - began) * 1e3)
    return row_of(name, *times, against=against, limit=limit)


def _p95(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def report(rows: Sequence[Row]) -> bool:
    """Print a table, keep it as JSON, and tell whether every limit holds."""
    wide = max(len(row.name) for row in rows)
    print(f"{'':{wide}} {'ours':>10} {'p95':>10} {'other':>10} {'p95':>10}      ratio limit  other")
    for row in rows:
        limit = "    -" if row.limit is None else f"{row.limit:5.2f}"
        print(
            f"{row.name:{wide}} {row.ours:10.3f} {row.ours_p95:10.3f} {row.other:10.3f} "
            f"{row.other_p95:10.3f} {row.unit:3} {row.ratio:6.2f} {limit}  {row.against}"
            f"{'' if row.is_good else '   <- over the limit'}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "unix_s": time.time(),
        "python": platform.python_version(),
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    return all(row.is_good for row in rows)
