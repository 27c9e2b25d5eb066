"""`Latch`: what threads and event loops wait for alike."""

from __future__ import annotations

import asyncio
import contextlib
import threading

__all__ = ["Latch"]


class Latch:
    """Opens once. Who waits on an event loop holds no thread, of which a loop has only a few."""

    def __init__(self) -> None:
        """Begin shut."""
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def is_open(self) -> bool:
        """Whether nobody has to wait."""
        return self._opened.is_set()

    def open(self) -> None:
        """Let all go, on any thread and loop; idempotent."""
        with self._lock:
            self._opened.set()
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(event.set)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block this thread until it is open; False when the time is up."""
        return self._opened.wait(timeout_s)

    async def wait_async(self) -> None:
        """Wait until it is open."""
        event = asyncio.Event()
        with self._lock:
            if self.is_open:
                return
            self._waiting.append((asyncio.get_running_loop(), event))
        await event.wait()
