"""The channel on real agents over pipes."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import pickle
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    INPUT_WINDOW,
    Capability,
    Stage,
    WriteFlag,
)
from ray_backend.sandbox.channel import (
    AgentChannel,
    AgentRequestError,
    ChannelClosedError,
)
from ray_backend.sandbox.channel import channel as channel_module
from tests.sandbox_agent.channel_harness import (
    DEADLINE_S,
    MIB,
    PipeLink,
    finish,
    start,
    talking,
    until_told,
)


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


# Programs.


def test_more_programs_than_an_agent_is_given_wait_their_turn(
    converse: Converse, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channel_module, "EXECS_MAX", 3)

    async def conversation(channel: AgentChannel) -> None:
        first = [await start(channel, "cat", stdin=True) for _ in range(3)]
        more = [asyncio.ensure_future(start(channel, "echo", f"{n}")) for n in range(3)]
        for _ in range(20):
            await channel.stat(b"/")  # files have room of their own
        assert not any(each.done() for each in more)
        more.pop(0).cancel()  # its turn is the next one's
        first[0].close_stdin()
        assert await finish(first[0]) == (b"", b"")
        assert await finish(await more[0]) == (b"1\n", b"")
        assert await finish(await more[1]) == (b"2\n", b"")
        for each in first[1:]:
            each.close_stdin()
            await finish(each)

    converse(conversation)


def test_files_do_not_wait_behind_programs(converse: Converse, monkeypatch: pytest.MonkeyPatch):
    """What ends makes room for who needs it, not for the first in the row."""
    monkeypatch.setattr(channel_module, "EXECS_MAX", 1)

    async def conversation(channel: AgentChannel) -> None:
        going_on = [await start(channel, "cat", stdin=True)]
        programs = [asyncio.ensure_future(start(channel, "echo", f"{n}")) for n in range(2)]
        held = [channel.open_reader(b"/dev/zero") for _ in range(2)]
        for each in held:
            await each.stat()
        files = [asyncio.ensure_future(channel.room(3)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in files)
        for each in held:
            each.close()
        await asyncio.wait_for(asyncio.gather(*files), 30)
        assert not any(each.done() for each in programs)
        going_on[0].close_stdin()
        await finish(going_on[0])
        assert [await finish(await each) for each in programs] == [(b"0\n", b""), (b"1\n", b"")]

    converse(conversation)


def test_who_waits_for_a_turn_is_told_of_the_end(
    converse: Converse, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channel_module, "EXECS_MAX", 1)

    async def conversation(channel: AgentChannel) -> None:
        await start(channel, "sleep", "1000")
        more = [asyncio.ensure_future(start(channel, "true")) for _ in range(2)]
        await channel.stat(b"/")
        await channel.close()
        for each in more:
            with pytest.raises(ChannelClosedError):
                await each

    converse(conversation)


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
        content = os.urandom(2 * MIB)
        await asyncio.gather(*[echo(channel, content) for _ in range(3)], small(channel))

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


def test_the_end_of_a_program_whose_output_nobody_takes(converse: Converse, tmp_path: Path):
    """It is known without more room for those that go on; what it wrote stays to be taken."""
    fill = "head -c 320000 /dev/zero"  # more than a window, and no more than a pipe beyond it

    async def conversation(channel: AgentChannel) -> None:
        going_on = [await start(channel, "yes") for _ in range(10)]
        script = f"{fill} & {fill} >&2 & wait; exit 3"
        process = await start(channel, "sh", "-c", script)
        while not await process.has_ended():
            await channel.stat(b"/")
        assert [await one.has_ended() for one in going_on] == [False] * 10
        for one in going_on:
            await one.has_ended()
            held = sum(len(event.data) for event in one._inbox._items)
            assert held <= (256 + 64) * 1024
        out, err = await finish(process)
        assert (len(out), len(err)) == (320000, 320000)
        assert process.exited is not None
        assert process.exited.status == 3
        await asyncio.gather(*[one.kill(discard_output=True) for one in going_on])

    converse(conversation)


def test_a_program_that_never_ran_has_ended(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        running = await start(channel, "sleep", "1000")
        assert not await running.has_ended()
        process = await start(channel, "/no/such/program")
        while not await process.has_ended():
            await channel.stat(b"/")
        with pytest.raises(AgentRequestError):
            await process.next_output()
        await running.kill()

    converse(conversation)


def test_a_program_that_does_not_read_stalls_only_itself(converse: Converse):
    async def conversation(channel: AgentChannel) -> None:
        process = await start(channel, "sleep", "1000", stdin=True)
        writing = asyncio.create_task(process.write(bytes(8 * INPUT_WINDOW)))
        assert await finish(await start(channel, "echo", "others")) == (b"others\n", b"")
        assert not writing.done()
        await process.kill(discard_output=True)
        await writing  # of a closed pipe the agent may have taken all before it told of the end

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
            link.append(Stuck(inner._reader, inner._writer, inner._incoming))
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
