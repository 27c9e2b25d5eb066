"""`InstanceHost` without Ray: starts and stops that go wrong."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from apothic.errors import SerializationError
from ray_backend.actors import gate
from ray_backend.actors import host as module
from ray_backend.actors.failure import RemoteFailure, capture
from ray_backend.actors.gate import AHEAD
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
            task_id=lambda: f"{id(_task()):x}",
        )
        host = InstanceHost(made, services)
        return host


def _task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return threading.current_thread()


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


# -- event loops, which have only a few threads ------------------------------------------------------

MANY = 3
ASYNC = {"add": "async", "count": "async_generator"}


class Waits:
    """Enters in a thread of the loop's, once `go_on` says so."""

    go_on = threading.Event()

    async def enter(self) -> None:
        await asyncio.to_thread(self.go_on.wait)
        if isinstance(self, WaitsInVain):
            raise ValueError("in vain")

    async def add(self, one: int) -> int:
        return one + 1

    async def count(self) -> AsyncIterator[int]:
        for number in range(2 * AHEAD):
            yield number


class WaitsInVain(Waits):
    pass


class Loop:
    """An event loop on a thread, with as many threads of its own as a machine with few CPUs."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(MANY))
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


@pytest.fixture
def loops() -> Iterator[list[Loop]]:
    made = [Loop(), Loop()]
    yield made
    for loop in made:
        loop.stop()


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    yield Waits.go_on
    Waits.go_on.set()  # so that a thread that waits for it ends
    Waits.go_on = threading.Event()


async def items_of(host: InstanceHost, count: int, task_ids: list[Any]) -> list[int]:
    """Take the items of a stream, and confirm none."""
    found = []
    async for item in host.stream_async("count", (), {}):
        found.append(item)
        if len(found) == count:
            task_ids.append(asyncio.current_task())
    return found


async def settle() -> None:
    """Let everything that is due on this loop run."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("cls", [Waits, WaitsInVain])
def test_calls_that_wait_for_enter_take_no_threads(
    world: World, loops: list[Loop], go_on: threading.Event, cls: type[Waits]
) -> None:
    host = world.host(cls, ASYNC, enter=("enter",), concurrency=20)
    calls = [loop.run(host.call_async("add", (1,), {})) for _ in range(2 * MANY) for loop in loops]
    for loop in loops:
        loop.run(settle()).result(60)
        assert loop.run(asyncio.to_thread(int)).result(60) == 0
    go_on.set()
    if cls is Waits:
        assert [call.result(60) for call in calls] == [2] * len(calls)
        assert host.status()["state"] == "ready"
    else:
        for call in calls:
            with pytest.raises(RemoteFailure, match="in vain"):
                call.result(60)


def test_calls_that_wait_for_enter_are_refused_when_the_instance_closes(
    world: World, loops: list[Loop], go_on: threading.Event
) -> None:
    host = world.host(Waits, ASYNC, enter=("enter",), concurrency=20)
    first = loops[0].run(host.call_async("add", (1,), {}))
    loops[0].run(settle()).result(60)
    others = [loop.run(host.call_async("add", (1,), {})) for loop in loops]
    for loop in loops:
        loop.run(settle()).result(60)
    assert "abandoned" in host.stop(drain_s=0.01)["note"]
    for call in others:
        with pytest.raises(RemoteFailure, match="is closed"):
            call.result(60)
    go_on.set()
    with pytest.raises(RemoteFailure, match="is closed"):
        first.result(60)


def test_a_start_that_cannot_be_noted_has_failed(world: World, loops: list[Loop]) -> None:
    def fail() -> None:
        raise OSError("the registry is away")

    host = world.host(Waits, ASYNC, concurrency=20)
    host._services.started = fail
    for _ in range(2):
        with pytest.raises(RemoteFailure, match="the registry is away"):
            loops[0].run(host.call_async("add", (1,), {})).result(60)


def test_streams_that_nobody_reads_take_no_threads(world: World, loops: list[Loop]) -> None:
    host = world.host(Waits, ASYNC, concurrency=20)
    tasks: list[Any] = []
    streams = [loops[0].run(items_of(host, AHEAD, tasks)) for _ in range(3 * MANY)]
    eventually(lambda: len(tasks) == len(streams))
    assert loops[0].run(asyncio.to_thread(int)).result(60) == 0
    assert not any(stream.done() for stream in streams)
    for task in list(tasks):
        host.confirm(f"{id(task):x}", AHEAD)  # on another thread than the loop's
    assert [stream.result(60) for stream in streams] == [list(range(2 * AHEAD))] * len(streams)


def test_a_stream_that_nobody_reads_can_be_cancelled(world: World, loops: list[Loop]) -> None:
    host = world.host(Waits, ASYNC, concurrency=20)
    tasks: list[Any] = []
    stream = loops[0].run(items_of(host, AHEAD, tasks))
    eventually(lambda: len(tasks) == 1)
    loops[0].run(settle()).result(60)
    host.cancel(f"{id(tasks[0]):x}")
    with pytest.raises(RemoteFailure, match="was cancelled"):
        stream.result(60)
    assert host.status()["running"] == 0


def test_a_stream_whose_reader_has_died_ends(
    world: World, loops: list[Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_LOOK_S", 0.01)
    host = world.host(Waits, ASYNC, concurrency=20)
    host._services.consumer_lives = lambda _: False
    assert loops[0].run(items_of(host, AHEAD, [])).result(60) == list(range(AHEAD))
    assert host.status()["running"] == 0
