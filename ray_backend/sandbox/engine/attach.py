"""The raw stream to a container's PID 1, for an event loop.

docker-py reads it too, but takes an error and a truncated header for the end of the stream.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import cast

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.connection import Engine

__all__ = ["STDERR", "STDOUT", "AttachedStream", "Demultiplexer"]

STDOUT = 1
STDERR = 2
_HEADER_BYTES = 8
# The engine copies in pieces of 32 KiB; more than this is not the engine speaking.
FRAME_MAX_BYTES = 16 * 1024**2
_ANSWER_MAX_BYTES = 64 * 1024
_PAUSE_ABOVE_BYTES = 1024**2


class Demultiplexer:
    """Take apart the engine's stream of frames: channel (u8), three zeros, length (u32), bytes.

    Pure: bytes in, pieces out. A piece may be a part of a frame.
    """

    def __init__(self) -> None:
        """Begin between two frames."""
        self._header = bytearray()
        self._channel = 0
        self._left = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes; give the pieces in them, each with its channel.

        Raises:
            SandboxEngineError: when the bytes are no such stream.
        """
        pieces: list[tuple[int, bytes]] = []
        at, end = 0, len(data)
        while at < end:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append((self._channel, piece))
                self._left -= len(piece)
                at += len(piece)
                continue
            taken = data[at : at + _HEADER_BYTES - len(self._header)]
            self._header += taken
            at += len(taken)
            if len(self._header) == _HEADER_BYTES:
                self._read_header()
        return pieces

    def _read_header(self) -> None:
        channel, zeros = self._header[0], self._header[1:4]
        length = int.from_bytes(self._header[4:], "big")
        if channel not in (STDOUT, STDERR) or any(zeros) or length > FRAME_MAX_BYTES:
            raise SandboxEngineError(
                f"the Docker engine sent {bytes(self._header)!r}, which heads no frame of an attached "
                f"stream."
            )
        self._channel, self._left = channel, length
        self._header.clear()

    def end(self) -> None:
        """Take the end of the stream.

        Raises:
            SandboxEngineError: when it is inside a frame or its header.
        """
        if self._header or self._left:
            raise SandboxEngineError(
                "the Docker engine's stream ended inside a frame: the engine or the connection broke."
            )


class AttachedStream(asyncio.Protocol):
    """A container's stdin, stdout and stderr. Attach before the container starts, to miss nothing."""

    def __init__(self, what: str) -> None:
        """Prepare; `open` connects."""
        self._what = what
        self._transport: asyncio.Transport | None = None
        self._answer: bytearray | None = bytearray()  # until the engine has agreed
        self._upgraded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames = Demultiplexer()
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._buffered_bytes = 0
        self._paused = False
        self._ended = False
        self._error: SandboxEngineError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()

    @classmethod
    async def open(
        cls, engine: Engine, container: str, *, timeout_s: float = 30.0
    ) -> AttachedStream:
        """Attach to a created or running container.

        Raises:
            SandboxEngineError: when there is no such container, or the engine does not answer.
        """
        stream = cls(f"attach to the container {container[:12]!r}")
        loop = asyncio.get_running_loop()
        major, minor = engine.api_version
        request = (
            f"POST /v{major}.{minor}/containers/{container}/attach"
            f"?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1\r\n"
            f"Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        )

        async def connect() -> None:
            await engine.address.open(loop, stream)
            stream.write(request.encode("ascii"))
            await stream._upgraded

        try:
            await asyncio.wait_for(connect(), timeout_s)
        except BaseException as error:
            stream.abort()
            if isinstance(error, TimeoutError | asyncio.TimeoutError):
                raise SandboxEngineError(
                    f"the Docker engine could not {stream._what}: no answer in {timeout_s} s."
                ) from None
            if isinstance(error, OSError):
                raise SandboxEngineError(
                    f"the Docker engine could not {stream._what}: {error}."
                ) from error
            raise
        return stream

    async def read(self) -> tuple[int, bytes] | None:
        """Give the next bytes with their channel, `STDOUT` or `STDERR`; None at the clean end.

        The end is that of all processes which hold the container's stdout and stderr.

        Raises:
            SandboxEngineError: when the stream broke; what came before it was given first.
        """
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            if self._reader is not None:
                raise RuntimeError("two readers on one attached stream")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        channel, piece = self._pieces.popleft()
        self._buffered_bytes -= len(piece)
        if self._paused and self._buffered_bytes < _PAUSE_ABOVE_BYTES // 2:
            self._paused = False
            if self._transport is not None:
                self._transport.resume_reading()
        return channel, piece

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes to PID 1's stdin; follow with `drain` where much is sent.

        Raises:
            SandboxEngineError: when the stream is over.
        """
        if self._transport is None or self._transport.is_closing():
            raise self._error or SandboxEngineError("the stream to the container is closed.")
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until what was written may be followed by more.

        Raises:
            SandboxEngineError: when the stream broke.
        """
        await self._writable.wait()
        if self._error is not None:
            raise self._error

    def write_eof(self) -> None:
        """Close PID 1's stdin, where this stream is its last user."""
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    def abort(self) -> None:
        """Drop the connection at once, as a dying process does."""
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Drop the connection and wait until it is gone."""
        if self._transport is not None:
            self._transport.abort()
            await self._gone.wait()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take the engine's answer, then frames."""
        if self._answer is not None:
            self._answer += data
            rest = self._read_answer()
            if rest is None:
                return
            data = rest
        try:
            for piece in self._frames.feed(data):
                self._pieces.append(piece)
                self._buffered_bytes += len(piece[1])
        except SandboxEngineError as error:
            self._fail(error)
            return
        if self._buffered_bytes > _PAUSE_ABOVE_BYTES and not self._paused:
            self._paused = True
            cast(asyncio.Transport, self._transport).pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Take the end of what the container says; its stdin stays open until `close`."""
        if self._answer is not None:
            self._refuse()
            return False
        try:
            self._frames.end()
        except SandboxEngineError as error:
            self._fail(error)
            return False
        self._ended = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the connection; without a clean end before, it is an error."""
        if not self._ended and self._error is None:
            reason = f": {exc}" if exc is not None else ""
            self._error = SandboxEngineError(
                f"the connection to the container broke{reason}. The engine may have been restarted."
            )
        self._transport = None
        if not self._upgraded.done():
            self._upgraded.set_exception(self._error or SandboxEngineError("connection closed"))
        self._writable.set()
        self._gone.set()
        self._wake()

    def pause_writing(self) -> None:
        """Make `drain` wait."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let `drain` go on."""
        self._writable.set()

    def _read_answer(self) -> bytes | None:
        """Give what follows the head of the engine's answer; None while it is not all there."""
        answer = self._answer
        assert answer is not None  # the caller looked
        head, blank, rest = bytes(answer).partition(b"\r\n\r\n")
        if not blank:
            if len(answer) > _ANSWER_MAX_BYTES:
                self._fail(SandboxEngineError("what answers is no Docker engine."))
            return None
        status = head.split(b" ", 2)[1:2]
        if status != [b"101"] and status != [b"200"]:
            if rest.rstrip().endswith(b"}") or len(answer) > _ANSWER_MAX_BYTES:
                self._refuse()
            return None  # the reason may be still to come; the connection ends after it
        self._answer = None
        self._upgraded.set_result(None)
        return rest

    def _refuse(self) -> None:
        head, _, body = bytes(self._answer or b"").partition(b"\r\n\r\n")
        reason = _reason(body) or head.split(b"\r\n", 1)[0].decode("ascii", "replace")
        self._fail(SandboxEngineError(f"the Docker engine could not {self._what}: {reason}."))

    def _fail(self, error: SandboxEngineError) -> None:
        self._error = error
        if not self._upgraded.done():
            self._upgraded.set_exception(error)
        self.abort()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _reason(body: bytes) -> str:
    start, end = body.find(b"{"), body.rfind(b"}")
    try:
        text = str(json.loads(body[start : end + 1])["message"])
    except (ValueError, KeyError, TypeError):
        text = body.decode("utf-8", "replace")
    return text.strip().rstrip(".")
