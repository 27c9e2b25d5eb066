"""`PumpedStream`: an async generator on another thread's event loop, as an `ItemStream`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from typing_extensions import override

from apothic.backend import ItemStream
from apothic.errors import SandboxClosedError

__all__ = ["PumpedStream"]

_AHEAD = 4
"""Items that are fetched before they are asked for."""

_END = object()


class PumpedStream(ItemStream):
    """Starts its generator at once and holds it up when its items are not taken."""

    def __init__(self, items: AsyncGenerator[Any, None], loop: asyncio.AbstractEventLoop) -> None:
        """Start; ``loop`` runs in another thread."""
        self._loop = loop
        self._items = items
        self._ready: deque[Any] = deque()
        self._end: object = None
        self._changed = asyncio.Condition()
        self._over = threading.Event()
        self._task: asyncio.Task[None] | None = None
        loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._pump())
        self._task.add_done_callback(lambda _: self._over.set())

    async def _pump(self) -> None:
        try:
            async with aclosing(self._items) as items:
                async for item in items:
                    async with self._changed:
                        await self._changed.wait_for(lambda: len(self._ready) < _AHEAD)
                        self._ready.append(item)
                        self._changed.notify_all()
            end: object = _END
        except asyncio.CancelledError:
            end = SandboxClosedError("the stream was closed, or its session was.")
        except BaseException as error:
            end = error
        async with self._changed:
            self._end = end
            self._changed.notify_all()

    async def _next(self) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready or self._end is not None)
            self._changed.notify_all()
            return self._take()

    def _take(self) -> Any:
        if self._ready:
            return self._ready.popleft()
        if isinstance(self._end, BaseException):
            raise self._end
        return _END

    def _ask(self) -> Any:
        coroutine = self._next()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the session was closed, and the loop with it
            coroutine.close()
            return None

    @override
    def next_item(self) -> Any:
        asked = self._ask()
        item = self._take() if asked is None else asked.result()
        if item is _END:
            raise StopIteration
        return item

    @override
    async def anext_item(self) -> Any:
        asked = self._ask()
        item = self._take() if asked is None else await asyncio.wrap_future(asked)
        if item is _END:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        """Have it end without waiting; on the loop's thread."""
        if self._task is not None and not self._task.done():
            self._task.cancel()

    @override
    def close(self) -> None:
        self.abandon()
        # At the end of the process no other thread runs any more: waiting for one would never end.
        if not (sys.is_finalizing() or self._loop.is_closed() or self._is_on_loop()):
            self._over.wait()

    @override
    def abandon(self) -> None:
        if self._over.is_set() or sys.is_finalizing():
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.cancel)

    def _is_on_loop(self) -> bool:
        """Tell whether this is the loop's own thread, where a collection may come at any time."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False
