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
        other: the median of what it is compared with; None where that cannot be measured here.
        other_p95: its 95th percentile.
        against: what it is compared with.
        limit: the greatest ratio that is good enough; None where none is set.
    """

    name: str
    unit: str
    ours: float
    ours_p95: float
    other: float | None
    other_p95: float | None
    against: str
    limit: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.other is None else self.ours / self.other

    @property
    def is_good(self) -> bool:
        return self.limit is None or self.ratio is None or self.ratio <= self.limit


def row_of(
    name: str,
    ours: Sequence[float],
    other: Sequence[float],
    *,
    against: str,
    limit: float | None,
    unit: str = "ms",
) -> Row:
    """Make a row of measurements; of none of the other, where it cannot be measured."""
    return Row(
        name,
        unit,
        statistics.median(ours),
        _p95(ours),
        statistics.median(other) if other else None,
        _p95(other) if other else None,
        against,
        limit,
    )


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object] | None,
    rounds: int,
    *,
    against: str,
    limit: float | None,
    after: Callable[[], object] = lambda: None,
    block: int = 1,
) -> Row:
    """Time two functions in turn; who goes first alternates, so that noise meets both.

    Args:
        name: what is done.
        ours: our way.
        other: the other; None where it cannot be measured here.
        rounds: how often each.
        against: what the other is.
        limit: the greatest ratio that is good enough, or None.
        after: called after each, outside its time.
        block: how often one is called before it is the other's turn. At 1 each call begins with the
            processor's caches full of the other's memory, and where the other goes on working after
            it has answered, as a Docker engine does, beside that work. Above 1 all but the first of
            a block are in nobody's wake but their own, as calls of one program are.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-(-rounds // block)):
        for which in (0, 1) if number % 2 else (1, 0):
            function = (ours, other)[which]
            if function is None:
                continue
            for _ in range(block):
                began = time.perf_counter()
                function()
                times[which].append((time.perf_counter() - began) * 1e3)
                after()
    return row_of(name, *times, against=against, limit=limit)


def _p95(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def report(rows: Sequence[Row], notes: Sequence[str] = ()) -> bool:
    """Print a table and what is to be said of it, keep both as JSON; tell whether all limits hold."""
    wide = max(len(row.name) for row in rows)
    print(f"{'':{wide}} {'ours':>10} {'p95':>10} {'other':>10} {'p95':>10}      ratio limit  other")
    for row in rows:
        limit = "    -" if row.limit is None else f"{row.limit:5.2f}"
        print(
            f"{row.name:{wide}} {row.ours:10.3f} {row.ours_p95:10.3f} {_cell(row.other, 10, 3)} "
            f"{_cell(row.other_p95, 10, 3)} {row.unit:3} {_cell(row.ratio, 6, 2)} {limit}  "
            f"{row.against}{', not measured' if row.other is None else ''}"
            f"{'' if row.is_good else '   <- over the limit'}"
        )
    for note in notes:
        print(note)
    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "unix_s": time.time(),
        "python": platform.python_version(),
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        "notes": list(notes),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    return all(row.is_good for row in rows)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
