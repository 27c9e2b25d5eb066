"""A socket between this process and a container's agent, beside the engine's streams.

What goes over an attached stream is copied by the engine and by its shim: six more wake-ups for a
request, and for 64 MiB more work than all else together. Where the engine runs on this machine, its
containers get a directory with a socket that this process listens on. The agent connects before any
other program runs in the container, and at once the directory is removed here: inside, an empty one is
left. Where that cannot be (an engine elsewhere, Ray in a container, gVisor, SELinux), the agent says so
and the attached stream does all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.attach import AttachedStream
from ray_backend.sandbox.engine.connection import Engine

if TYPE_CHECKING:
    from ray_backend.sandbox.channel import ByteSink

__all__ = ["LinkOffer", "LinkStream", "abandoned_links", "remove_abandoned_links"]

ACCEPT_S = 60.0
"""Seconds for the agent to connect or to say that it cannot, from the start of its container on."""

_PREFIX = "apothic-link-"
_SOCKET = "s"
_READ_BYTES = 256 * 1024


class LinkOffer:
    """A directory with a listening socket in it, for one container."""

    file_name = _SOCKET
    """The socket's name in the directory."""

    def __init__(self) -> None:
        """Make both.

        Raises:
            OSError: they cannot be made here.
        """
        remove_abandoned_links()
        self.directory = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            # By way of the descriptor: a socket's path is short, that of a directory need not be.
            descriptor = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
            try:
                self._listener.bind(f"/proc/self/fd/{descriptor}/{_SOCKET}")
            finally:
                os.close(descriptor)
            self._listener.listen(1)
            self._listener.setblocking(False)
        except BaseException:
            self.close()
            raise

    @classmethod
    def make(cls, engine: Engine) -> LinkOffer | None:
        """Make one where the engine may be on this machine; None where it is not, or none can be."""
        if engine.address.socket_path is None:
            return None
        with contextlib.suppress(OSError):
            return cls()
        return None

    async def accept(self, attached: AttachedStream) -> LinkStream | None:
        """Wait until the agent has connected; None when it says that it cannot, or is gone.

        Args:
            attached: the container's own stream, which brings the agent's words.
        """
        loop = asyncio.get_running_loop()
        accepting = asyncio.ensure_future(loop.sock_accept(self._listener))
        hearing = asyncio.ensure_future(attached.read())
        link: LinkStream | None = None
        try:
            await asyncio.wait(
                {accepting, hearing}, timeout=ACCEPT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not accepting.done() or accepting.exception() is not None:
                return None
            connection, _ = accepting.result()
            _, link = await loop.create_unix_connection(LinkStream, sock=connection)
            return link
        finally:
            for task in (accepting, hearing):
                task.cancel()
            await asyncio.wait({accepting, hearing})
            if not hearing.cancelled():
                hearing.exception()  # whoever uses the attached stream next meets it again
            if link is None and not accepting.cancelled() and accepting.exception() is None:
                accepting.result()[0].close()

    def close(self) -> None:
        """Remove both; the connection stays. Idempotent."""
        self._listener.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class LinkStream(asyncio.BufferedProtocol):
    """The connection, as a channel takes it (`ray_backend.sandbox.channel.ByteLink`)."""

    def __init__(self) -> None:
        """Prepare; the event loop connects."""
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(_READ_BYTES))  # pages that nothing reaches cost nothing
        self._sink: ByteSink | None = None
        self._over = False
        self._error: Exception | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def listen(self, sink: ByteSink) -> None:
        """Give what comes to ``sink``; what has come is dropped: an agent says nothing ungreeted."""
        self._sink = sink
        if self._over:
            sink.ended(self._error)

    def write(self, data: bytes) -> None:
        """Send.

        Raises:
            SandboxEngineError: the connection is over.
        """
        if self._transport is None or self._transport.is_closing():
            raise SandboxEngineError("the connection to the container is closed.")
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until more can be sent."""
        await self._writable.wait()

    def abort(self) -> None:
        """Drop the connection; the end comes soon."""
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's only look like one

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    @override
    def buffer_updated(self, nbytes: int) -> None:
        if self._sink is not None:
            self._sink.received(self._buffer[:nbytes])

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._over, self._error = True, exc
        self._writable.set()
        if self._sink is not None:
            self._sink.ended(exc)

    @override
    def pause_writing(self) -> None:
        self._writable.clear()

    @override
    def resume_writing(self) -> None:
        self._writable.set()


def abandoned_links() -> list[Path]:
    """Find what processes of this user left that were killed between the offer and the connection."""
    abandoned = []
    for found in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(found.name.removeprefix(_PREFIX).partition("-")[0])
            if found.lstat().st_uid == os.geteuid() and not Path(f"/proc/{pid}").exists():
                abandoned.append(found)
    return abandoned


def remove_abandoned_links() -> tuple[str, ...]:
    """Remove what `abandoned_links` finds; give the paths of what is gone."""
    removed = []
    for found in abandoned_links():
        with contextlib.suppress(OSError):
            shutil.rmtree(found)
            removed.append(str(found))
    return tuple(removed)
