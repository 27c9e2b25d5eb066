"""Classes against hand-written Ray actors with the same methods."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from benchmarks.measure import Row, compare, row_of
from benchmarks.subjects import Ours, Raw

__all__ = ["measure"]

MIB = 1024 * 1024


def import_ms(module: str) -> float:
    """Import a module in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout) * 1e3


def measure(quick: bool) -> Iterator[Row]:
    """Measure on the cluster that this process is connected to; ``quick`` takes a tenth of it."""
    part = 10 if quick else 1
    ours = Ours.named("bench")
    raw = Raw.options(name="raw", lifetime="detached").remote()
    array = np.zeros(100 * MIB // 8)
    made: list[Any] = []
    made_raw: list[Any] = []

    def create() -> None:
        made.append(Ours.new())

    def create_raw() -> None:
        name = f"raw-{time.perf_counter_ns()}"
        made_raw.append(Raw.options(name=name, lifetime="detached").remote())
        ray.get(made_raw[-1].echo.remote(1))

    for _ in range(300):
        ours.echo.remote(1)
        ray.get(raw.echo.remote(1))
    yield compare(
        "blocking call",
        lambda: ours.echo.remote(1),
        lambda: ray.get(raw.echo.remote(1)),
        2000 // part,
        against="raw actor",
        limit=1.10,
    )
    yield compare(
        "1,000 spawned calls, then get",
        lambda: [job.get() for job in [ours.echo.spawn(1) for _ in range(1000)]],
        lambda: [ray.get(ref) for ref in [raw.echo.remote(1) for _ in range(1000)]],
        max(4, 20 // part),
        against="raw actor",
        limit=1.15,
    )
    yield compare(
        "100 MB array there and back",
        lambda: ours.echo.remote(array),
        lambda: ray.get(raw.echo.remote(array)),
        max(4, 20 // part),
        against="raw actor",
        limit=1.10,
    )
    yield compare(
        "1,000 generator items",
        lambda: list(ours.items.remote_gen(1000)),
        lambda: [ray.get(ref) for ref in raw.items.options(num_returns="streaming").remote(1000)],
        max(4, 20 // part),
        against="raw actor",
        limit=1.5,
    )
    yield compare(
        "new() until ready",
        create,
        create_raw,
        max(3, 10 // part),
        against="raw named detached actor",
        limit=1.25,
    )
    yield row_of(
        "memory of an idle instance",
        [instance.memory.remote() for instance in made[-3:]],
        [ray.get(actor.memory.remote()) for actor in made_raw[-3:]],
        against="raw actor (PSS)",
        limit=None,
        unit="MiB",
    )
    for instance in [*made, ours]:
        instance.close()
    for actor in [*made_raw, raw]:
        ray.kill(actor)
    yield row_of(
        "import apothic",
        [import_ms("apothic") for _ in range(5)],
        [import_ms("ray") for _ in range(5)],
        against="import ray",
        limit=None,
    )
