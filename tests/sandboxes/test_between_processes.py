"""Verbs that find a named session between two processes: they wait, and run once or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import exceptions as rays

from apothic import App, Image, SandboxSession
from apothic.backend import connect
from ray_backend.ray_api import actor_record
from ray_backend.translate import was_never_sent
from tests.docker.support import BUSYBOX, left_of
from tests.support import eventually, threads_in

pytestmark = pytest.mark.ray

CPUS = 8
"""All that the cluster of the tests has."""


@pytest.fixture
def session(ray_cluster: str, docker_engine: Any) -> Iterator[SandboxSession]:
    image = Image.from_registry(BUSYBOX)
    box = App("between").sandbox(name="s", image=image, cpu=CPUS, memory_mb=128, timeout_s=60)
    session = box.named("n", cwd="/work")
    yield session
    session.close()
    eventually(lambda: not left_of(docker_engine, connect().cluster_id))


@ray.remote(num_cpus=1)
def hold(free: Path) -> None:
    eventually(free.exists)


@contextmanager
def without_a_process(session: SandboxSession, tmp_path: Path) -> Iterator[None]:
    """Kill the session's process, and have its successor wait for room."""
    free = tmp_path / "free"
    holding = hold.remote(free)  # it waits on the node, and is quicker than a new process
    actor_id = session.actor._actor_id.hex()
    os.kill(ray.get(session.actor.apothic_status.remote())["pid"], signal.SIGKILL)
    eventually(lambda: actor_record(actor_id)["State"] == "RESTARTING")

    def is_refused() -> bool:
        with pytest.raises(rays.ActorUnavailableError) as caught:
            ray.get(session.actor.apothic_status.remote())
        return was_never_sent(caught.value)

    eventually(is_refused)  # this process may learn later than the GCS that it restarts
    try:
        yield
    finally:
        free.touch()
        ray.get(holding)


def who_waits() -> int:
    """Count the threads that wait until the session is back."""
    return threads_in("wait_for_restart")


def test_awaited_verbs(session: SandboxSession, tmp_path: Path):
    """A cancelled one never runs; more than there are threads wait for one another."""

    async def conversation() -> None:
        with without_a_process(session, tmp_path):
            cancelled = asyncio.ensure_future(session.aio.exec("touch cancelled", shell=True))
            await asyncio.to_thread(eventually, lambda: who_waits() == 1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            line = "until [ -e go ]; do sleep 0.05; done; echo on"
            waiting = [asyncio.ensure_future(session.aio.exec(line, shell=True)) for _ in range(12)]
            await asyncio.to_thread(eventually, lambda: who_waits() == 8)
        await session.aio.exec("touch go", shell=True)
        assert {(await each).stdout for each in waiting} == {"on\n"}
        assert not await session.aio.exists("cancelled")

    asyncio.run(conversation())


def test_verbs(session: SandboxSession, tmp_path: Path):
    """Also those that never reach the process in more than one call: they begin when it is back."""
    with ThreadPoolExecutor(3) as threads:
        with without_a_process(session, tmp_path):
            run = threads.submit(session.exec, "echo on", shell=True)
            streamed = threads.submit(
                lambda: [each.text for each in session.exec_stream("echo on", shell=True)]
            )
            looked = threads.submit(session.inspect)
            eventually(lambda: who_waits() == 3)
        assert run.result().stdout == "on\n"
        assert streamed.result()[0] == "on\n"
        assert looked.result().restarts == 1
