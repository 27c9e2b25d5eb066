"""`AgentWorkspace`: a container as a sandbox session works in it, over the agent that is its PID 1."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from apothic.errors import SandboxClosedError, SandboxLostError
from apothic.workspace import (
    Command,
    Exit,
    FileReader,
    FileStat,
    FileWriter,
    OutputKind,
    Process,
    StartFailure,
    StartStage,
    Workspace,
)
from ray_backend.sandbox.agent.constants import Channel, Stage, WriteFlag
from ray_backend.sandbox.channel import (
    AgentChannel,
    AgentProcess,
    AgentReader,
    AgentRequestError,
    AgentWriter,
    ChannelClosedError,
)

__all__ = ["AgentWorkspace"]

_PIECE = 1024 * 1024
_STAGES = {
    Stage.PROGRAM: StartStage.PROGRAM,
    Stage.INTERPRETER: StartStage.PROGRAM,
    Stage.CWD: StartStage.CWD,
    Stage.USER: StartStage.USER,
}


class AgentWorkspace(Workspace):
    """What is inside one container."""

    def __init__(
        self,
        channel: AgentChannel,
        *,
        label: str,
        environment: Mapping[bytes, bytes],
        user: bytes,
        why_lost: Callable[[], Awaitable[str]],
        remove: Callable[[], Awaitable[None]],
    ) -> None:
        """Work through a channel.

        Args:
            channel: to the agent; the workspace's from now on.
            label: names the session in messages.
            environment: the image's variables.
            user: the image's user; empty for root.
            why_lost: tells, once the channel has ended, what became of the container.
            remove: removes the container.
        """
        self._channel = channel
        self._label = label
        self._environment = dict(environment)
        self._user = user
        self._why_lost = why_lost
        self._remove = remove
        self._closed = False
        self._lost: asyncio.Task[str] | None = None

    async def environ(self) -> Mapping[bytes, bytes]:
        """Give the container's variables with the image's over them."""
        async with _Verb(self):
            return {**await self._channel.environ(), **self._environment}

    async def spawn(self, command: Command) -> Process:
        """Start a program."""
        async with _Verb(self):
            process = await self._channel.exec(
                command.argv,
                cwd=command.cwd,
                env=command.env,
                user=command.user or self._user,
                stdin=command.stdin is not None,
            )
        return _Process(self, process, command.stdin)

    async def stat(self, path: bytes) -> FileStat:
        """Look at a path, following links."""
        async with _Verb(self):
            found, _ = await self._channel.stat(path)
            return FileStat(found.mode, found.size)

    async def listdir(self, path: bytes) -> list[bytes]:
        """Give the names in a directory."""
        async with _Verb(self):
            return [entry.name for entry in await self._channel.list_directory(path)]

    async def mkdir(self, path: bytes, *, parents: bool, exist_ok: bool) -> None:
        """Make a directory."""
        async with _Verb(self):
            await self._channel.mkdir(path, parents=parents, exist_ok=exist_ok)

    async def open_reader(self, path: bytes) -> FileReader:
        """Open a file for reading."""
        async with _Verb(self):
            return _Reader(self, self._channel.open_reader(path))

    async def open_writer(
        self, path: bytes, *, append: bool, make_parents: bool, size: int | None
    ) -> FileWriter:
        """Open a file for writing; with ``size`` its space is reserved before anything changes."""
        flags = WriteFlag(0)
        if append:
            flags |= WriteFlag.APPEND
        if make_parents:
            flags |= WriteFlag.MAKE_PARENTS
        async with _Verb(self):
            return _Writer(self, self._channel.open_writer(path, length=size, flags=flags))

    async def load_state(self) -> bytes:
        """Give what the agent keeps."""
        async with _Verb(self):
            return await self._channel.get_blob()

    async def save_state(self, state: bytes) -> None:
        """Have the agent keep it."""
        async with _Verb(self):
            await self._channel.set_blob(state)

    async def close(self) -> None:
        """End the container."""
        if self._closed:
            return
        self._closed = True
        await self._channel.close()
        await self._remove()

    async def ended(self) -> BaseException:
        """Give what a verb raises whose channel has ended under it."""
        if self._closed:
            return SandboxClosedError(f"{self._label} is closed. Open another session.")
        if self._lost is None:
            self._lost = asyncio.ensure_future(self._why_lost())
        why = await asyncio.shield(self._lost)
        return SandboxLostError(f"{self._label} was lost: {why} Open another session.")


class _Verb:
    """Has the channel's errors come as a workspace's."""

    def __init__(self, workspace: AgentWorkspace) -> None:
        self._workspace = workspace

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ChannelClosedError):
            raise await self._workspace.ended() from error.__cause__
        if isinstance(error, AgentRequestError):
            raise OSError(error.errno, "") from None
        if isinstance(error, ValueError):
            # Longer than the agent takes, or with a NUL: the kernel would say so, too.
            raise OSError(_errno_of(error), "") from None


def _errno_of(error: ValueError) -> int:
    return errno.ENAMETOOLONG if "long" in str(error) else errno.EINVAL


class _Process(Process):
    """An exec of the agent."""

    def __init__(
        self, workspace: AgentWorkspace, process: AgentProcess, stdin: bytes | memoryview | None
    ) -> None:
        self._workspace = workspace
        self._process = process
        self._feeding = None if stdin is None else asyncio.ensure_future(self._feed(stdin))

    async def _feed(self, stdin: bytes | memoryview) -> None:
        # The end of the channel is told by `next_output`; a program need not read its input.
        with suppress(ChannelClosedError):
            view = memoryview(stdin)
            for at in range(0, len(view), _PIECE):
                if not await self._process.write(view[at : at + _PIECE]):
                    return
            self._process.close_stdin()

    async def next_output(self) -> tuple[OutputKind, bytes] | None:
        async with _Verb(self._workspace):
            try:
                piece = await self._process.next_output()
            except AgentRequestError as error:
                raise _start_failure(error) from None
        if piece is None:
            self._stop_feeding()
            return None
        return "stdout" if piece[0] is Channel.STDOUT else "stderr", bytes(piece[1])

    @property
    def exit(self) -> Exit:
        exited = self._process.exited
        assert exited is not None  # the protocol of `Process`
        return Exit(exited.status, exited.signal, exited.duration_s, exited.out_of_memory)

    async def kill(self, grace_s: float, *, discard_output: bool = False) -> None:
        self._stop_feeding()
        with suppress(ChannelClosedError):  # then nothing of it is alive
            await self._process.kill(grace_s, discard_output=discard_output)

    def detach(self) -> None:
        self._stop_feeding()

    def _stop_feeding(self) -> None:
        if self._feeding is not None:
            self._feeding.cancel()


def _start_failure(error: AgentRequestError) -> StartFailure:
    number = error.errno
    if error.exit_status == 127 and number not in (errno.ENOENT, errno.ENOTDIR):
        number = errno.ENOENT
    return StartFailure(_STAGES.get(error.stage, StartStage.OTHER), number)


class _Reader(FileReader):
    def __init__(self, workspace: AgentWorkspace, reader: AgentReader) -> None:
        self._workspace = workspace
        self._reader = reader

    async def read(self, limit: int) -> bytes:
        async with _Verb(self._workspace):
            return await self._reader.read(limit)

    async def close(self) -> None:
        self._reader.close()


class _Writer(FileWriter):
    def __init__(self, workspace: AgentWorkspace, writer: AgentWriter) -> None:
        self._workspace = workspace
        self._writer = writer

    async def write(self, data: bytes | memoryview) -> None:
        async with _Verb(self._workspace):
            await self._writer.write(data)

    async def finish(self) -> None:
        async with _Verb(self._workspace):
            await self._writer.finish()

    async def abort(self) -> None:
        with _closed_is_ended():
            self._writer.abort()


@contextmanager
def _closed_is_ended() -> Iterator[None]:
    with suppress(ChannelClosedError):
        yield
