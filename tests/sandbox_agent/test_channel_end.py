"""How a channel ends: closed, lost, or given malformed bytes by a hostile agent over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    INPUT_WINDOW,
    MAGIC,
    FrameType,
)
from ray_backend.sandbox.channel import (
    AgentChannel,
    ChannelClosedError,
)
from ray_backend.sandbox.protocol import (
    AgentVersionError,
    FrameReader,
    ProtocolError,
    encode_frame,
)
from tests.sandbox_agent.channel_harness import (
    DEADLINE_S,
    PipeLink,
    finish,
    open_pipes,
    start,
    until_told,
)


class Peer:
    """What a hostile agent may be: it answers the hello, and then says what the test makes it say."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.frames: list[tuple[int, int, memoryview]] = []
        self._cutter = FrameReader()

    async def nonce(self) -> bytes:
        head = b""
        while MAGIC not in head:
            head += await self.reader.read(1 << 16)
        padding, _, frame = head.partition(MAGIC)
        assert not padding.strip(b"\0")
        self.frames += self._cutter.feed(frame)
        await self.hears(1)
        return bytes(self.frames.pop()[2][2:])

    async def hears(self, count: int) -> None:
        """Wait for so many frames."""
        while len(self.frames) < count:
            self.frames += self._cutter.feed(await self.reader.read(1 << 16))

    def says(self, data: bytes) -> None:
        self.writer.write(data)

    def welcomes(self, nonce: bytes, version: int = 1) -> None:
        body = struct.pack("<H16sII", version, nonce, 0, INPUT_WINDOW)
        self.says(MAGIC + encode_frame(FrameType.WELCOME, 0, body))


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[PipeLink, Peer]]:
    ours, theirs = socket.socketpair()
    peer = Peer(*await asyncio.open_connection(sock=theirs))
    link = PipeLink(*await asyncio.open_connection(sock=ours))
    try:
        yield link, peer
    finally:
        link.abort()
        peer.writer.transport.abort()


@contextlib.asynccontextmanager
async def hostile() -> AsyncIterator[tuple[AgentChannel, Peer, PipeLink]]:
    async with linked() as (link, peer):
        opening = asyncio.create_task(AgentChannel.open(link))
        peer.welcomes(await peer.nonce())
        channel = await asyncio.wait_for(opening, DEADLINE_S)
        yield channel, peer, link
        await channel.close()


async def everything(channel: AgentChannel, peer: Peer) -> list[asyncio.Task]:
    """Begin one of each operation, which nobody will answer."""
    process = await start(channel, "x", stdin=True)  # stream 1
    writer = channel.open_writer(b"/w")  # stream 2
    full = channel.open_writer(b"/f")
    await full.write(bytes(INPUT_WINDOW))
    tasks = [
        asyncio.create_task(waiting)
        for waiting in (
            process.next_output(),
            process.write(bytes(2 * INPUT_WINDOW)),
            process.kill(1.0),
            channel.stat(b"/"),
            channel.get_blob(),
            channel.environ(),
            channel.set_blob(b""),
            channel.list_directory(b"/"),
            channel.open_reader(b"/r").read(1),
            writer.finish(),
            full.write(b"x"),
        )
    ]
    # Two windows in frames of half a one, the other requests, the kill and the end of a file.
    await peer.hears(3 + 4 + 7)
    return tasks


async def all_fail(channel: AgentChannel, tasks: list[asyncio.Task], match: str) -> None:
    ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), DEADLINE_S)
    assert {type(error) for error in ended} == {ChannelClosedError}, ended
    assert len({id(error) for error in ended}) == len(ended)
    with pytest.raises(ChannelClosedError, match=match):
        await channel.stat(b"/")
    with pytest.raises(ChannelClosedError, match=match):
        await start(channel, "x")
    assert channel.closed
    assert not channel._operations
    assert not channel._kills


@pytest.mark.parametrize("way", ["close", "end", "error", "malformed", "unsent"])
def test_the_end_of_the_channel_fails_all_that_waits(way: str):
    async def main() -> None:
        async with hostile() as (channel, peer, link):
            tasks = await everything(channel, peer)
            if way == "close":
                await channel.close()
                await channel.close()
            elif way == "end":
                peer.writer.close()
            elif way == "error":
                link.break_with(OSError("the wire broke"))
            elif way == "malformed":
                peer.says(encode_frame(FrameType.EXIT, 2, b""))
            else:
                link.write = lambda data: (_ for _ in ()).throw(OSError("full"))  # type: ignore[method-assign]
                with pytest.raises(ChannelClosedError, match="full"):
                    await channel.stat(b"/")
            why = await asyncio.wait_for(channel.wait_closed(), DEADLINE_S)
            match, cause = {
                "close": ("was closed", None),
                "end": ("has ended", None),
                "error": ("wire", OSError),
                "malformed": ("malformed", ProtocolError),
                "unsent": ("full", OSError),
            }[way]
            assert type(why.__cause__) is (cause or type(None))
            await all_fail(channel, tasks, match)

    asyncio.run(main())


def test_what_preceded_malformed_bytes_has_come():
    async def main() -> None:
        async with hostile() as (channel, peer, _):
            process = await start(channel, "x")
            output = encode_frame(FrameType.OUTPUT, 1, b"\1last words")
            peer.says(output + b"\xff" * 20)
            await asyncio.wait_for(channel.wait_closed(), DEADLINE_S)
            assert await until_told(process) == b"last words"
            with pytest.raises(ChannelClosedError, match="longer than allowed"):
                await process.next_output()

    asyncio.run(main())


def test_a_blob_beyond_its_limit_ends_the_channel():
    stat = struct.pack("<IIIIQqQQ", 0o100644, 0, 0, 1, 0, 0, 0, 0)

    async def main() -> None:
        async with hostile() as (channel, peer, _):
            getting = asyncio.create_task(channel.get_blob())
            await peer.hears(1)
            peer.says(encode_frame(FrameType.OPENED, 1, stat))
            sent = 0
            while sent <= BLOB_MAX:
                block = bytes(100_000)
                peer.says(encode_frame(FrameType.OUTPUT, 1, b"\1" + block))
                sent += len(block)
                if sent % 300_000 == 0:  # a quarter of the window has been taken
                    count = len(peer.frames)
                    await peer.hears(count + 1)
            with pytest.raises(ChannelClosedError, match="more than 1048576"):
                await asyncio.wait_for(getting, DEADLINE_S)
            assert isinstance((await channel.wait_closed()).__cause__, ProtocolError)

    asyncio.run(main())


def test_nobody_answers():
    async def main() -> None:
        async with linked() as (link, _):
            with pytest.raises(ChannelClosedError, match="has not answered in"):
                await AgentChannel.open(link, timeout_s=0.01)
        async with linked() as (link, peer):
            opening = asyncio.create_task(AgentChannel.open(link, resync=True))
            peer.welcomes(await peer.nonce(), version=2)
            with pytest.raises(ChannelClosedError, match="version 2") as caught:
                await asyncio.wait_for(opening, DEADLINE_S)
            assert isinstance(caught.value.__cause__, AgentVersionError)
        async with linked() as (link, peer):
            peer.writer.close()
            with pytest.raises(ChannelClosedError, match=r"ended|reset"):
                await AgentChannel.open(link)
        async with linked() as (link, _):
            opening = asyncio.create_task(AgentChannel.open(link))
            await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

    asyncio.run(main())


def test_the_agent_dies(shipped_agent: Path):
    async def main() -> None:
        process = subprocess.Popen(
            [shipped_agent, "--die-on-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        channel = await AgentChannel.open(await open_pipes(process))
        program = await start(channel, "sleep", "1000")
        process.kill()
        with pytest.raises(ChannelClosedError):
            await asyncio.wait_for(program.next_output(), DEADLINE_S)
        await channel.close()
        process.wait()

    asyncio.run(main())


def test_another_client_goes_on(shipped_agent: Path, tmp_path: Path):
    """The owner of a named session is restarted: new pipes' ends, the same agent."""
    os.mkfifo(tmp_path / "in")
    os.mkfifo(tmp_path / "out")
    shell = f'exec "$0" <{tmp_path}/in >{tmp_path}/out'
    process = subprocess.Popen(["sh", "-c", shell, str(shipped_agent)])

    async def attach(*, resync: bool) -> AgentChannel:
        to_agent = await asyncio.to_thread(open, tmp_path / "in", "wb", 0)
        from_agent = await asyncio.to_thread(open, tmp_path / "out", "rb", 0)
        return await AgentChannel.open(await PipeLink.over(from_agent, to_agent), resync=resync)

    async def main() -> None:
        channel = await attach(resync=False)
        await channel.set_blob(b"kept")
        left = await start(channel, "sh", "-c", "sleep 1000 & echo $!")
        pid = int((await finish(left))[0])
        await start(channel, "yes")
        writer = channel.open_writer(os.fsencode(tmp_path / "half"))
        await writer.write(bytes(INPUT_WINDOW))
        await channel.close()
        again = await attach(resync=True)
        assert await again.get_blob() == b"kept"
        os.kill(pid, 0)
        assert not (tmp_path / "half").exists()
        assert await finish(await start(again, "echo", "here")) == (b"here\n", b"")
        os.kill(pid, signal.SIGKILL)
        await again.close()

    try:
        asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
