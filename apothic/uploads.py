"""`Upload`: a file that comes in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from apothic.errors import SandboxError
from apothic.file_errors import shown, typed
from apothic.workspace import FileWriter

__all__ = ["UPLOAD_IDLE_S", "Upload"]

UPLOAD_IDLE_S = 300.0
"""Seconds after which an upload that nobody continues is given up."""


class Upload:
    """A file that comes in parts."""

    def __init__(self, path: bytes, writer: FileWriter, give_up: Callable[[], None]) -> None:
        """Wrap an open file; ``give_up`` is called when nobody continues it."""
        self.path: bytes = path
        self.writer: FileWriter = writer
        self._give_up = give_up
        self._offset = 0
        self._failure: BaseException | None = None
        self._moved = asyncio.Condition()
        self.timer: asyncio.TimerHandle = self._fresh_timer()

    def _fresh_timer(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(UPLOAD_IDLE_S, self._give_up)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write the part that begins at ``offset``; one that overtook another waits for it."""
        self.timer.cancel()
        self.timer = self._fresh_timer()
        async with self._moved:
            await self._moved.wait_for(lambda: self._offset == offset or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            try:
                with typed(self.path, writing=True):
                    await self.writer.write(data)
            except BaseException as error:
                self._failure = self._failure or error
                if not isinstance(error, Exception):
                    raise
            finally:
                self._moved.notify_all()
            if self._failure is not None:  # its own, or why it was ended meanwhile
                raise self._failure
            self._offset += len(data)

    async def abort(self, why: SandboxError | None = None) -> None:
        """End it; the part that is being written and those that wait fail, with ``why``."""
        self.timer.cancel()
        self._failure = (
            self._failure or why or SandboxError(f"the upload to {shown(self.path)} was given up.")
        )
        try:
            await self.writer.abort()  # first: a part may wait for what never comes
        finally:
            async with self._moved:
                self._moved.notify_all()
