"""Channels to real agents over pipes, and what programs on them are asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

from ray_backend.sandbox.agent.constants import (
    Channel,
)
from ray_backend.sandbox.channel import (
    AgentChannel,
    AgentProcess,
    ByteSink,
)

ENV = {b"PATH": b"/usr/local/bin:/usr/bin:/bin"}
DEADLINE_S = 30.0
MIB = 1 << 20


class PipeLink:
    """A link to an agent over two pipes, or over one socket."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        incoming: asyncio.ReadTransport | None = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._incoming = incoming
        self.failure: Exception | None = None
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def over(cls, from_agent: IO[bytes], to_agent: IO[bytes]) -> PipeLink:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MIB)
        protocol = asyncio.StreamReaderProtocol(reader)
        incoming, _ = await loop.connect_read_pipe(lambda: protocol, from_agent)
        outgoing, writing = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, to_agent
        )
        return cls(reader, asyncio.StreamWriter(outgoing, writing, None, loop), incoming)

    def listen(self, sink: ByteSink) -> None:
        self._listening = asyncio.create_task(self._listen(sink))

    async def _listen(self, sink: ByteSink) -> None:
        try:
            while data := await self._reader.read(1 << 18):
                sink.received(data)
        except Exception as error:
            self.failure = error
        sink.ended(self.failure)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def abort(self) -> None:
        if not self._writer.is_closing():  # aborting twice is an error of a pipe's transport
            self._writer.transport.abort()
        if self._incoming is not None:
            self._incoming.close()

    def break_with(self, error: Exception) -> None:
        self.failure = error
        self._reader.feed_eof()


async def open_pipes(process: subprocess.Popen[bytes]) -> PipeLink:
    assert process.stdout is not None
    assert process.stdin is not None
    return await PipeLink.over(process.stdout, process.stdin)


@contextlib.asynccontextmanager
async def talking(
    binary: Path, *arguments: str, link: Callable[[PipeLink], PipeLink] = lambda link: link
) -> AsyncIterator[AgentChannel]:
    process = subprocess.Popen(
        [binary, *(arguments or ("--die-on-eof",))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    try:
        channel = await AgentChannel.open(link(await open_pipes(process)))
        try:
            yield channel
        finally:
            await channel.close()
        assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


async def start(channel: AgentChannel, *argv: str, **options: object) -> AgentProcess:
    return await channel.exec(
        [os.fsencode(part) for part in argv],
        cwd=b"/",
        env=ENV,
        **options,  # type: ignore[arg-type]
    )


async def finish(process: AgentProcess) -> tuple[bytes, bytes]:
    got = {Channel.STDOUT: bytearray(), Channel.STDERR: bytearray()}
    while (piece := await process.next_output()) is not None:
        got[piece[0]] += piece[1]
    return bytes(got[Channel.STDOUT]), bytes(got[Channel.STDERR])


async def until_told(process: AgentProcess) -> bytes:
    piece = await process.next_output()
    assert piece is not None
    return piece[1]
