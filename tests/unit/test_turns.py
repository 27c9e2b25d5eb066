"""What a call leaves behind that was run with fewer turns."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from ray_backend.turns import _read, _run


class Argument:
    pass


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def fail(argument: Argument) -> None:
    raise ValueError("no")


async def wait(argument: Argument, begun: threading.Event) -> None:
    begun.set()
    await asyncio.sleep(1000)


def settled(loop: asyncio.AbstractEventLoop) -> None:
    """Wait until the loop has done what it was given so far."""
    for _ in range(3):
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()


@pytest.mark.usefixtures("no_collector")
def test_a_failed_call_lets_its_arguments_go(loop: asyncio.AbstractEventLoop) -> None:
    argument = Argument()
    gone = weakref.ref(argument)
    future = _run(fail(argument), loop)
    with pytest.raises(ValueError, match="no"):
        future.result()
    settled(loop)
    del argument, future
    assert gone() is None


@pytest.mark.usefixtures("no_collector")
def test_a_cancelled_call_lets_its_arguments_go(loop: asyncio.AbstractEventLoop) -> None:
    argument, begun = Argument(), threading.Event()
    gone = weakref.ref(argument)
    future = _run(wait(argument, begun), loop)
    begun.wait()
    assert future.cancel()
    settled(loop)
    del argument, future
    assert gone() is None


@pytest.mark.usefixtures("no_collector")
def test_arguments_that_cannot_be_read_go_as_well() -> None:
    argument = Argument()
    gone = weakref.ref(argument)
    future: Future[None] = Future()
    _read(fail(argument), future)
    assert isinstance(future.exception(), ValueError)
    del argument, future
    assert gone() is None
