"""The conformance suites on containers of a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from apothic import App, Sandbox, SandboxSession
from apothic.backend import ControlPlaneClient, connect
from ray_backend.sandbox.engine.connection import Engine
from tests.conformance.sandboxes.base import SMALL, SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance, SharedSessionConformance
from tests.conformance.sandboxes.volumes_of_data import DataConformance
from tests.docker.support import left_of
from tests.sandboxes.inside import ContainerConformance
from tests.sandboxes.test_direct import IMAGE
from tests.support import eventually

__all__ = ["marked"]

pytestmark = pytest.mark.ray


class OnRay(SandboxSuite):
    @pytest.fixture
    def engine(self, docker_engine: Engine, ray_cluster: str) -> Iterator[ControlPlaneClient]:
        client = connect()
        yield client
        eventually(lambda: not left_of(docker_engine, client.cluster_id))

    @pytest.fixture
    def define(self, engine: ControlPlaneClient) -> Callable[..., Sandbox]:
        app = App("conformance")
        count = iter(range(1000))

        def define(**options: Any) -> Sandbox:
            given = {"name": f"s{next(count)}", "image": IMAGE, **SMALL, **options}
            return app.sandbox(**given)

        return define


class TestRayExecs(OnRay, ExecConformance):
    pass


class TestRayFiles(OnRay, FileConformance):
    pass


class TestRayKills(OnRay, KillConformance):
    pass


class TestRaySessions(OnRay, SessionConformance, SharedSessionConformance):
    pass


class TestRayData(OnRay, DataConformance):
    pass


class TestRayContainers(OnRay, ContainerConformance):
    pass


class TestRayProcesses(OnRay):
    def test_a_session_carries_no_more_than_it_needs(self, session: SandboxSession) -> None:
        """Its process is made for one session, and each package that it imports delays it."""
        pid = ray.get(session.actor.apothic_status.remote())["pid"]
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "_raylet" in loaded
        assert not re.search("pydantic|numpy", loaded)


class TestRayImages(OnRay):
    def test_who_waits_for_a_build_is_told_what_it_does(
        self, define: Callable[..., Sandbox], capfd: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        step = "i=0; while [ $i -lt 30 ]; do echo line-$i; i=$((i + 1)); sleep 0.1; done"
        image = IMAGE.run_commands(f"{step}; echo {tmp_path} > /made")
        with define(image=image).create() as session:
            assert session.read_text("/made").strip() == str(tmp_path)
        told = capfd.readouterr().err
        assert "[apothic] conformance.s0" in told
        assert "line-" in told
