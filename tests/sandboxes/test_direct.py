"""The conformance suites on containers, without Ray in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from apothic import App, Image, Sandbox
from apothic.backend import use_client
from apothic.errors import SandboxLostError
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.host import SandboxHost
from tests.conformance.sandboxes.base import SMALL, SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import InterruptConformance, KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance, SharedSessionConformance
from tests.conformance.sandboxes.volumes_of_data import DataConformance
from tests.docker.support import left_of
from tests.sandboxes.direct import DirectEngine
from tests.sandboxes.inside import ContainerConformance
from tests.support import import_or_skip

__all__ = ["marked"]

IMAGE = Image.from_registry("apothic-test-debian")


@contextmanager
def in_place(docker_engine: Engine) -> Iterator[DirectEngine]:
    engine = DirectEngine()
    previous = use_client(engine)
    yield engine
    use_client(previous)
    engine.disconnect()
    assert left_of(docker_engine, engine.cluster_id) == []


class Direct(SandboxSuite):
    @pytest.fixture
    def engine(self, docker_engine: Engine) -> Iterator[DirectEngine]:
        with in_place(docker_engine) as engine:
            yield engine

    @pytest.fixture
    def define(self, engine: DirectEngine) -> Callable[..., Sandbox]:
        app = App("conformance")
        count = iter(range(1000))

        def define(**options: Any) -> Sandbox:
            given = {"name": f"s{next(count)}", "image": IMAGE, **SMALL, **options}
            return app.sandbox(**given)

        return define


class OnUvloop(Direct):
    """Ray runs its async actors on uvloop where that is installed."""

    @pytest.fixture
    def engine(self, docker_engine: Engine) -> Iterator[DirectEngine]:
        import_or_skip("uvloop")
        import uvloop

        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        try:
            with in_place(docker_engine) as engine:
                yield engine
        finally:
            asyncio.set_event_loop_policy(before)


class TestDirectExecs(Direct, ExecConformance):
    pass


class TestDirectFiles(Direct, FileConformance):
    pass


class TestDirectKills(Direct, KillConformance, InterruptConformance):
    pass


class TestDirectSessions(Direct, SessionConformance, SharedSessionConformance):
    pass


class TestDirectData(Direct, DataConformance):
    pass


class TestDirectContainers(Direct, ContainerConformance):
    pass


class TestUvloopExecs(OnUvloop, ExecConformance):
    pass


class TestUvloopFiles(OnUvloop, FileConformance):
    pass


def test_a_container_with_other_gpus_than_its_process_is_given_up(docker_engine: Engine) -> None:
    """Ray may have given those of a process that died to somebody else."""
    with in_place(docker_engine) as engine:
        box = App("gpus").sandbox(name="s", image=IMAGE, **SMALL)
        session = box.named("kept")
        [ref] = engine.opened
        around = replace(engine.around(ref.plan), gpu_ids=("1",))

        async def come_back() -> None:
            again = SandboxHost(ref.plan, around, restarted=True, was_ready=True)
            with pytest.raises(
                SandboxLostError, match=r"holds GPU 1, but its container has GPU none"
            ):
                await again.start()
            assert again.state == "lost"
            await again.stop()

        asyncio.run(come_back())
        assert left_of(docker_engine, engine.cluster_id) == []
        session.close()
