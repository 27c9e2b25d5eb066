"""The suite of classes on Ray."""

from __future__ import annotations

import os
import signal

import pytest

from apothic import ClassInstance
from apothic.backend import ControlPlaneClient, connect
from ray_backend import ray_api
from tests.conformance.calls import Calls
from tests.conformance.failures import Failures
from tests.conformance.life import Life
from tests.conformance.losses import Losses
from tests.conformance.refusals import Refusals
from tests.conformance.verbs import Verbs
from tests.support import eventually, process_is_gone

pytestmark = pytest.mark.ray


class TestRayClasses(Verbs, Calls, Failures, Life, Losses, Refusals):
    def kill(self, instance: ClassInstance) -> None:
        pid = instance.inspect().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: process_is_gone(pid))

    def closing_is_known(self, instance: ClassInstance) -> None:
        eventually(lambda: ray_api.is_known_dead(instance.actor))

    @pytest.fixture
    def engine(self, ray_cluster: str) -> ControlPlaneClient:
        return connect()
