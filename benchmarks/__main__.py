"""Compare calls with a hand-written Ray actor, interleaved in one run; medians and ratios.

Run it with ``make bench``. It prints a table and writes ``benchmarks/results/latest.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from apothic import App, method

app = App("benchmarks")


@app.cls(cpu=0, memory_mb=50, max_pending_tasks=5000)
class Ours:
    @method()
    def echo(self, value: Any) -> Any:
        return value

    @method()
    def items(self, count: int) -> Iterator[int]:
        for number in range(count):  # noqa: UP028 - as the raw one
            yield number


@ray.remote(num_cpus=0)
class Raw:
    def echo(self, value: Any) -> Any:
        return value

    def items(self, count: int) -> Iterator[int]:
        for number in range(count):  # noqa: UP028 - Ray wants a generator that has `send`
            yield number


def compare(
    one: Callable[[], object], other: Callable[[], object], rounds: int
) -> dict[str, float]:
    """Time two functions in turn, who goes first alternating; give medians in ms and their ratio."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (one, other)[which]()
            times[which].append((time.perf_counter() - began) * 1e3)
    ours, raw = statistics.median(times[0]), statistics.median(times[1])
    return {"ours_ms": ours, "raw_ms": raw, "ratio": ours / raw}


def create_ours() -> None:
    """Start an instance until it is ready, and close it outside of what Ray is measured by."""
    made.append(Ours.new())


def create_raw() -> None:
    """Start a named detached actor until its first reply."""
    name = f"raw-{time.perf_counter_ns()}"
    actor = Raw.options(name=name, lifetime="detached").remote()
    ray.get(actor.echo.remote(1))
    made_raw.append(actor)


made: list[Any] = []
made_raw: list[Any] = []


def main() -> None:
    """Measure, print, write."""
    ray.init(num_cpus=2, include_dashboard=False, namespace="apothic", logging_level="ERROR")
    ours = Ours.named("bench")
    raw = Raw.options(name="raw", lifetime="detached").remote()
    array = np.zeros(100 * 1024 * 1024 // 8)
    for _ in range(300):
        ours.echo.remote(1)
        ray.get(raw.echo.remote(1))
    rows = {
        "blocking call": compare(
            lambda: ours.echo.remote(1), lambda: ray.get(raw.echo.remote(1)), 2000
        ),
        "1,000 pipelined calls": compare(
            lambda: [job.get() for job in [ours.echo.spawn(1) for _ in range(1000)]],
            lambda: ray.get([raw.echo.remote(1) for _ in range(1000)]),
            12,
        ),
        "100 MB array there and back": compare(
            lambda: ours.echo.remote(array), lambda: ray.get(raw.echo.remote(array)), 12
        ),
        "1,000 generator items": compare(
            lambda: list(ours.items.remote_gen(1000)),
            lambda: [
                ray.get(ref) for ref in raw.items.options(num_returns="streaming").remote(1000)
            ],
            10,
        ),
        "new() until ready": compare(create_ours, create_raw, 8),
    }
    for instance in [*made, ours]:
        instance.close()
    for actor in [*made_raw, raw]:
        ray.kill(actor)
    limits = (1.10, 1.15, 1.10, 1.5, 1.25)
    for (name, row), limit in zip(rows.items(), limits, strict=True):
        print(
            f"{name:30} ours {row['ours_ms']:9.3f} ms   raw {row['raw_ms']:9.3f} ms   "
            f"ratio {row['ratio']:.2f} (limit {limit})"
        )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "latest.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
