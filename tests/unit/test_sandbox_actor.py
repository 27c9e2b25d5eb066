"""The shell of a session's actor, without Ray: what it does with a cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from ray_backend.sandbox.actor import SandboxActor, _current_task
from ray_backend.sandbox.packed import pack_arguments


class Core:
    """A verb that gives one item and then waits for ever."""

    def __init__(self) -> None:
        self.ended = False

    async def exec_stream(self) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            self.ended = True


class Host:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def core(self) -> Core:
        return self._core


class Shell(SandboxActor):
    """The actor as far as streams need it; one call."""

    def __init__(self, core: Core) -> None:
        self._host = Host(core)
        self._loop = asyncio.get_running_loop()
        self._running, self._ended, self._gates, self._cancelled = {}, {}, {}, {}

    def _live_here(self) -> None:
        pass


def test_a_stream_that_is_cancelled_while_ray_has_its_item_ends():
    """Ray reports an item before it asks for the next: then no step runs that could be cancelled."""

    async def conversation() -> None:
        core = Core()
        shell = Shell(core)
        shell._running["task"] = _current_task()
        items = shell._items("exec_stream", pack_arguments(()), "job:1", "task")
        await items.__anext__()
        cancelling = asyncio.ensure_future(shell._cancel("task"))
        await asyncio.sleep(0)
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(items.__anext__(), 10)
        await asyncio.wait_for(cancelling, 10)
        assert core.ended
        assert not shell._running

    asyncio.run(conversation())
