"""What is measured: a class of ours and a Ray actor by hand. They import nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from apothic import App, method

__all__ = ["Ours", "Raw", "RawAsync", "pss_mib"]

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

    @method()
    def memory(self) -> float:
        return memory_mib()


@ray.remote(num_cpus=0)
class Raw:
    def echo(self, value: Any) -> Any:
        return value

    def items(self, count: int) -> Iterator[int]:
        for number in range(count):  # noqa: UP028 - Ray wants a generator that has `send`
            yield number

    def memory(self) -> float:
        return memory_mib()


@ray.remote(num_cpus=0)
class RawAsync:
    async def nothing(self) -> None:
        pass

    async def pid(self) -> int:
        return os.getpid()


def memory_mib() -> float:
    """Give this process's proportional set size."""
    return pss_mib(os.getpid())


def pss_mib(pid: int) -> float:
    """Give a process's proportional set size: what it shares is divided among those sharing it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no Pss in smaps_rollup")
