"""`AgentChannel`: the verbs, and the way of each event to whom it is for."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    REQUEST_MAX,
    STREAMS_MAX,
    Capability,
    Stage,
    WriteFlag,
)
from ray_backend.sandbox.channel import operations
from ray_backend.sandbox.channel.errors import AgentRequestError, ChannelClosedError
from ray_backend.sandbox.channel.link import ByteLink
from ray_backend.sandbox.channel.operations import (
    AgentProcess,
    AgentReader,
    AgentWriter,
    Incoming,
    Operation,
    Reply,
)
from ray_backend.sandbox.protocol import (
    AgentConnection,
    Done,
    Entry,
    Event,
    Exited,
    Failed,
    FileStat,
    Killed,
    Listed,
    ProtocolError,
    Welcome,
)

__all__ = ["AgentChannel"]

OUTPUT_WINDOW = 256 * 1024
"""Bytes of each output of an exec that may come before somebody takes them."""
FILE_WINDOW = 1024 * 1024
"""Likewise of a file, the blob or the environment."""
LIST_WINDOW = 64 * 1024
"""Likewise of a directory."""
EXECS_MAX = STREAMS_MAX - 32
"""Execs that one agent is given at once; the next wait. What is left is for files, and is not waited
for by programs that wait for each other."""
ENTRIES_MAX = 1_000_000
"""Names that `AgentChannel.list_directory` gives at most, some 100 MB of them."""
T = TypeVar("T")
_CLOSED = "the channel to the sandbox agent was closed"


class AgentChannel:
    """One client's conversation with one agent. All of it runs on the event loop that opened it.

    Paths are absolute bytes. Each verb raises `AgentRequestError` when the agent refuses,
    `ChannelClosedError` when the channel has ended or ends meanwhile, and ValueError for what cannot
    be asked, as `AgentConnection` says. Cancelling a verb gives it up; what the agent has done of it
    by then stays done.
    """

    def __init__(self, link: ByteLink) -> None:
        """Use `open`."""
        self.connection = AgentConnection()
        self._link = link
        self._operations: dict[int, Operation] = {}
        self._kills: dict[int, deque[asyncio.Future[None]]] = {}
        loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._welcome: asyncio.Future[Welcome] = loop.create_future()
        self._end: tuple[str, BaseException | None] | None = None
        self._ended = asyncio.Event()
        self._link_over = asyncio.Event()

    @classmethod
    async def open(
        cls, link: ByteLink, *, resync: bool = False, timeout_s: float = 10.0
    ) -> AgentChannel:
        """Introduce a client to an agent and wait for its answer.

        Args:
            link: the agent's stdin and stdout; the channel's from now on, also when this fails.
            resync: another client may have spoken to this agent. Execs that were its own are
                killed; what it left in the background, files and blob stay.
            timeout_s: seconds to wait.

        Raises:
            ChannelClosedError: no agent answers; its cause tells of a wrong version, of malformed
                bytes, or of the error of the link.
        """
        channel = cls(link)
        link.listen(channel)
        try:
            channel.send(channel.connection.hello(os.urandom(16), resync=resync))
            # Not wait_for: it would hide that the channel ended at the same time.
            await asyncio.wait({channel._welcome}, timeout=timeout_s)
            if not channel._welcome.done():
                channel._stop(f"the sandbox agent has not answered in {timeout_s:g} s", None)
                raise channel._closed_error()
            channel._welcome.result()
        except BaseException:
            await channel.close()
            raise
        return channel

    @property
    def capabilities(self) -> Capability:
        """What the agent can do where it runs."""
        return self._welcome.result().capabilities

    @property
    def closed(self) -> bool:
        """Whether the channel has ended, by `close` or by itself."""
        return self._end is not None

    async def wait_closed(self) -> ChannelClosedError:
        """Wait until the channel has ended; give, not raise, the error that tells why."""
        await self._ended.wait()
        return self._closed_error()

    async def close(self) -> None:
        """End the channel; idempotent. An agent that dies with its stdin then kills everything."""
        self._stop(_CLOSED, None)
        await self._link_over.wait()

    async def room(self, limit: int = STREAMS_MAX) -> None:
        """Wait until fewer requests than ``limit`` are open; what follows at once finds room.

        Raises:
            ChannelClosedError: the channel has ended.
        """
        self._check_open()
        queue = self._waiting.append
        while self.connection.open_streams >= limit:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue((limit, waiter))
            queue = self._waiting.appendleft  # whom somebody was quicker than keeps its place
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done():
                    self._wake_next()  # it was this one's turn
                raise
            finally:
                with suppress(ValueError):
                    self._waiting.remove((limit, waiter))
            self._check_open()

    # -- programs --------------------------------------------------------------------------------

    async def exec(
        self,
        argv: Sequence[bytes],
        *,
        cwd: bytes,
        env: Mapping[bytes, bytes],
        user: bytes = b"",
        stdin: bool = False,
        window: int = OUTPUT_WINDOW,
    ) -> AgentProcess:
        """Start a program; that it cannot be started comes with its output.

        Args:
            argv: the program, looked up in the PATH of ``env`` unless it has a slash, and its
                arguments.
            cwd: where it starts.
            env: its whole environment. With ``user`` and without HOME, HOME is that user's.
            user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; empty: whom the agent runs as.
            stdin: it is written to; else it is ``/dev/null``.
            window: bytes of each output that may come before somebody takes them.
        """
        if self.connection.open_streams >= EXECS_MAX:
            await self.room(EXECS_MAX)
        self._check_open()
        stream, data = self.connection.exec(
            argv,
            cwd=cwd,
            env=env,
            user=user,
            stdin=stdin,
            stdout_credit=window,
            stderr_credit=window,
        )
        self.send(data)
        # Behind the request, which is on its way meanwhile; answers come in a later turn of the loop.
        process = self._operations[stream] = AgentProcess(self, stream, window, stdin=stdin)
        try:
            await self.drain()
        except asyncio.CancelledError:
            with suppress(ChannelClosedError):
                self._begin_kill(stream, 0, discard_output=True)
            raise
        return process

    # -- files -----------------------------------------------------------------------------------

    async def stat(self, path: bytes, *, follow: bool = True) -> tuple[FileStat, bytes | None]:
        """Look at a path; the second is the target of a link that is not followed."""
        await self.room()
        done = await self._ask(self.connection.stat(path, follow=follow))
        assert done.stat is not None  # the codec sees to it
        return done.stat, done.link

    async def list_directory(self, path: bytes, *, max_entries: int = ENTRIES_MAX) -> list[Entry]:
        """Give what is in a directory, in any order; EOVERFLOW where that is too much."""
        await self.room()
        stream, data = self.connection.list_directory(path, credit=LIST_WINDOW)
        listing = self._open_incoming(stream, data, LIST_WINDOW)
        entries: list[Entry] = []
        try:
            while isinstance(event := await listing.take(), Listed):
                entries += event.entries
                if len(entries) > max_entries:
                    raise AgentRequestError(Failed(stream, errno.EOVERFLOW, Stage.REQUEST))
        finally:
            listing.cancel()
        return entries

    async def mkdir(
        self, path: bytes, *, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory; ``exist_ok`` accepts a directory only."""
        await self.room()
        await self._ask(self.connection.mkdir(path, mode=mode, parents=parents, exist_ok=exist_ok))

    async def remove(self, path: bytes, *, directory: bool = False) -> None:
        """Remove a name, or an empty directory."""
        await self.room()
        await self._ask(self.connection.remove(path, directory=directory))

    async def rename(self, old: bytes, new: bytes, *, replace: bool = True) -> None:
        """Give a file another name, at once."""
        await self.room()
        await self._ask(self.connection.rename(old, new, replace=replace))

    def open_reader(
        self,
        path: bytes,
        *,
        offset: int = 0,
        length: int | None = None,
        window: int = FILE_WINDOW,
    ) -> AgentReader:
        """Open a file for reading; that this fails comes with the first read. `room` comes before.

        Args:
            path: a regular file or a character device.
            offset: where to begin.
            length: where to end, from there; None: at its end.
            window: bytes that may come before somebody takes them.
        """
        self._check_open()
        stream, data = self.connection.read(path, credit=window, offset=offset, length=length)
        return AgentReader(self._open_incoming(stream, data, window))

    def open_writer(
        self,
        path: bytes,
        *,
        mode: int = 0o666,
        offset: int = 0,
        length: int | None = None,
        flags: WriteFlag = WriteFlag(0),  # noqa: B008 - an immutable value
    ) -> AgentWriter:
        """Open a file for writing; that this fails comes with a later call on it. See `room`.

        The arguments, and what becomes of an existing file, are those of `AgentConnection.write`.
        """
        self._check_open()
        stream, data = self.connection.write(
            path, mode=mode, offset=offset, length=length, flags=flags
        )
        writer = AgentWriter(self, stream)
        self._operations[stream] = writer
        self.send(data)
        return writer

    # -- what the agent keeps --------------------------------------------------------------------

    async def environ(self) -> dict[bytes, bytes]:
        """Give the container's environment."""
        await self.room()
        stream, data = self.connection.environ(credit=FILE_WINDOW)
        entries = (await self._read_whole(stream, data, REQUEST_MAX)).split(b"\0")
        pairs = (entry.partition(b"=") for entry in entries if b"=" in entry)
        return {name: value for name, _, value in pairs if name}

    async def get_blob(self) -> bytes:
        """Give what `set_blob` kept, by any client; nothing at first."""
        await self.room()
        stream, data = self.connection.get_blob(credit=FILE_WINDOW)
        return await self._read_whole(stream, data, BLOB_MAX)

    async def set_blob(self, blob: bytes) -> None:
        """Have the agent keep up to 1 MiB as long as it lives, where programs cannot read it."""
        await self.room()
        await self._ask(self.connection.set_blob(blob))

    # -- what operations need --------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send now; for operations."""
        self._check_open()
        if not data:
            return
        try:
            self._link.write(data)
        except Exception as error:
            self._stop("nothing can be sent to the sandbox agent", error)
            raise self._closed_error() from error

    async def drain(self) -> None:
        """Wait until more can be sent; for operations."""
        try:
            await self._link.drain()
        except Exception as error:
            self._stop("nothing can be sent to the sandbox agent", error)
        self._check_open()

    async def kill(
        self, stream: int, grace_ms: int, discard_output: bool, held_up: Callable[[], bool]
    ) -> None:
        """Kill an exec and wait until it is dead; for operations."""
        killed = self._begin_kill(stream, grace_ms, discard_output=discard_output)
        limit_s = grace_ms / 1000 + operations.ANSWER_LIMIT_S
        while not (await asyncio.wait({killed}, timeout=limit_s))[0]:
            if not held_up():
                self.give_up()
        killed.result()

    async def wait_served(self) -> None:
        """Wait until the agent has had a turn at every stream; for operations."""
        # It answers before it turns to the streams, and begins with another of them each time.
        for _ in range(len(self._operations) + 2):
            with suppress(AgentRequestError):  # an answer all the same
                await self._ask(self.connection.stat(b"/"))

    def give_up(self) -> None:
        """End the channel, as the agent has been silent for too long; for operations."""
        late = TimeoutError(f"no answer to a request in {operations.ANSWER_LIMIT_S:g} s")
        self._stop("the sandbox agent is silent", late)

    # -- what its link calls ---------------------------------------------------------------------

    def received(self, data: bytes | memoryview) -> None:
        """Take what came; for the link."""
        if self._end is not None:
            return
        try:
            try:
                events = self.connection.receive(data)
            except ProtocolError as error:
                self._dispatch(error.events)
                raise
            self._dispatch(events)
        except ProtocolError as error:
            self._stop("what came from the sandbox agent is malformed", error)
        except Exception as error:
            self._stop("the connection to the sandbox agent broke", error)

    def ended(self, error: Exception | None) -> None:
        """Take the end; for the link."""
        if error is None:
            self._stop("the sandbox agent has ended", None)
        else:
            self._stop("the connection to the sandbox agent broke", error)
        self._link_over.set()

    # -- inside ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._end is not None:
            raise self._closed_error()

    def _closed_error(self) -> ChannelClosedError:
        assert self._end is not None
        why, cause = self._end
        if cause is not None:
            why = f"{why}: {cause}".rstrip(".")  # a cause may be a sentence of its own
        error = ChannelClosedError(why)
        error.__cause__ = cause
        return error

    def _begin_kill(
        self, stream: int, grace_ms: int, *, discard_output: bool
    ) -> asyncio.Future[None]:
        self._check_open()
        data = self.connection.kill(stream, grace_ms=grace_ms, discard_output=discard_output)
        killed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kills.setdefault(stream, deque()).append(killed)
        self.send(data)
        return killed

    async def _ask(self, opened: tuple[int, bytes]) -> Done:
        stream, data = opened
        reply = Reply(self.give_up)
        self._operations[stream] = reply
        self.send(data)
        return await reply.done()

    def _open_incoming(self, stream: int, data: bytes, window: int) -> Incoming:
        incoming = Incoming(self, stream, window)
        self._operations[stream] = incoming
        self.send(data)
        return incoming

    async def _read_whole(self, stream: int, data: bytes, limit: int) -> bytes:
        reader = AgentReader(self._open_incoming(stream, data, FILE_WINDOW))
        try:
            whole = await reader.read(limit + 1)
        finally:
            reader.close()
        if len(whole) > limit:
            error = ProtocolError(f"the agent gave more than {limit} bytes where less must be")
            self._stop("what came from the sandbox agent is malformed", error)
            raise self._closed_error()
        return whole

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Welcome):
                if not self._welcome.done():
                    self._welcome.set_result(event)
            elif isinstance(event, Killed):
                self._on_killed(event)
            elif (operation := self._operations.get(event.stream)) is not None:
                if isinstance(event, Done | Failed | Exited):
                    del self._operations[event.stream]
                    self._wake_next()
                operation.on_event(event)

    def _wake_next(self) -> None:
        """Let the next of those go for whom there is room now."""
        for limit, waiter in self._waiting:
            if not waiter.done() and self.connection.open_streams < limit:
                waiter.set_result(None)
                return

    def _on_killed(self, event: Killed) -> None:
        waiting = self._kills[event.stream]
        for _ in range(event.answered):
            killed = waiting.popleft()
            if not killed.done():
                killed.set_result(None)
        if not waiting:
            del self._kills[event.stream]

    def _stop(self, why: str, cause: BaseException | None) -> None:
        """End the channel and fail all that is under way; the first reason counts."""
        if self._end is not None:
            return
        self._end = why, cause
        self._ended.set()
        operations = list(self._operations.values())
        self._operations.clear()
        for operation in operations:
            operation.on_lost(self._closed_error)
        kills = [killed for waiting in self._kills.values() for killed in waiting]
        self._kills.clear()
        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        for killed in kills:
            _fail(killed, self._closed_error())
        _fail(self._welcome, self._closed_error())
        self._link.abort()


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may be gone
