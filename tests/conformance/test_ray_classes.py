"""The suite of classes on Ray."""

from __future__ import annotations

import pytest

from apothic.backend import ControlPlaneClient, connect
from tests.conformance.calls import Calls
from tests.conformance.failures import Failures
from tests.conformance.life import Life
from tests.conformance.refusals import Refusals
from tests.conformance.verbs import Verbs

pytestmark = pytest.mark.ray


class TestRayClasses(Verbs, Calls, Failures, Life, Refusals):
    @pytest.fixture
    def engine(self, ray_cluster: str) -> ControlPlaneClient:
        return connect()
