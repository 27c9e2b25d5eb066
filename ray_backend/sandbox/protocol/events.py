"""What the agent says, as values: the events that `AgentConnection.receive` gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ray_backend.sandbox.agent.constants import Capability, Channel, Stage

_MISSING = frozenset({2, 20})
"""Linux's ENOENT and ENOTDIR, whatever system this runs on."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """What ``stat`` knows; ``mode`` holds type and permissions as `stat.S_ISDIR` etc. take them."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime_ns: int
    inode: int
    device: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory; ``kind`` is its ``DT_*`` number, 0 where the system does not say."""

    name: bytes
    kind: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The agent is there and in step; ``input_window`` is what a new stream may send at first."""

    version: int
    capabilities: Capability
    input_window: int


@dataclass(frozen=True, slots=True)
class Started:
    """An exec's program runs."""

    stream: int
    pid: int


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that a program wrote, or a piece of a file."""

    stream: int
    channel: Channel
    data: bytes


@dataclass(frozen=True, slots=True)
class Listed:
    """Some names of a directory, in no order."""

    stream: int
    entries: tuple[Entry, ...]
    cost: int
    """What it took of the stream's credit."""


@dataclass(frozen=True, slots=True)
class Granted:
    """The stream's window has grown by so many bytes."""

    stream: int
    amount: int


class Exited(NamedTuple):
    """An exec's leader has ended and all it wrote has come; exactly one of the first two is set.

    Attributes:
        stream: the exec.
        status: its exit status, or None.
        signal: the signal that it died of, or None.
        core_dumped: it left a core dump.
        left_behind: processes that it started go on.
        lost: its keeper was killed from inside: how it ended is a guess, and all of it is dead.
        out_of_memory: while it ran, the kernel killed processes of the container because its memory
            was used up; not known, and False, where the container cannot see its control group.
        duration_s: from its start to its end.
    """

    stream: int
    status: int | None
    signal: int | None
    core_dumped: bool
    left_behind: bool
    lost: bool
    out_of_memory: bool
    duration_s: float


@dataclass(frozen=True, slots=True)
class Killed:
    """Nothing of the exec is alive any more; so many kills are answered by that."""

    stream: int
    answered: int = 1


@dataclass(frozen=True, slots=True)
class Opened:
    """The file that is about to be read."""

    stream: int
    stat: FileStat


@dataclass(frozen=True, slots=True)
class Done:
    """A request has ended well; ``stat`` is set for STAT and WRITE, ``link`` for a link."""

    stream: int
    stat: FileStat | None = None
    link: bytes | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A request has ended with an error; ``errno`` is Linux's number, ``stage`` says of what."""

    stream: int
    errno: int
    stage: Stage

    @property
    def exit_status(self) -> int | None:
        """What a shell gives for this: 127 no such program, 126 one that cannot be executed.

        None where the request failed for another reason than its program: its cwd, its user, a
        limit of the system, or a file operation.
        """
        if self.stage is Stage.PROGRAM:
            return 127 if self.errno in _MISSING else 126
        return 126 if self.stage is Stage.INTERPRETER else None


Event: TypeAlias = (
    Welcome | Started | Output | Listed | Granted | Exited | Killed | Opened | Done | Failed
)
