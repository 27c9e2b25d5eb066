"""The channel on real agents over pipes, and on hostile ones over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import pickle
import signal
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    INPUT_WINDOW,
    MAGIC,
    Capability,
    Channel,
    FrameType,
    Stage,
    WriteFlag,
)
from ray_backend.sandbox.channel import (
    AgentChannel,
    AgentProcess,
    AgentRequestError,
    ChannelClosedError,
)
from ray_backend.sandbox.protocol import (
    AgentVersionError,
    FrameReader,
    ProtocolError,
    encode_frame,
)

ENV = {b"PATH": b"/usr/local/bin:/usr/bin:/bin"}
DEADLINE_S = 30.0
MIB = 1 << 20


class PipeLink:
    """A link to an agent over its pipes, or over one socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.failure: Exception | None = None

    async def read(self) -> bytes:
        data = await self._reader.read(1 << 18)
        if self.failure is not None:
            raise self.failure
        return data

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def abort(self) -> None:
        if not self._writer.is_closing():  # aborting twice is an error of a pipe's transport
            self._writer.transport.abort()

    def break_with(self, error: Exception) -> None:
        self.failure = error
        self._reader.feed_eof()


async def open_pipes(process: subprocess.Popen[bytes]) -> PipeLink:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MIB)
    protocol = asyncio.StreamReaderProtocol(reader)
    await loop.connect_read_pipe(lambda: protocol, process.stdout)
    transport, writing = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, process.stdin
    )
    return PipeLink(reader, asyncio.StreamWriter(transport, writing, None, loop))


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


@pytest.fixture
def converse(shipped_agent: Path) -> Callable[[Callable[[AgentChannel], Awaitable[None]]], None]:
    """Give what runs a conversation with an agent as it is shipped, and checks that it ends well."""

    def run(conversation: Callable[[AgentChannel], Awaitable[None]]) -> None:
        async def main() -> None:
            async with talking(shipped_agent) as channel:
                await asyncio.wait_for(conversation(channel), DEADLINE_S)
                assert not channel._operations
                assert not channel._kills

        asyncio.run(main())

    return run


Converse = Callable[[Callable[[AgentChannel], Awaitable[None]]], None]


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


# Programs.


def test_a_program_from_start_to_end(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        assert Capability.INIT not in channel.capabilities
        process = await start(channel, "sh", "-c", "echo out; echo err >&2; exit 3")
        assert process.exited is None
        assert await finish(process) == (b"out\n", b"err\n")
        assert process.exited is not None
        assert (process.exited.status, process.exited.signal) == (3, None)
        assert await process.next_output() is None

    converse(conversation)


def test_a_program_that_cannot_start(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        process = await start(channel, "/no/such/program", stdin=True)
        with pytest.raises(AgentRequestError, match="No such file") as caught:
            await process.next_output()
        error = pickle.loads(pickle.dumps(caught.value))
        assert (error.errno, error.stage, error.exit_status) == (errno.ENOENT, Stage.PROGRAM, 127)
        assert process.exited is None
        assert not await process.write(b"x" * MIB)
        process.close_stdin()
        await process.kill()
        with pytest.raises(ValueError, match="NUL"):
            await start(channel, "a\0b")

    converse(conversation)


def test_much_of_everything_at_once(converse: Converse):
    """Streams both ways, larger than every window, beside small requests."""

    async def echo(channel: AgentChannel, content: bytes) -> None:
        process = await start(channel, "sh", "-c", "tee /dev/stderr", stdin=True)

        async def feed() -> None:
            assert await process.write(content)
            process.close_stdin()

        (out, err), _ = await asyncio.gather(finish(process), feed())
        assert hashlib.sha256(out).digest() == hashlib.sha256(content).digest()
        assert out == err

    async def small(channel: AgentChannel) -> None:
        for i in range(50):
            process = await start(channel, "echo", str(i))
            assert await finish(process) == (b"%d\n" % i, b"")

    async def conversation(channel: AgentChannel) -> None:
        content = os.urandom(4 * MIB)
        await asyncio.gather(*[echo(channel, content) for _ in range(4)], small(channel))

    converse(conversation)


def test_a_slow_reader_stalls_nobody_else(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        slow = [await start(channel, "yes") for _ in range(20)]
        reader = channel.open_reader(b"/dev/zero", window=1000)
        await reader.stat()
        process = await start(channel, "head", "-c", str(8 * MIB), "/dev/zero")
        assert (await finish(process))[0] == bytes(8 * MIB)
        for one in slow:
            held = sum(len(event.data) for event in one._inbox._items)
            assert held <= 256 * 1024
        reader.close()
        await asyncio.gather(*[one.kill(discard_output=True) for one in slow])
        assert await slow[0].next_output() is None

    converse(conversation)


def test_a_program_that_does_not_read_stalls_only_itself(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        process = await start(channel, "sleep", "1000", stdin=True)
        writing = asyncio.create_task(process.write(bytes(8 * INPUT_WINDOW)))
        assert await finish(await start(channel, "echo", "others")) == (b"others\n", b"")
        assert not writing.done()
        await process.kill(discard_output=True)
        assert not await writing

    converse(conversation)


def test_stdin_that_is_not_there(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        process = await start(channel, "sleep", "1000")
        with pytest.raises(ValueError, match="takes no input"):
            await process.write(b"x")
        process.close_stdin()
        process.signal(signal.SIGINT)
        await finish(process)
        assert process.exited is not None
        assert process.exited.signal == signal.SIGINT
        process.signal(signal.SIGINT)

    converse(conversation)


def test_kills(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do :; done"
        process = await start(channel, "sh", "-c", script)
        assert await until_told(process) == b"ready\n"
        output, *_ = await asyncio.gather(finish(process), *[process.kill(20.0) for _ in range(3)])
        assert output == (b"bye\n", b"")
        assert process.exited is not None
        assert process.exited.status == 4
        left = await start(channel, "sh", "-c", "sleep 1000 & echo $!")
        pid = int((await finish(left))[0])
        os.kill(pid, 0)
        await left.kill()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    converse(conversation)


def test_a_kill_that_is_not_awaited_to_its_end(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        process = await start(channel, "sleep", "1000")
        kill = asyncio.create_task(process.kill(20.0))
        await asyncio.sleep(0)
        kill.cancel()
        await process.kill()
        await finish(process)

    converse(conversation)


def test_an_exec_that_is_cancelled_while_it_is_sent(shipped_agent: Path):
    class Stuck(PipeLink):
        async def drain(self) -> None:
            await asyncio.Event().wait()

    async def main() -> None:
        link: list[Stuck] = []

        def stick(inner: PipeLink) -> Stuck:
            link.append(Stuck(inner._reader, inner._writer))
            return link[0]

        async with talking(shipped_agent, link=stick) as channel:
            starting = asyncio.create_task(start(channel, "sleep", "1000"))
            await asyncio.sleep(0)
            starting.cancel()
            await asyncio.wait({starting})
            (waiting,) = channel._kills.values()
            await asyncio.wait_for(waiting[0], DEADLINE_S)
            assert not channel._operations

    asyncio.run(main())


# Files.


def test_files(converse: Converse, tmp_path: Path):
    place = os.fsencode(tmp_path)

    async def conversation(channel: AgentChannel) -> None:
        content = os.urandom(5 * MIB + 7)
        writer = channel.open_writer(place + b"/file", length=len(content))
        await writer.write(content[:100])
        await writer.write(memoryview(content)[100:])
        assert (await writer.finish()).size == len(content)
        assert await writer.finish() == (await channel.stat(place + b"/file"))[0]
        writer.abort()
        reader = channel.open_reader(place + b"/file")
        assert (await reader.stat()).size == len(content)
        pieces = []
        while piece := await reader.read(1_000_000):
            pieces.append(piece)
        assert {len(piece) for piece in pieces[:-1]} == {1_000_000}
        assert b"".join(pieces) == content
        reader.close()
        part = channel.open_reader(place + b"/file", offset=5, length=10)
        assert await part.read(100) == content[5:15]
        assert await part.read(100) == b""
        await channel.mkdir(place + b"/a/b", parents=True)
        await channel.rename(place + b"/file", place + b"/a/\xff")
        (tmp_path / "link").symlink_to("a")
        assert (await channel.stat(place + b"/link", follow=False))[1] == b"a"
        assert {entry.name for entry in await channel.list_directory(place + b"/a")} == {
            b"b",
            b"\xff",
        }
        with pytest.raises(AgentRequestError) as caught:
            await channel.list_directory(place + b"/a", max_entries=1)
        assert caught.value.errno == errno.EOVERFLOW
        await channel.remove(place + b"/a/b", directory=True)
        for refused in (
            channel.mkdir(place + b"/a"),
            channel.open_reader(place + b"/none").read(1),
            channel.open_reader(place + b"/none").stat(),
            channel.open_writer(place + b"/none/x").finish(),
            channel.list_directory(place + b"/none"),
        ):
            with pytest.raises(AgentRequestError, match=r"File exists|No such file"):
                await refused

    converse(conversation)


def test_writers_that_fail_or_are_given_up(converse: Converse, tmp_path: Path):
    async def conversation(channel: AgentChannel) -> None:
        full = channel.open_writer(b"/dev/full")
        with pytest.raises(AgentRequestError, match="No space"):
            await full.write(bytes(8 * INPUT_WINDOW))
        with pytest.raises(AgentRequestError, match="No space"):
            await full.finish()
        full.abort()
        (tmp_path / "old").write_bytes(b"old")
        for name, flags in (("new", WriteFlag(0)), ("old", WriteFlag.REPLACE)):
            writer = channel.open_writer(os.fsencode(tmp_path / name), flags=flags)
            await writer.write(b"half")
            writer.abort()
            writer.abort()
            with pytest.raises(AgentRequestError, match="canceled"):
                await writer.finish()
        done = channel.open_writer(os.fsencode(tmp_path / "done"))
        await done.finish()
        with pytest.raises(ValueError, match="after its end"):
            await done.write(b"x")
        await channel.stat(b"/")
        assert sorted(os.listdir(tmp_path)) == ["done", "old"]
        assert (tmp_path / "old").read_bytes() == b"old"

    converse(conversation)


def test_blob_and_environment(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        assert await channel.get_blob() == b""
        blob = os.urandom(BLOB_MAX)
        await channel.set_blob(blob)
        assert await channel.get_blob() == blob
        assert (await channel.environ())[b"PATH"] == os.environb[b"PATH"]

    converse(conversation)


# The end.


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
        loop = asyncio.get_running_loop()
        to_agent = await asyncio.to_thread(open, tmp_path / "in", "wb", 0)
        from_agent = await asyncio.to_thread(open, tmp_path / "out", "rb", 0)
        reader = asyncio.StreamReader(limit=MIB)
        protocol = asyncio.StreamReaderProtocol(reader)
        await loop.connect_read_pipe(lambda: protocol, from_agent)
        transport, writing = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, to_agent
        )
        writer = asyncio.StreamWriter(transport, writing, None, loop)
        return await AgentChannel.open(PipeLink(reader, writer), resync=resync)

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
