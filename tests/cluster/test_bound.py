"""Instances that nobody waits for: what `bind` starts, and the replicas of a pool."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from apothic import App, Volume, method
from apothic.errors import PlacementTimeoutError
from ray_backend import ray_api, readiness
from ray_backend.manager import instance_names
from tests.cluster.conftest import Nodes
from tests.support import eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Define = Callable[..., Any]
_numbers = itertools.count()


def waiting() -> list[ray_api.ActorSeat]:
    return [each for each in ray_api.actor_seats("PENDING_CREATION") if each.waits]


@contextlib.contextmanager
def only_a100s_can_come_free(nodes: Nodes, define: Define) -> Iterator[Any]:
    """Fill both T4s and the two A100s of one node; give the instance that holds the latter."""
    cls = define(gpu=["T4", "A100"], gpu_count=2)
    with cls.new() as first, contextlib.ExitStack() as stack:
        assert nodes.name(first.node.remote()) == "t4"
        second = stack.enter_context(cls.new())
        assert nodes.name(second.node.remote()) == "large"
        yield second


def define_streaming() -> Any:
    app = App(f"bound-{next(_numbers)}")

    @app.cls(cpu=0, memory_mb=10, gpu=["T4", "A100"], gpu_count=2, max_pending_tasks=50)
    class Bound:
        def __init__(self) -> None:
            self.calls = 0

        @method()
        def node(self, word: str) -> tuple[str, str]:
            self.calls += 1
            return word, str(ray.get_runtime_context().get_node_id())

        @method()
        def words(self, count: int) -> Iterator[str]:
            yield from (f"{number}" for number in range(count))

        @method()
        def count(self) -> int:
            return self.calls

    return Bound


def test_calls_go_where_room_comes_first_and_run_once(nodes: Nodes, define: Define) -> None:
    bound = define_streaming().bind()
    with only_a100s_can_come_free(nodes, define) as second, ThreadPoolExecutor(1) as pool:

        async def awaited() -> Any:
            return await bound.node.aio.remote("awaited")

        jobs = [bound.node.spawn(f"{number}") for number in range(20)]
        stream = bound.words.remote_gen(3)
        soon = pool.submit(asyncio.run, awaited())
        [seat] = eventually(waiting)
        assert "offer:t4" in seat.resources  # the cheapest that could ever fit
        second.close()
        large = nodes.id("large")
        assert [job.get(60) for job in jobs] == [(f"{number}", large) for number in range(20)]
        assert list(stream) == ["0", "1", "2"]
        assert soon.result(60) == ("awaited", large)
        assert bound.count.remote() == 21
        assert len(instance_names()) == 2
    bound.close()


def test_who_binds_where_there_is_no_room_is_told_and_may_try_again(
    nodes: Nodes, define: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(readiness.PLACEMENT_TIMEOUT_VARIABLE, "2")
    cls = define(gpu="T4", gpu_count=2)
    bound = cls.bind()
    with cls.named("the-holder") as holder:
        began = time.monotonic()
        job = bound.node.spawn()
        with pytest.raises(PlacementTimeoutError, match="'the-holder'"):
            bound.node.remote()
        with pytest.raises(PlacementTimeoutError, match="within 2 s"):
            job.get(30)
        assert time.monotonic() - began < 10
        eventually(lambda: instance_names() == [f"{holder.handle.app}:Probe:the-holder"])
        holder.close()
    assert nodes.name(bound.node.remote()) == "t4"
    bound.close()


def test_replicas_of_a_pool_are_placed_like_others(
    nodes: Nodes, define: Define, tmp_path: Path
) -> None:
    app = App(f"pool-{next(_numbers)}")

    @app.cls(cpu=0, memory_mb=10, gpu=["T4", "A100"], max_containers=3)
    class Pooled:
        @method()
        def meet(self, directory: str) -> str:
            """Return once three of them run at the same time."""
            Path(directory, str(os.getpid())).touch()
            eventually(lambda: len(list(Path(directory).iterdir())) == 3)
            return str(ray.get_runtime_context().get_node_id())

    pool = Pooled.bind()
    jobs = [pool.meet.spawn(str(tmp_path)) for _ in range(3)]
    assert sorted(nodes.name(job.get(60)) for job in jobs) == ["small", "t4", "t4"]
    pool.close()


def test_a_named_instance_comes_back_where_its_new_volume_is(nodes: Nodes, define: Define) -> None:
    """Although its node is the fuller one of two that are alike."""
    name = f"home-{time.monotonic_ns()}"
    for key in ("twin-1", "twin-2"):
        nodes.add_offer("twin", key=key, labels={"apothic.io/country": "AQ"})
    volumes = {f"/tmp/apothic-{name}": Volume.vast_local(name, size_gb=1)}
    cls = define(geolocation="AQ", volumes=volumes)
    try:
        for _ in range(3):
            inst = cls.named("at-home")
            home = inst.node.remote()
            with define(cpu=3, geolocation="AQ", volumes=volumes).new() as neighbour:
                assert neighbour.node.remote() == home
                os.kill(inst.pid.remote(), signal.SIGKILL)
                assert eventually(lambda: cls.named("at-home").inspect().restarts == 1, 60)
                assert cls.named("at-home").node.remote() == home
            inst.close()
        assert "Its host-local volume lies on node" in cls.explain()
        tight = define(cpu=4000, geolocation="AQ", volumes=volumes)
        assert home in tight.explain()
        assert "delete the volume" in tight.explain()
    finally:
        cls.close_named("at-home")
        Volume.from_name(name).delete()
        nodes.forget("twin-1")
        nodes.forget("twin-2")
