"""`StreamGate`: holds a generator back while its consumer is behind.

Ray's own backpressure confirms every item and so doubles what an item costs. Here the consumer
confirms every `ACK_EVERY` items with one control call, and the producer waits when it is `AHEAD` of
that.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["ACK_EVERY", "AHEAD", "CONSUMER_KEY", "AsyncStreamGate", "StreamGate"]

AHEAD = 256
"""Items that a generator may be ahead of its consumer."""

ACK_EVERY = 128
"""Items after which the consumer confirms."""

CONSUMER_KEY = "__apothic_consumer__"
"""The keyword that names the consumer's job or actor in a generator call."""

_LOOK_S = 2.0

_asking = ThreadPoolExecutor(2, thread_name_prefix="apothic-gate")
"""Where event loops ask for consumers; the threads that a loop brings are user code's."""


class StreamGate:
    """The credit of one stream."""

    def __init__(self, consumer_lives: Callable[[], bool]) -> None:
        """Ask ``consumer_lives`` every two seconds of waiting: a killed consumer confirms nothing."""
        self._consumer_lives = consumer_lives
        self._condition = threading.Condition()
        self._ahead = 0
        self._shut = False

    def admit(self) -> bool:
        """Count one item, after waiting for room; False when nobody wants it any more."""
        if self._ahead >= AHEAD:
            with self._condition:
                while self._ahead >= AHEAD and not self._shut:
                    if not self._condition.wait(_LOOK_S) and not self._consumer_lives():
                        return False
        self._ahead += 1
        return not self._shut

    def confirm(self, count: int) -> None:
        """Take note that the consumer has ``count`` more items."""
        with self._condition:
            self._ahead -= count
            self._condition.notify_all()

    def shut(self) -> None:
        """Let a waiting producer go: it is to stop."""
        with self._condition:
            self._shut = True
            self._condition.notify_all()


class AsyncStreamGate:
    """The credit of one stream whose producer is on an event loop; only that loop uses it."""

    def __init__(self, consumer_lives: Callable[[], bool], ahead: int) -> None:
        """Let ``ahead`` items pass unconfirmed; ``consumer_lives`` is asked on another thread."""
        self._consumer_lives = consumer_lives
        self._room = ahead
        self._changed = asyncio.Event()
        self.is_shut = False

    async def admit(self) -> bool:
        """Count one item, after waiting for room; False when nobody wants it any more."""
        while self._room <= 0 and not self.is_shut:
            self._changed.clear()
            # Not with wait_for, which before Python 3.12 can lose a cancellation.
            change = asyncio.ensure_future(self._changed.wait())
            try:
                changed, _ = await asyncio.wait([change], timeout=_LOOK_S)
            finally:
                change.cancel()
            loop = asyncio.get_running_loop()
            if not changed and not await loop.run_in_executor(_asking, self._consumer_lives):
                return False
        self._room -= 1
        return not self.is_shut

    def confirm(self, count: int) -> None:
        """Take note that the consumer has ``count`` more items."""
        self._room += count
        self._changed.set()

    def shut(self) -> None:
        """Let a waiting producer go: it is to stop."""
        self.is_shut = True
        self._changed.set()
