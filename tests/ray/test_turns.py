"""Calls of an actor with fewer turns come to the same as calls of any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray
from ray import exceptions as rays

from ray_backend.turns import spare_turns
from tests.support import eventually

pytestmark = [pytest.mark.ray, pytest.mark.multiversion]


def where_it_is_read() -> int:
    return threading.get_ident()


class Probe:
    """Unpickles to the thread that does so."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return where_it_is_read, ()


@ray.remote(num_cpus=0, max_concurrency=100)
class Echo:
    def __init__(self, spare: bool) -> None:
        if spare:
            spare_turns()
        self.waiting = 0
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def threads(self, reader: int) -> tuple[int, int]:
        return reader, threading.get_ident()

    async def give(self, value: Any, *, more: Any = None) -> Any:
        return value, more

    async def task_id(self, turns: int) -> list[str]:
        found = []
        for _ in range(turns):
            found.append(ray.get_runtime_context().get_task_id() or "")
            await asyncio.sleep(0)
        return found

    async def fail(self, words: str) -> None:
        raise KeyError(words)

    async def wait(self, value: int) -> int:
        self.waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return value

    async def counts(self) -> tuple[int, int]:
        return self.waiting, self.cancelled

    async def open(self) -> None:
        self.gate.set()

    async def count_to(self, end: int) -> AsyncIterator[int]:
        for number in range(end):
            await asyncio.sleep(0)
            yield number


@pytest.fixture
def echo(ray_cluster: str) -> Iterator[Any]:
    actor: Any = Echo.remote(True)
    yield actor
    ray.kill(actor)


def counts(actor: Any, waiting: int, cancelled: int) -> bool:
    return bool(ray.get(actor.counts.remote()) == (waiting, cancelled))


@pytest.mark.parametrize("spare", [False, True])
def test_arguments_are_read_on_rays_thread(ray_cluster: str, spare: bool) -> None:
    actor: Any = Echo.remote(spare)
    try:
        reader, runner = ray.get(actor.threads.remote(Probe()))
        assert (reader != runner) is spare
    finally:
        ray.kill(actor)


def test_arguments_and_results(echo: Any) -> None:
    large = bytes(1024 * 1024)
    assert ray.get(echo.give.remote(b"bytes")) == (b"bytes", None)
    assert ray.get(echo.give.remote([1, {"two": 3.0}], more=None)) == ([1, {"two": 3.0}], None)
    assert ray.get(echo.give.remote(large, more=large)) == (large, large)
    assert ray.get(echo.give.remote(ray.put("a reference"))) == ("a reference", None)


def test_many_at_once(echo: Any) -> None:
    assert ray.get([echo.give.remote(n) for n in range(500)]) == [(n, None) for n in range(500)]


def test_errors(echo: Any) -> None:
    with pytest.raises(KeyError, match="a word"):
        ray.get(echo.fail.remote("a word"))
    with pytest.raises(TypeError):
        ray.get(echo.give.remote())
    failed = echo.fail.remote("earlier")
    with pytest.raises(KeyError, match="earlier"):
        ray.get(echo.give.remote(failed))


def test_each_call_knows_its_task(echo: Any) -> None:
    refs = [echo.task_id.remote(3) for _ in range(20)]
    for ref, found in zip(refs, ray.get(refs), strict=True):
        assert found == [ref.task_id().hex()] * 3


def test_a_cancelled_call_is_cancelled(echo: Any) -> None:
    _, before = ray.get(echo.counts.remote())
    kept, gone = echo.wait.remote(1), echo.wait.remote(2)
    eventually(lambda: counts(echo, 2, before))
    ray.cancel(gone)
    with pytest.raises((rays.TaskCancelledError, rays.RayTaskError)):
        ray.get(gone)
    eventually(lambda: counts(echo, 1, before + 1))
    ray.get(echo.open.remote())
    assert ray.get(kept) == 1


def test_a_stream(echo: Any) -> None:
    items = echo.count_to.options(num_returns="streaming").remote(5)
    assert [ray.get(item) for item in items] == list(range(5))
