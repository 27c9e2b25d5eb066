"""`RayCall` without a cluster: what waits, and where, while a named instance comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions as rays

from apothic.backend import CallRef
from apothic.errors import WaitTimeoutError
from apothic.function import Job
from apothic.values import ClassInstanceHandle, MethodInfo
from ray_backend import instances
from ray_backend.instances import RayInstance
from tests.support import eventually

ADD = MethodInfo(name="add", kind="sync")


class Ref:
    """An ObjectRef whose value a test gives."""

    def __init__(self) -> None:
        self.outcome: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.outcome

    def fail_unsent(self) -> None:
        self.outcome.set_exception(
            rays.ActorUnavailableError("The actor is restarting.", actor_id=None)
        )


class Method:
    """An actor's method: keeps the references that its calls gave."""

    def __init__(self) -> None:
        self.sent: list[Ref] = []

    def remote(self, *args: Any, **kwargs: Any) -> Ref:
        self.sent.append(Ref())
        return self.sent[-1]


class Actor:
    """A named actor."""

    def __init__(self) -> None:
        self.add = Method()
        self.apothic_status = Method()


def get(ref: Ref, timeout: float | None = None) -> Any:
    try:
        return ref.outcome.result(timeout)
    except FutureTimeout:
        raise rays.GetTimeoutError from None


def wait(refs: Sequence[Ref], **options: Any) -> tuple[list[Ref], list[Ref]]:
    ready = [ref for ref in refs if ref.outcome.done()]
    return ready, [ref for ref in refs if ref not in ready]


class World:
    """A named instance, and the one thread that its client does things on."""

    def __init__(self) -> None:
        self.actor = Actor()
        self.background = ThreadPoolExecutor(1)
        handle = ClassInstanceHandle(
            cluster_id="c", app="a", cls="C", instance_id="i", spec_digest="", named=True
        )
        client = SimpleNamespace(background=self.background, is_live=True)
        owner: Any = SimpleNamespace(client=client)
        self.instance = RayInstance(owner, handle, self.actor, ready=True)

    def submit(self) -> CallRef:
        return self.instance.submit(ADD, (1,), {}, None)

    def answer(self) -> None:
        """Have the instance be back."""
        for ref in self.actor.apothic_status.sent:
            if not ref.outcome.done():
                ref.outcome.set_result({})

    @property
    def sent(self) -> list[Ref]:
        return self.actor.add.sent


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(instances.ray, "get", get)
    monkeypatch.setattr(instances.ray, "wait", wait)
    world = World()
    yield world
    world.background.shutdown()


def test_waiting_for_an_instance_that_comes_back_has_an_end(world: World) -> None:
    job: Job[int] = Job(world.submit())
    world.sent[0].fail_unsent()
    assert job.done()
    assert repr(job) == "<apothic.Job pending>"
    with pytest.raises(WaitTimeoutError, match=r"0\.01 s"):
        job.get(timeout_s=0.01)
    before = len(world.actor.apothic_status.sent)
    with ThreadPoolExecutor(2) as threads:
        values = [threads.submit(job.get) for _ in range(2)]
        asked = world.actor.apothic_status.sent
        eventually(lambda: sum(not ref.outcome.done() for ref in asked) == before + 2)
        world.answer()
        eventually(lambda: len(world.sent) == 2)
        assert repr(job) == "<apothic.Job pending>"
        world.sent[1].outcome.set_result(5)
        assert [value.result() for value in values] == [5, 5]
    assert len(world.sent) == 2  # whoever waits, it was sent again once
    assert repr(job) == "<apothic.Job succeeded>"


def test_calls_that_are_sent_again_hold_no_thread(world: World) -> None:
    futures = [world.submit().future() for _ in range(20)]
    for ref in list(world.sent):
        ref.fail_unsent()

    def thread_is_free() -> None:
        assert world.background.submit(threading.get_ident).result(timeout=60)

    thread_is_free()
    eventually(lambda: len(world.actor.apothic_status.sent) == 1)  # one asks for all
    world.answer()
    eventually(lambda: len(world.sent) == 40)
    thread_is_free()
    assert not any(future.done() for future in futures)
    for ref in world.sent[20:]:
        ref.outcome.set_result(5)
    assert [future.result(timeout=60) for future in futures] == [5] * 20
