"""Instances with an event loop, whose few threads belong to user code."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from apothic import App, Job, enter, method
from ray_backend.actors.gate import AHEAD
from tests.support import eventually, process_is_gone

pytestmark = pytest.mark.ray

MANY = 40
"""More than the threads that asyncio gives a loop, which are 32 at most."""

app = App("event-loops")


# Retried, since a call may be lost in the very moment in which its instance's process ends.
@app.cls(cpu=0, memory_mb=10, concurrent_requests=2 * MANY, max_pending_tasks=2 * MANY, retries=5)
class Busy:
    """Enters in a thread of the loop's; the second time not before many calls wait for that."""

    def __init__(self, starts: str) -> None:
        with open(starts, "a") as file:
            file.write("start\n")
        self.number = len(Path(starts).read_text().split())
        self.made: dict[int, int] = {}

    @enter()
    async def up(self) -> None:
        while self.number > 1 and len(asyncio.all_tasks()) < MANY:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(os.getpid)

    @method()
    async def start(self) -> int:
        return self.number

    @method()
    async def count(self, stream: int) -> AsyncIterator[int]:
        for number in range(2 * AHEAD):
            self.made[stream] = number
            yield number

    @method()
    async def held_back(self) -> int:
        return sum(made >= AHEAD for made in self.made.values())

    @method()
    async def in_thread(self) -> int:
        return await asyncio.to_thread(os.getpid)


def test_streams_that_nobody_reads_hinder_nothing(ray_cluster: str, tmp_path: Path) -> None:
    with Busy.new(str(tmp_path / "starts")) as busy, ExitStack() as stack:
        streams = [stack.enter_context(busy.count.remote_gen(each)) for each in range(MANY)]
        eventually(lambda: busy.held_back.remote() == MANY)
        assert busy.in_thread.remote(timeout_s=60) == busy.inspect().pid
        for stream in reversed(streams):
            assert list(stream) == list(range(2 * AHEAD))


def test_calls_that_wait_for_a_restart_do_not_hinder_enter(
    ray_cluster: str, tmp_path: Path
) -> None:
    async def outcomes(jobs: list[Job[int]]) -> list[int]:
        return await asyncio.gather(*jobs)

    with Busy.named("one", str(tmp_path / "starts")) as busy:
        pid = busy.inspect().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: process_is_gone(pid))
        jobs = [busy.start.spawn() for _ in range(MANY)]
        assert asyncio.run(outcomes(jobs)) == [2] * MANY
