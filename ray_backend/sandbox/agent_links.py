"""The ways to a container's agent, as a channel takes them (`ray_backend.sandbox.channel.ByteLink`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from typing_extensions import override

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.attach import STDOUT, AttachedStream
from ray_backend.sandbox.engine.link import LinkStream

if TYPE_CHECKING:
    from ray_backend.sandbox.channel import ByteSink

__all__ = ["AgentLink", "DirectLink"]

_TOLD_BYTES = 2000


class AgentLink:
    """An attached stream as a channel takes it; what the agent complains of is kept for messages."""

    def __init__(self, stream: AttachedStream) -> None:
        """Use an open stream."""
        self._stream = stream
        self._listening: asyncio.Task[None] | None = None
        self.complaints = b""

    def listen(self, sink: ByteSink) -> None:
        """Give the agent's stdout to ``sink``."""
        self._listening = asyncio.create_task(self._listen(sink))

    async def _listen(self, sink: ByteSink) -> None:
        try:
            async for piece in self._stdout():
                sink.received(piece)
        except Exception as error:
            sink.ended(error)
        else:
            sink.ended(None)

    async def _stdout(self) -> AsyncIterator[bytes]:
        while (piece := await self._stream.read()) is not None:
            if piece[0] == STDOUT:
                yield piece[1]
            else:
                self.complaints = (self.complaints + piece[1])[-_TOLD_BYTES:]

    def write(self, data: bytes) -> None:
        """Send bytes to its stdin."""
        self._stream.write(data)

    async def drain(self) -> None:
        """Wait until more can be sent."""
        await self._stream.drain()

    def abort(self) -> None:
        """Drop the connection."""
        self._stream.abort()


class DirectLink(AgentLink):
    """A link to the agent itself; it ends with the container's stream, which says what went wrong."""

    def __init__(self, stream: AttachedStream, direct: LinkStream) -> None:
        """Use both."""
        super().__init__(stream)
        self._direct = direct
        self._attending = asyncio.create_task(self._attend())

    async def _attend(self) -> None:
        try:
            with contextlib.suppress(SandboxEngineError):
                async for _ in self._stdout():
                    pass  # nothing: the agent speaks on the link
        finally:
            self._direct.abort()

    @override
    def listen(self, sink: ByteSink) -> None:
        """Give the agent's bytes to ``sink``."""
        self._direct.listen(sink)

    @override
    def write(self, data: bytes) -> None:
        """Send bytes to it."""
        self._direct.write(data)

    @override
    async def drain(self) -> None:
        """Wait until more can be sent."""
        await self._direct.drain()

    @override
    def abort(self) -> None:
        """Drop both connections."""
        self._attending.cancel()
        self._direct.abort()
        super().abort()
