"""The conformance suites on containers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apothic import App, Sandbox
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
