from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.address import EngineAddress
from ray_backend.sandbox.engine.attach import AttachedStream, Demultiplexer
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.launch import Launched
from tests.docker.support import read_all, spec_of, with_container

_FRAMES = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=6)


def _encode(frames: list[tuple[int, bytes]]) -> bytes:
    return b"".join(
        bytes([channel, 0, 0, 0]) + len(data).to_bytes(4, "big") + data for channel, data in frames
    )


@given(_FRAMES, st.lists(st.integers(1, 17), min_size=1))
def test_any_cut_gives_the_same(frames: list[tuple[int, bytes]], cuts: list[int]):
    encoded, at, number = _encode(frames), 0, 0
    demultiplexer = Demultiplexer()
    found = {1: b"", 2: b""}
    while at < len(encoded):
        size = cuts[number % len(cuts)]
        for channel, data in demultiplexer.feed(encoded[at : at + size]):
            found[channel] += data
        at, number = at + size, number + 1
    demultiplexer.end()
    assert found == {
        channel: b"".join(data for one, data in frames if one == channel) for channel in (1, 2)
    }


@given(_FRAMES.filter(bool), st.data())
def test_a_truncated_stream_is_an_error(frames: list[tuple[int, bytes]], data: st.DataObject):
    encoded = _encode(frames)
    ends = {len(_encode(frames[:count])) for count in range(len(frames) + 1)}
    cut = data.draw(st.integers(0, len(encoded)).filter(lambda at: at not in ends))
    demultiplexer = Demultiplexer()
    demultiplexer.feed(encoded[:cut])
    with pytest.raises(SandboxEngineError, match="inside a frame"):
        demultiplexer.end()


@pytest.mark.parametrize(
    "head", [b"\0\0\0\0\0\0\0\1", b"\3\0\0\0\0\0\0\1", b"\1\0\1\0\0\0\0\1", b"\1\0\0\0\xff\0\0\0"]
)
def test_what_is_no_frame(head: bytes):
    with pytest.raises(SandboxEngineError, match="heads no frame"):
        Demultiplexer().feed(head)


def test_many_bytes_both_ways(engine: Engine, owner: OwnerLabels):
    """64 MiB in and out at once, with a reader that makes the engine wait."""
    block = os.urandom(1024**2)
    sent, got = hashlib.sha256(), hashlib.sha256()

    async def body(launched: Launched) -> None:
        async def write() -> None:
            for _ in range(64):
                sent.update(block)
                launched.stream.write(block)
                await launched.stream.drain()
            launched.stream.write_eof()

        writer = asyncio.ensure_future(write())
        total = 0
        while (piece := await launched.stream.read()) is not None:
            got.update(piece[1])
            total += len(piece[1])
            assert launched.stream._buffered_bytes < 4 * 1024**2
        await writer
        assert total == 64 * 1024**2

    with_container(engine, spec_of(owner), body)
    assert sent.digest() == got.digest()


def test_both_channels(engine: Engine, owner: OwnerLabels):
    async def body(launched: Launched) -> None:
        assert await read_all(launched.stream) == {1: b"out\n", 2: b"err\n"}
        assert await launched.stream.read() is None  # the end stays the end

    script = "echo out; echo err >&2"
    with_container(engine, spec_of(owner, "/bin/sh", "-c", script), body)


def test_container_killed(engine: Engine, owner: OwnerLabels):
    async def body(launched: Launched) -> None:
        waiting = asyncio.ensure_future(launched.stream.read())
        assert await asyncio.to_thread(engine.kill, launched.id)
        assert await waiting is None
        await launched.stream.close()
        with pytest.raises(SandboxEngineError, match="is closed"):
            launched.stream.write(b"x")

    with_container(engine, spec_of(owner), body)


def test_refused_and_broken(engine: Engine):
    async def run() -> None:
        with pytest.raises(SandboxEngineError, match=r"could not attach .*[Nn]o such container"):
            await AttachedStream.open(engine, "none")

    asyncio.run(run())


def test_engine_that_breaks_off(tmp_path: Path):
    """A connection that ends inside a frame, and one reset: errors, after what had come."""

    async def run(answer: bytes) -> list[tuple[int, bytes]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\n\r\n" + answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(serve, tmp_path / "s")
        async with server:
            other = _At(f"unix://{tmp_path}/s")
            stream = await AttachedStream.open(other, "any")  # type: ignore[arg-type]
            pieces = []
            try:
                while (piece := await stream.read()) is not None:
                    pieces.append(piece)
            finally:
                await stream.close()
        return pieces

    assert asyncio.run(run(b"\1\0\0\0\0\0\0\2ab")) == [(1, b"ab")]
    with pytest.raises(SandboxEngineError, match="inside a frame"):
        asyncio.run(run(b"\1\0\0\0\0\0\0\4ab"))
    with pytest.raises(SandboxEngineError, match="inside a frame"):
        asyncio.run(run(b"\1\0\0"))
    with pytest.raises(SandboxEngineError, match="heads no frame"):
        asyncio.run(run(b"nonsense"))


class _At:
    """As much of an engine as attaching looks at."""

    def __init__(self, url: str) -> None:
        self.address = EngineAddress(url)
        self.api_version = (1, 41)
