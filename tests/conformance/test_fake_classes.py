"""The suite of classes on the engine that `apothic.testing` has."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apothic import ClassInstance
from apothic.backend import connect
from apothic.testing import FakeControlPlane, fake_engine, process
from tests.conformance.calls import Calls
from tests.conformance.failures import Failures
from tests.conformance.life import Life
from tests.conformance.losses import Losses
from tests.conformance.refusals import Refusals
from tests.conformance.verbs import Verbs
from tests.support import eventually


class TestFakeClasses(Verbs, Calls, Failures, Life, Losses, Refusals):
    def hasten_closing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(process, "DRAIN_S", 0.3)

    def kill(self, instance: ClassInstance) -> None:
        engine = connect()
        assert isinstance(engine, FakeControlPlane)
        engine.kill(instance.handle)

    @pytest.fixture
    def engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeControlPlane]:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        threads, environment = set(threading.enumerate()), dict(os.environ)
        sleep = time.sleep
        with fake_engine() as engine:
            yield engine
            # What every test is to leave behind: nothing. The engine closes what it did leave.
            eventually(lambda: not engine.list_instances())
        assert time.sleep is sleep
        assert {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} == {
            k: v for k, v in environment.items() if k != "PYTEST_CURRENT_TEST"
        }
        assert not list(temporary.iterdir())
        # The threads behind `.aio` and the retry scheduler serve the whole process.
        shared = ("apothic-aio", "apothic-retries", "apothic-scale-down")
        eventually(
            lambda: (
                not [
                    thread
                    for thread in set(threading.enumerate()) - threads
                    if not thread.name.startswith(shared)
                ]
            )
        )
