"""`AgentWorkspace`: the inside of a container as a workspace, through its agent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from typing_extensions import override

from apothic.errors import SandboxClosedError, SandboxError, SandboxLostError
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
from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    PATH_MAX_BYTES,
    Channel,
    Stage,
    WriteFlag,
)
from ray_backend.sandbox.channel import (
    AgentChannel,
    AgentProcess,
    AgentReader,
    AgentRequestError,
    AgentWriter,
    ChannelClosedError,
)

__all__ = ["AgentWorkspace", "home_of"]

T = TypeVar("T")

WhyLost = Callable[[ChannelClosedError], Awaitable[SandboxLostError]]
"""Finds out, once the channel has ended by itself, what became of the container."""

ABORT_WAIT_S = 5.0
"""Seconds that closing waits for the agent to take note of files that were given up; one that is well
takes well under a millisecond."""

_PASSWD_MAX_BYTES = 1024 * 1024
_KINDS: dict[Channel, OutputKind] = {Channel.STDOUT: "stdout", Channel.STDERR: "stderr"}
_STAGES = {
    Stage.PROGRAM: StartStage.PROGRAM,
    Stage.INTERPRETER: StartStage.PROGRAM,
    Stage.CWD: StartStage.CWD,
    Stage.USER: StartStage.USER,
}


class AgentWorkspace(Workspace):
    """Programs and files of one container. The agent works as root; programs run as its user."""

    def __init__(
        self,
        channel: AgentChannel,
        *,
        label: str,
        user: bytes,
        has_home: bool,
        why_lost: WhyLost,
        remove: Callable[[], Awaitable[None]],
    ) -> None:
        """Work through an open channel.

        Args:
            channel: to the container's agent.
            label: names the session in messages.
            user: the image's; empty for root.
            has_home: whether the image sets ``HOME`` itself.
            why_lost: asked once when the channel has ended by itself.
            remove: removes the container; idempotent.
        """
        self._channel = channel
        self._label = label
        self._user = user
        self._has_home = has_home
        self._why_lost = why_lost
        self._remove = remove
        self._closed = False
        self._has_aborted = False
        self._loss: asyncio.Future[SandboxLostError] | None = None

    async def wait_lost(self) -> SandboxLostError:
        """Wait until the container is lost; give the error that tells how."""
        return await self._ask_loss(await self._channel.wait_closed())

    def lose(self, loss: SandboxLostError) -> None:
        """Say why the container is about to be lost, before anybody has to ask."""
        if self._loss is None:
            self._loss = asyncio.get_running_loop().create_future()
            self._loss.set_result(loss)

    @override
    async def environ(self) -> Mapping[bytes, bytes]:
        found = await self._asked(self._channel.environ())
        if self._user and not self._has_home:
            found[b"HOME"] = home_of(await self._passwd(), self._user)
        return found

    async def _passwd(self) -> bytes:
        """Give the container's list of users; nothing where it has none."""
        try:
            reader = await self.open_reader(b"/etc/passwd")
            try:
                return await reader.read(_PASSWD_MAX_BYTES)
            finally:
                await reader.close()
        except OSError:
            return b""

    @override
    async def spawn(self, command: Command) -> Process:
        opening = self._channel.exec(
            command.argv,
            cwd=command.cwd,
            env=command.env,
            user=command.user or self._user,
            stdin=command.stdin is not None,
        )
        try:
            process = await opening
        except ChannelClosedError as error:
            raise await self.gone(error) from None
        except ValueError:
            # Arguments and variables are checked before; what is left is their sum, or the cwd.
            if len(command.cwd) > PATH_MAX_BYTES:
                raise StartFailure(StartStage.CWD, errno.ENAMETOOLONG) from None
            raise StartFailure(StartStage.OTHER, errno.E2BIG) from None
        return _AgentProgram(self, process, command.stdin)

    @override
    async def stat(self, path: bytes) -> FileStat:
        _check(path)
        found, _ = await self._asked(self._channel.stat(path))
        return FileStat(found.mode, found.size)

    @override
    async def listdir(self, path: bytes) -> list[bytes]:
        _check(path)
        return [entry.name for entry in await self._asked(self._channel.list_directory(path))]

    @override
    async def mkdir(self, path: bytes, *, parents: bool, exist_ok: bool) -> None:
        _check(path)
        await self._asked(self._channel.mkdir(path, parents=parents, exist_ok=exist_ok))

    @override
    async def open_reader(self, path: bytes) -> FileReader:
        _check(path)
        try:
            await self._channel.room()
            return _AgentFileReader(self, self._channel.open_reader(path))
        except ChannelClosedError as error:
            raise await self.gone(error) from None

    @override
    async def open_writer(
        self, path: bytes, *, append: bool, make_parents: bool, size: int | None
    ) -> FileWriter:
        _check(path)
        flags = WriteFlag.APPEND if append else WriteFlag(0)
        if make_parents:
            flags |= WriteFlag.MAKE_PARENTS
        try:
            await self._channel.room()
            writer = self._channel.open_writer(path, length=size, flags=flags)
        except ChannelClosedError as error:
            raise await self.gone(error) from None
        return _AgentFileWriter(self, writer)

    @override
    async def load_state(self) -> bytes:
        return await self._asked(self._channel.get_blob())

    @override
    async def save_state(self, state: bytes) -> None:
        if len(state) > BLOB_MAX:
            raise SandboxError(
                f"{self._label}: the session's own variables and its directory take {len(state)} B; "
                f"at most {BLOB_MAX} B are kept. Write large values to a file."
            )
        await self._asked(self._channel.set_blob(state))

    @override
    async def close(self) -> None:
        self._closed = True
        if self._has_aborted:
            await self._wait_until_heard()
        await self._channel.close()
        await self._remove()

    async def _wait_until_heard(self) -> None:
        """Wait until the agent has taken what was sent: closing drops that, and the agent dies of it.

        It would leave half-written files behind, which stay where they are on a volume.
        """
        with contextlib.suppress(AgentRequestError, ChannelClosedError, asyncio.TimeoutError):
            await asyncio.wait_for(self._channel.stat(b"/"), ABORT_WAIT_S)

    async def gone(self, error: ChannelClosedError) -> SandboxError:
        """Give the error for a verb that found the channel ended."""
        if self._closed:
            return SandboxClosedError(f"{self._label} is closed. Open another session.")
        found = await self._ask_loss(error)
        return SandboxLostError(*found.args)  # an object raised twice mixes up its tracebacks

    async def _ask_loss(self, error: ChannelClosedError) -> SandboxLostError:
        if self._loss is None:
            self._loss = asyncio.ensure_future(self._why_lost(error))
        return await asyncio.shield(self._loss)

    async def _asked(self, verb: Awaitable[T]) -> T:
        try:
            return await verb
        except AgentRequestError as error:
            raise _os_error(error) from None
        except ChannelClosedError as error:
            raise await self.gone(error) from None

    # What programs and files of this workspace need.

    async def file_verb(self, verb: Awaitable[T]) -> T:
        """Await a verb of a file, its errors translated."""
        return await self._asked(verb)

    def note_abort(self) -> None:
        """Take note that a file was given up, which the agent has been sent but need not know yet."""
        self._has_aborted = True

    def unwatched(self) -> SandboxLostError:
        """Give the error for a program whose watcher was killed."""
        return SandboxLostError(
            f"{self._label}: the process that watches over a program was killed from inside: "
            f"how the program ended is not known, and nothing of it is alive."
        )


class _AgentProgram(Process):
    """One exec."""

    def __init__(
        self, workspace: AgentWorkspace, process: AgentProcess, stdin: bytes | memoryview | None
    ) -> None:
        self._workspace = workspace
        self._process = process
        self._killed = False
        self._feeding: asyncio.Task[None] | None = None
        if stdin is not None:
            self._feeding = asyncio.create_task(self._feed(stdin))

    async def _feed(self, stdin: bytes | memoryview) -> None:
        with contextlib.suppress(ChannelClosedError):  # whoever takes the output is told
            if await self._process.write(stdin):
                self._process.close_stdin()

    @override
    async def next_output(self) -> tuple[OutputKind, bytes] | None:
        try:
            piece = await self._process.next_output()
        except AgentRequestError as error:
            # A script whose interpreter is missing is there itself, and cannot be executed.
            number = errno.ENOEXEC if error.stage is Stage.INTERPRETER else error.errno
            raise StartFailure(_STAGES.get(error.stage, StartStage.OTHER), number) from None
        except ChannelClosedError as error:
            raise await self._workspace.gone(error) from None
        if piece is not None:
            return _KINDS[piece[0]], piece[1]
        self.detach()
        exited = self._process.exited
        # What was killed by us or for lack of memory has ended so, whoever watched it.
        if exited is None or (exited.lost and not self._killed and not exited.out_of_memory):
            raise self._workspace.unwatched()
        return None

    @property
    @override
    def exit(self) -> Exit:
        exited = self._process.exited
        assert exited is not None  # `next_output` gave None
        return Exit(exited.status, exited.signal, exited.duration_s, exited.out_of_memory)

    @override
    async def has_ended(self) -> bool:
        try:
            return await self._process.has_ended()
        except ChannelClosedError:  # whoever takes the output is told
            return True

    @override
    async def kill(self, grace_s: float, *, discard_output: bool = False) -> None:
        self._killed = True
        with contextlib.suppress(ChannelClosedError):  # with the agent everything else has died
            await self._process.kill(grace_s, discard_output=discard_output)

    @override
    def detach(self) -> None:
        # What goes on keeps its pipes: the agent empties them.
        if self._feeding is not None:
            self._feeding.cancel()
            self._feeding = None


class _AgentFileReader(FileReader):
    """A file that is open for reading."""

    def __init__(self, workspace: AgentWorkspace, reader: AgentReader) -> None:
        self._workspace = workspace
        self._reader = reader

    @override
    async def read(self, limit: int) -> bytes:
        return await self._workspace.file_verb(self._reader.read(limit))

    @override
    async def size(self) -> int:
        return (await self._workspace.file_verb(self._reader.stat())).size

    @override
    async def close(self) -> None:
        with contextlib.suppress(ChannelClosedError):
            self._reader.close()


class _AgentFileWriter(FileWriter):
    """A file that is open for writing."""

    def __init__(self, workspace: AgentWorkspace, writer: AgentWriter) -> None:
        self._workspace = workspace
        self._writer = writer

    @override
    async def write(self, data: bytes | memoryview) -> None:
        await self._workspace.file_verb(self._writer.write(data))

    @override
    async def finish(self) -> None:
        await self._workspace.file_verb(self._writer.finish())

    @override
    async def abort(self) -> None:
        if self._writer.abort():
            self._workspace.note_abort()


def home_of(passwd: bytes, user: bytes) -> bytes:
    """Give a user's home directory as engines do: ``/`` for one that the list does not have.

    Args:
        passwd: the content of ``/etc/passwd``.
        user: ``name``, ``uid``, or either with ``:group``.
    """
    name = user.partition(b":")[0]
    for line in passwd.splitlines():
        fields = line.split(b":")
        if len(fields) >= 7 and name in (fields[0], fields[2]):
            return fields[5] or b"/"
    return b"/"


def _check(path: bytes) -> None:
    if len(path) > PATH_MAX_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _os_error(error: AgentRequestError) -> OSError:
    return OSError(error.errno, os.strerror(error.errno))
