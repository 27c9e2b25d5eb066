"""Placement on simulated nodes, against the time that it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.measure import Row, row_of
from ray_backend.placement.live import place as place_on
from tests.placement.nodes import place
from tests.placement.scale import (
    ASKED,
    CHOOSY,
    PLACING_S,
    PLAN_S,
    cluster,
    partly_free,
    title,
    unlabelled,
    view_of_a_hundred_nodes,
)

__all__ = ["measure"]


def measure(quick: bool) -> Iterator[Row]:
    """Measure without a cluster: what a creation does before it asks Ray is pure."""
    rounds = 10 if quick else 100
    nodes = cluster(10_000, 200)
    free = partly_free(nodes)
    for constraints in ASKED:
        name = f"match 10,000 nodes, 200 offers: {title(constraints)}"
        yield _row(name, lambda: place(nodes, free, **constraints), rounds, PLAN_S)  # noqa: B023
    plain = unlabelled(10_000)
    name = "match 10,000 nodes without labels"
    yield _row(name, lambda: place(plain, gpu="A100", min_cpu_cores=9), rounds, PLAN_S)
    view = view_of_a_hundred_nodes()
    name = "place on 100 nodes, 20 offers and 20 types"
    yield _row(name, lambda: place_on(view, CHOOSY).ray_options(), rounds, PLACING_S)


def _row(name: str, function: Callable[[], object], rounds: int, limit_s: float) -> Row:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append((time.perf_counter() - began) * 1e3)
    return row_of(name, times, [limit_s * 1e3], against="what it may take", limit=1.0)
