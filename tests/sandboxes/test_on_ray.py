"""The conformance suites on containers of a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from apothic import App, Sandbox, SandboxSession, Volume
from apothic.backend import ControlPlaneClient, connect
from apothic.errors import SandboxClosedError
from apothic.session_calls import PART_BYTES, PARTS_IN_FLIGHT
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


class TestRayVolumes(OnRay):
    @pytest.mark.parametrize("named", [False, True])
    def test_close_leaves_no_half_written_file(
        self, define: Callable[..., Sandbox], named: bool
    ) -> None:
        """The agent of a named session does not end with its client, that of another does."""
        name = f"half-written-{named}".lower()
        sandbox = define(volumes={"/data": Volume.vast_local(name, size_gb=1)})
        count = PARTS_IN_FLIGHT + 2
        with sandbox.named("writer") if named else sandbox.create() as session:

            def parts() -> Iterator[bytes]:
                for number in range(count):
                    if number == count - 1:  # so that the first has arrived
                        assert session.listdir("/data") == ["file"]
                        assert session.close().closed
                    yield bytes(PART_BYTES)

            with pytest.raises(SandboxClosedError):
                session._upload(b"/data/file", parts(), count * PART_BYTES, False)
        with sandbox.create() as later:
            assert later.listdir("/data") == []
        Volume.from_name(name).delete()


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
