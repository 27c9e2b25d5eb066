"""`InstanceHost` without Ray: starts and stops that go wrong."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from apothic.errors import SerializationError
from ray_backend.actors import host as module
from ray_backend.actors.failure import RemoteFailure, capture
from ray_backend.actors.host import HostServices, InstanceHost
from ray_backend.actors.plan import InstancePlan
from ray_backend.translate import translate
from tests.conformance.exceptions import NoTextError
from tests.support import eventually


class World:
    """What is around a host; counts what the host does to it."""

    def __init__(self) -> None:
        self.removed = threading.Event()

    def host(
        self,
        cls: type[Any],
        methods: dict[str, str],
        enter: tuple[str, ...] = (),
        leave: tuple[str, ...] = (),
        concurrency: int = 1,
    ) -> InstanceHost:
        """Make a host whose exit hooks run on a thread of their own."""
        made = InstancePlan(
            app="a",
            cls="C",
            instance_id="i",
            actor_name="n",
            named=False,
            spec_digest="",
            blob_digest="",
            methods=tuple(methods.items()),
            enter_hooks=enter,
            exit_hooks=leave,
            arguments=b"",
            arguments_digest="",
            timeout_s=60.0,
            concurrency=concurrency,
        )
        services = HostServices(
            prepare=lambda: None,
            load=lambda: (cls, (), {}),
            submit_exit=lambda: threading.Thread(target=host.run_exit_hooks).start(),
            remove=self.removed.set,
            replace=lambda task_id, text: None,
            task_id=lambda: f"{threading.get_ident():x}",
        )
        host = InstanceHost(made, services)
        return host


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(time, "sleep", time.sleep)  # a host replaces it, for the process's life
    return World()


# -- the log -----------------------------------------------------------------------------------------


class Fails:
    """Fails to start, or to stop."""

    def enter(self) -> None:
        raise ValueError("half an emoji, \ud83d")

    def leave(self) -> None:
        raise ValueError("half an emoji, \ud83d")

    def leave_too(self) -> None:
        pass


class Gone(io.StringIO):
    """A log that cannot be written."""

    def write(self, text: str) -> int:
        raise OSError("no space left")


def strict() -> io.TextIOWrapper:
    """Make a log as Ray's are: what UTF-8 does not know is an error."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


@pytest.mark.parametrize("log", [strict, Gone])
def test_a_failed_start_is_told_whatever_the_log_does(
    world: World, monkeypatch: pytest.MonkeyPatch, log: Callable[[], io.TextIOBase]
) -> None:
    monkeypatch.setattr(module, "SELF_REMOVAL_S", 0.0)
    monkeypatch.setattr(sys, "stderr", log())
    host = world.host(Fails, {}, enter=("enter",))
    for _ in range(2):
        with pytest.raises(RemoteFailure, match=r"half an emoji, \\ud83d") as caught:
            host.start()
        str(caught.value).encode()
    eventually(world.removed.is_set)


@pytest.mark.parametrize("log", [strict, Gone])
def test_exit_hooks_run_whatever_the_log_does(
    world: World, monkeypatch: pytest.MonkeyPatch, log: Callable[[], io.TextIOBase]
) -> None:
    monkeypatch.setattr(module, "SELF_REMOVAL_S", 0.0)
    monkeypatch.setattr(sys, "stderr", log())
    host = world.host(Fails, {}, leave=("leave_too", "leave"))
    host.start()
    bad, good = host.stop()["hooks"]
    assert bad["error"] == r"ValueError: half an emoji, \ud83d"
    assert r"half an emoji, \ud83d" in bad["traceback"]
    assert (good["name"], good["error"]) == ("leave_too", None)
    eventually(world.removed.is_set)


def test_a_failure_that_travels_can_be_encoded() -> None:
    failure = capture(ValueError("\ud83d"))
    for text in (failure.text, failure.message, failure.trace, failure.short, str(failure)):
        text.encode()
    assert failure.message == r"\ud83d"


@pytest.mark.parametrize("reason", [NoTextError(), ValueError("\ud83d")], ids=["none", "odd"])
def test_what_ray_could_not_unpickle_is_told(reason: Exception) -> None:
    error = translate(RaySystemError(reason, "in deserialize_objects"), "it")
    assert isinstance(error, SerializationError)
    str(error).encode()
