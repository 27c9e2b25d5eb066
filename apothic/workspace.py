"""`Workspace`: what a sandbox session works in, below its semantics.

Two kinds of thing are asked of it: to start a program, and to look at and change files. The local
session's is this machine (`apothic.local_session`), a container's is an agent inside. All that users
see beyond that (working directory, environment, limits, results) is in `apothic.session_core`, once.

Everything here is as the kernel has it: paths are absolute and, like arguments and variables, bytes.
File verbs fail with a plain `OSError` that has ``errno`` set; a workspace that is gone fails every verb
with `SandboxLostError`, or with `SandboxClosedError` after `Workspace.close`. One event loop uses it.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "Command",
    "Exit",
    "FileReader",
    "FileStat",
    "FileWriter",
    "Process",
    "StartFailure",
    "StartStage",
    "Workspace",
]

OutputKind = Literal["stdout", "stderr"]


class FileStat(NamedTuple):
    """What is at a path; ``mode`` holds type and permissions as `stat.S_ISDIR` etc. take them."""

    mode: int
    size: int


@dataclass(frozen=True)
class Command:
    """A program to start.

    Attributes:
        argv: the program, looked up in the ``PATH`` of ``env`` unless it has a slash, and its
            arguments.
        cwd: where it starts.
        env: its whole environment.
        user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; empty: the workspace's own.
        stdin: its whole input; None is ``/dev/null``.
    """

    argv: Sequence[bytes]
    cwd: bytes
    env: Mapping[bytes, bytes]
    user: bytes = b""
    stdin: bytes | memoryview | None = None


class StartStage(enum.Enum):
    """What of a start failed."""

    PROGRAM = "program"
    CWD = "cwd"
    USER = "user"
    OTHER = "other"


class StartFailure(Exception):  # noqa: N818 - never leaves the core
    """A program could not be started."""

    def __init__(self, stage: StartStage, errno: int) -> None:
        """Keep what failed and how."""
        super().__init__(stage, errno)
        self.stage = stage
        self.errno = errno


class Exit(NamedTuple):
    """How a program ended: exactly one of ``status`` and ``signal`` is set."""

    status: int | None
    signal: int | None
    duration_s: float
    oom_killed: bool = False


class Process(ABC):
    """A program that runs, with all that descends from it."""

    @abstractmethod
    async def next_output(self) -> tuple[OutputKind, bytes] | None:
        """Give the next piece of output, at most 1 MiB; None at the end.

        The end has come when the program itself has ended and what was in its pipes then is given,
        even while something it started goes on and holds them open. The program is held up when
        nobody asks, and not before.

        Raises:
            StartFailure: it never ran. Only the first call raises it.
        """

    @property
    @abstractmethod
    def exit(self) -> Exit:
        """How it ended; after `next_output` gave None."""

    @abstractmethod
    async def has_ended(self) -> bool:
        """Tell whether the program itself has ended, also while its output waits to be taken.

        What it has started may go on. One that is held up because nobody takes its output runs.
        """

    @abstractmethod
    async def kill(self, grace_s: float, *, discard_output: bool = False) -> None:
        """End the whole tree: SIGTERM, so much time, SIGKILL; also what left the process group.

        Returns when nothing of it is alive, also when the program itself had ended before.
        Output has to be taken meanwhile, beside this call, unless it is to be discarded.
        """

    @abstractmethod
    def detach(self) -> None:
        """Let go of it after its end: what it left behind goes on, its output is thrown away."""


class FileReader(ABC):
    """A file that is open for reading; one and the same, whatever happens to its name."""

    @abstractmethod
    async def read(self, limit: int) -> bytes:
        """Give up to ``limit`` bytes more; nothing at the end."""

    async def size(self) -> int:
        """Give its length when it was opened; 0 where that is not known, as in ``/proc``."""
        return 0

    @abstractmethod
    async def close(self) -> None:
        """Let go of it; idempotent."""


class FileWriter(ABC):
    """A file that is open for writing. It keeps inode, mode, owner and links if it existed."""

    @abstractmethod
    async def write(self, data: bytes | memoryview) -> None:
        """Append to what was written."""

    @abstractmethod
    async def finish(self) -> None:
        """End well; any error not raised so far comes here. What was there beyond it is cut off."""

    @abstractmethod
    async def abort(self) -> None:
        """End badly: a new file is removed. Idempotent, also after `finish`, where it does nothing.

        It may come while another task is in `write` or `finish`: a write fails or ends soon, and a
        finish ends as it would have.
        """


class Workspace(ABC):
    """A place with programs and files. Verbs may run beside one another."""

    @abstractmethod
    async def environ(self) -> Mapping[bytes, bytes]:
        """Give the environment that programs start with before the session's own variables."""

    @abstractmethod
    async def spawn(self, command: Command) -> Process:
        """Start a program; failures may come as late as `Process.next_output`.

        Raises:
            StartFailure: it cannot be started.
        """

    @abstractmethod
    async def stat(self, path: bytes) -> FileStat:
        """Look at a path, following links."""

    @abstractmethod
    async def listdir(self, path: bytes) -> list[bytes]:
        """Give the names in a directory, without ``.`` and ``..``, in any order."""

    @abstractmethod
    async def mkdir(self, path: bytes, *, parents: bool, exist_ok: bool) -> None:
        """Make a directory; ``exist_ok`` accepts a directory only."""

    @abstractmethod
    async def open_reader(self, path: bytes) -> FileReader:
        """Open a file; errors may come as late as the first read. Not for pipes and sockets."""

    @abstractmethod
    async def open_writer(
        self, path: bytes, *, append: bool, make_parents: bool, size: int | None
    ) -> FileWriter:
        """Open a file, a new one with mode 0666 less the umask; errors may come as late as its end.

        Args:
            path: where.
            append: write after what is there, and cut nothing.
            make_parents: make missing directories.
            size: how much will come, if known: a full disk is then found before anything changes.
        """

    @abstractmethod
    async def load_state(self) -> bytes:
        """Give what `save_state` kept, nothing at first: it outlives the session's own process."""

    @abstractmethod
    async def save_state(self, state: bytes) -> None:
        """Keep some bytes, where programs inside cannot read them, as long as the workspace lives."""

    @abstractmethod
    async def close(self) -> None:
        """End every program and the place itself; idempotent."""
