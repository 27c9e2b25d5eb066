"""The inside of a container as a workspace, on an agent that this process plays."""

from __future__ import annotations

import asyncio
import errno
import struct

import pytest

from apothic.errors import SandboxClosedError, SandboxLostError
from apothic.session_core import SessionCore
from ray_backend.sandbox import agent_workspace
from ray_backend.sandbox.agent.constants import (
    INPUT_WINDOW,
    MAGIC,
    PROTOCOL_VERSION,
    STAT_BYTES,
    FrameType,
    Stage,
)
from ray_backend.sandbox.agent_workspace import AgentWorkspace
from ray_backend.sandbox.channel import AgentChannel, ByteSink, ChannelClosedError
from ray_backend.sandbox.protocol.frames import FrameReader, encode_frame

_CONTENTS = (FrameType.ENVIRON, FrameType.GET_BLOB)
_PLAIN = (FrameType.STAT, FrameType.MKDIR, FrameType.SET_BLOB)


class Agent:
    """Both a link and the agent behind it; what is under way when the link is dropped is lost."""

    def __init__(self) -> None:
        self.heard: list[FrameType] = []
        self.silent = False
        self._frames = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._sink: ByteSink
        self._dropped = False
        self._greeted = False

    def listen(self, sink: ByteSink) -> None:
        self._sink = sink

    def write(self, data: bytes) -> None:
        self._loop.call_soon(self._arrive, bytes(data))

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def abort(self) -> None:
        if not self._dropped:
            self._dropped = True
            self._loop.call_soon(self._sink.ended, None)

    def _arrive(self, data: bytes) -> None:
        if self._dropped:
            return
        if not self._greeted:
            self._greeted = True
            data = data[len(MAGIC) :]
            self._sink.received(MAGIC)
        for kind, stream, body in self._frames.feed(data):
            self.heard.append(FrameType(kind))
            if not self.silent:
                self._sink.received(self._answer(FrameType(kind), stream, bytes(body)))

    def _answer(self, kind: FrameType, stream: int, body: bytes) -> bytes:
        stat = bytes(STAT_BYTES)
        if kind is FrameType.HELLO:
            welcome = struct.pack("<H16sII", PROTOCOL_VERSION, body[2:], 0, INPUT_WINDOW)
            return encode_frame(FrameType.WELCOME, 0, welcome)
        if kind in _CONTENTS:
            opened = encode_frame(FrameType.OPENED, stream, stat)
            return opened + encode_frame(FrameType.DONE, stream)
        if kind in _PLAIN:
            return encode_frame(FrameType.DONE, stream, stat if kind is FrameType.STAT else b"")
        if kind is FrameType.END:
            return encode_frame(FrameType.DONE, stream, stat)
        if kind is FrameType.CANCEL:
            failed = struct.pack("<IB", errno.ECANCELED, Stage.REQUEST)
            return encode_frame(FrameType.ERROR, stream, failed)
        return b""  # a file takes what its window holds, and no more


async def opened() -> tuple[Agent, SessionCore]:
    async def why_lost(error: ChannelClosedError) -> SandboxLostError:
        return SandboxLostError(str(error))

    async def remove() -> None:
        pass

    agent = Agent()
    workspace = AgentWorkspace(
        await AgentChannel.open(agent),
        label="the session",
        user=b"",
        has_home=True,
        why_lost=why_lost,
        remove=remove,
    )
    core = SessionCore(workspace, label="the session")
    await core.start(b"/work", {})
    return agent, core


def test_the_agent_hears_of_what_a_close_cuts_off() -> None:
    async def work() -> None:
        agent, core = await opened()
        upload = await core.upload_begin(b"upload", None, False, False)
        await core.upload_part(upload, 0, b"part")
        held = [
            asyncio.create_task(core.upload_part(upload, 4, bytes(2 * INPUT_WINDOW))),
            asyncio.create_task(core.upload_part(upload, 5, b"late")),
            asyncio.create_task(core.write(b"whole", bytes(2 * INPUT_WINDOW), False, False)),
        ]
        while agent.heard.count(FrameType.DATA) < 5:  # both windows, and the first part
            await asyncio.sleep(0)
        await core.close()
        assert agent.heard.count(FrameType.CANCEL) == 2
        for outcome in await asyncio.gather(*held, return_exceptions=True):
            assert isinstance(outcome, SandboxClosedError)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_an_upload_that_ends_as_the_session_is_closed() -> None:
    async def work() -> None:
        agent, core = await opened()
        upload = await core.upload_begin(b"upload", None, False, False)
        await core.upload_part(upload, 0, b"part")
        ending = asyncio.create_task(core.upload_end(upload))
        await asyncio.sleep(0)  # so that it has begun
        await core.close()
        assert await ending == b"/work/upload"
        assert agent.heard.index(FrameType.END) > agent.heard.index(FrameType.DATA)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_silent_agent_holds_up_no_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_workspace, "ABORT_WAIT_S", 0.01)

    async def work() -> None:
        agent, core = await opened()
        await core.upload_begin(b"upload", None, False, False)
        agent.silent = True
        await core.close()

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_close_without_open_files_asks_nothing() -> None:
    async def work() -> None:
        agent, core = await opened()
        await core.write(b"whole", b"content", False, False)
        heard = len(agent.heard)
        await core.close()
        assert len(agent.heard) == heard

    asyncio.run(asyncio.wait_for(work(), 30))
