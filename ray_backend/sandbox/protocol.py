"""The agent protocol, without any I/O: requests become bytes, bytes become events.

One `AgentConnection` stands for one client of one agent (``agent/wire.h`` is its other half, the
numbers of both are in `ray_backend.sandbox.agent.constants`). A frame is::

    body length u32 | stream id u32 | type u8 | body | trailer u8        little-endian

A hello and its answer are preceded by a magic. Whatever either side says before them is skipped:
a new client may attach in the middle of a frame that its predecessor began, so with ``resync`` it
first sends padding that completes any such frame, without the trailer, so that the agent throws it
away. It knows the agent's answer by a random nonce.

**Streams.** Each request opens a stream; its id is greater than every one before. Frames of the
client, and what their bodies hold after the fixed fields shown:

====================  ===========================================================================
EXEC                  flags u32, credit u32 for stdout and for stderr, argc u32, envc u32, then
                      NUL-terminated: cwd, user, argv, env
READ                  credit u32, offset u64, length u64, path
LIST, STAT, REMOVE    credit u32 (LIST) or flags u32, path
WRITE                 flags u32, mode u32, offset u64, expected length u64, path
MKDIR                 flags u32, mode u32, path
RENAME                flags u32, length of the new name u16, new name, old name
GET_BLOB, ENVIRON     credit u32
SET_BLOB              the blob
PART                  the beginning of an EXEC or SET_BLOB that is longer than a frame; nothing
                      else may come between the parts
DATA, END             input of an EXEC or contents of a WRITE; no more of it
CREDIT                channel u8, u32: so many bytes more may come on this channel
KILL                  grace in ms u32, flags u8
SIGNAL                number u8, sent to the leader's process group
CANCEL                end a READ, LIST or WRITE
====================  ===========================================================================

and of the agent:

====================  ===========================================================================
WELCOME               version u16, nonce, capabilities u32, input window u32
STARTED               process id u32, if the EXEC's flags ask for it
OUTPUT                channel u8, bytes; of a LIST: type u8, length u16, name, and so on
GRANT                 u32: so many bytes more may be sent on this stream
EXIT                  flags u8, exit status or signal u8, duration in ns u64: the end of an EXEC
KILLED                u32: so many kills are answered, nothing of the exec is alive
OPENED                stat of the file of a READ
DONE                  the end of all but an EXEC, for STAT and WRITE with a stat (mode, uid, gid,
                      nlink u32, size u64, mtime in ns i64, inode, device u64; after it, for a
                      link that was not followed, its target)
ERROR                 errno u32, stage u8: the end of a request that failed
FATAL                 text: the agent could not understand us and has dropped every stream
====================  ===========================================================================

Frames for a stream that has just ended are late, not wrong, and ignored.

**Credit.** Nobody sends what the other has not asked for: output comes as far as its channel's
credit goes, each stream and channel for itself; input is sent as far as the stream's window goes.

**Trust.** Everything that comes from the container is treated as hostile. What is not exactly as
above raises `ProtocolError`, after which the connection is unusable; it never holds more than one
frame.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from apothic.errors import ApothicError
from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    FRAME_BODY_MAX,
    FRAME_HEADER_BYTES,
    FRAME_TRAILER,
    FRAME_TRAILER_BYTES,
    LENGTH_UNKNOWN,
    MAGIC,
    NONCE_BYTES,
    PATH_MAX_BYTES,
    PROTOCOL_VERSION,
    REQUEST_MAX,
    STAT_BYTES,
    Capability,
    Channel,
    ExecFlag,
    ExitFlag,
    FrameType,
    KillFlag,
    MkdirFlag,
    RemoveFlag,
    RenameFlag,
    Stage,
    StatFlag,
    WriteFlag,
)

__all__ = [
    "AgentConnection",
    "AgentVersionError",
    "Done",
    "Entry",
    "Event",
    "Exited",
    "Failed",
    "FileStat",
    "FrameReader",
    "Granted",
    "Killed",
    "Listed",
    "Opened",
    "Output",
    "ProtocolError",
    "Started",
    "Welcome",
    "encode_frame",
]

_HEADER = struct.Struct("<IIB")
_TRAILER = bytes([FRAME_TRAILER])
_U32 = struct.Struct("<I")
_U16 = struct.Struct("<H")
_EXEC_HEAD = struct.Struct("<IIIII")
_READ_HEAD = struct.Struct("<IQQ")
_WRITE_HEAD = struct.Struct("<IIQQ")
_FLAGS_MODE = struct.Struct("<II")
_RENAME_HEAD = struct.Struct("<IH")
_CREDIT = struct.Struct("<BI")
_KILL = struct.Struct("<IB")
_HELLO = struct.Struct(f"<H{NONCE_BYTES}s")
_WELCOME = struct.Struct(f"<H{NONCE_BYTES}sII")
_EXIT = struct.Struct("<BBQ")
_ERROR = struct.Struct("<IB")
_STAT = struct.Struct("<IIIIQqQQ")
_ENTRY = struct.Struct("<BH")

_WELCOME_START = MAGIC + _HEADER.pack(_WELCOME.size, 0, FrameType.WELCOME)
_RESYNC_PADDING = bytes(FRAME_HEADER_BYTES + FRAME_BODY_MAX + FRAME_TRAILER_BYTES)
_ERRNO_MAX = 4095
_SIGNAL_MAX = 64
_CREDIT_MAX = 2**32 - 1
_EXIT_BITS = sum(ExitFlag.__members__.values())


class ProtocolError(ApothicError):
    """What came from the agent is no frame, or one that has no place here.

    Attributes:
        events: what the same bytes held before it.
    """

    def __init__(self, message: str) -> None:
        """Start with no events."""
        super().__init__(message)
        self.events: list[Event] = []


class AgentVersionError(ProtocolError):
    """The agent in the container speaks another version of the protocol."""


# --- values and events ----------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Exited:
    """An exec's leader has ended and all it wrote has come; exactly one of the first two is set.

    Attributes:
        stream: the exec.
        status: its exit status, or None.
        signal: the signal that it died of, or None.
        core_dumped: it left a core dump.
        left_behind: processes that it started go on.
        lost: its keeper was killed from inside: how it ended is a guess, and all of it is dead.
        duration_s: from its start to its end.
    """

    stream: int
    status: int | None
    signal: int | None
    core_dumped: bool
    left_behind: bool
    lost: bool
    duration_s: float


@dataclass(frozen=True, slots=True)
class Killed:
    """Nothing of the exec is alive any more."""

    stream: int


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


Event: TypeAlias = (
    Welcome | Started | Output | Listed | Granted | Exited | Killed | Opened | Done | Failed
)


# --- frames ---------------------------------------------------------------------------------------


def encode_frame(kind: int, stream: int, body: bytes | bytearray | memoryview = b"") -> bytes:
    """Give one frame.

    Raises:
        ValueError: the body is longer than a frame may hold.
    """
    if len(body) > FRAME_BODY_MAX:
        raise ValueError(f"a frame holds at most {FRAME_BODY_MAX} bytes, not {len(body)}")
    return b"".join((_HEADER.pack(len(body), stream, kind), body, _TRAILER))


class FrameReader:
    """Cuts a byte stream into frames, however it is chopped; holds at most one of them."""

    def __init__(self) -> None:
        """Start at the beginning of a frame."""
        self._rest = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterable[tuple[int, int, bytes]]:
        """Give (type, stream id, body) of each frame that is complete now.

        Raises:
            ProtocolError: this is no frame. The frames before it have been given.
        """
        source: bytes | bytearray | memoryview = data
        if self._rest:
            self._rest += data
            source, self._rest = self._rest, bytearray()
        at, end = 0, len(source)
        view = memoryview(source)
        try:
            while end - at >= FRAME_HEADER_BYTES:
                length, stream, kind = _HEADER.unpack_from(view, at)
                if length > FRAME_BODY_MAX:
                    raise ProtocolError(f"a frame of {length} bytes is longer than allowed")
                stop = at + FRAME_HEADER_BYTES + length
                if stop >= end:
                    break
                if view[stop] != FRAME_TRAILER:
                    raise ProtocolError("a frame does not end as frames do")
                body = bytes(view[at + FRAME_HEADER_BYTES : stop])
                at = stop + FRAME_TRAILER_BYTES
                yield kind, stream, body
        finally:
            self._rest += view[at:]
            view.release()


# --- the connection -------------------------------------------------------------------------------


class _Kind(enum.Enum):
    EXEC = enum.auto()
    READ = enum.auto()
    LIST = enum.auto()
    WRITE = enum.auto()
    STAT = enum.auto()
    PLAIN = enum.auto()


_EXPECTED: Mapping[_Kind, frozenset[FrameType]] = {
    _Kind.EXEC: frozenset(
        {FrameType.STARTED, FrameType.OUTPUT, FrameType.GRANT, FrameType.EXIT, FrameType.ERROR}
    ),
    _Kind.READ: frozenset({FrameType.OPENED, FrameType.OUTPUT, FrameType.DONE, FrameType.ERROR}),
    _Kind.LIST: frozenset({FrameType.OUTPUT, FrameType.DONE, FrameType.ERROR}),
    _Kind.WRITE: frozenset({FrameType.GRANT, FrameType.DONE, FrameType.ERROR}),
    _Kind.STAT: frozenset({FrameType.DONE, FrameType.ERROR}),
    _Kind.PLAIN: frozenset({FrameType.DONE, FrameType.ERROR}),
}
"""Which frames a stream may get; `_Stream.begun` says which of them at first or later only."""


@dataclass(slots=True)
class _Stream:
    kind: _Kind
    credit: dict[Channel, int]
    window: int = 0
    begun: bool = False
    """STARTED or OPENED has come, or is not awaited."""
    heard: bool = False
    """The program has shown that it runs."""
    unused: int = 0
    """What has been sent and not been granted again: no grant can exceed it."""
    input_open: bool = False


class _State(enum.Enum):
    NEW = enum.auto()
    GREETING = enum.auto()
    READY = enum.auto()
    BROKEN = enum.auto()


@dataclass(slots=True)
class _Table:
    """The open streams, and the kills that wait for an answer, which may outlive their stream."""

    streams: dict[int, _Stream] = field(default_factory=dict)
    kills: dict[int, int] = field(default_factory=dict)
    last: int = 0


class AgentConnection:
    """One client's view of one agent: give requests, send their bytes, feed what comes back.

    Methods that open a stream give its id and the bytes to send. Those that speak to an open
    stream give bytes, none when it has ended meanwhile. Nothing here waits or does I/O, and no
    method may run beside another.
    """

    def __init__(self) -> None:
        """Start before the hello."""
        self._state = _State.NEW
        self._nonce = b""
        self._greeting = bytearray()
        self._reader = FrameReader()
        self._table = _Table()
        self._input_window = 0

    @property
    def ready(self) -> bool:
        """Whether the agent has answered the hello and the connection is sound."""
        return self._state is _State.READY

    @property
    def open_streams(self) -> int:
        """How many requests have not ended; the agent serves ``STREAMS_MAX`` at once."""
        return len(self._table.streams)

    def hello(self, nonce: bytes, *, resync: bool = False) -> bytes:
        """Give what introduces this client.

        Args:
            nonce: 16 random bytes, never used before: code in the container must not know them.
            resync: another client may have spoken to this agent before. Its streams end.

        Raises:
            ValueError: the nonce has another length.
            RuntimeError: this connection has said hello already.
        """
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
        if self._state is not _State.NEW:
            raise RuntimeError("a connection says hello once; make a new one")
        self._state, self._nonce = _State.GREETING, bytes(nonce)
        frame = encode_frame(FrameType.HELLO, 0, _HELLO.pack(PROTOCOL_VERSION, nonce))
        return (_RESYNC_PADDING if resync else b"") + MAGIC + frame

    # Requests that open a stream.

    def exec(
        self,
        argv: Sequence[bytes],
        *,
        cwd: bytes,
        env: Mapping[bytes, bytes],
        user: bytes = b"",
        stdin: bool = False,
        tell_start: bool = False,
        stdout_credit: int,
        stderr_credit: int,
    ) -> tuple[int, bytes]:
        """Start a program: `Output` and `Granted` as it runs, then `Exited`; or `Failed`.

        Args:
            argv: the program, looked up in the PATH of ``env`` unless it has a slash, and its
                arguments, as they are.
            cwd: an absolute path.
            env: the whole environment. With ``user`` and without HOME, HOME is that user's.
            user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; empty: whom the agent runs as.
            stdin: input follows by `send` and `end`; else it is ``/dev/null``.
            tell_start: also give `Started`, before anything else; costs a wake-up on both sides.
            stdout_credit: bytes that may come at first.
            stderr_credit: likewise.

        Raises:
            ValueError: a string holds a NUL, a name of ``env`` is empty or holds ``=``, ``argv``
                is empty, ``cwd`` relative, or all of it longer than 8 MiB.
        """
        if not argv:
            raise ValueError("argv needs at least the program")
        if not cwd.startswith(b"/"):
            raise ValueError(f"cwd must be absolute, not {cwd!r}")
        for name in env:
            if not name or b"=" in name:
                raise ValueError(f"an environment variable cannot be called {name!r}")
        strings = [cwd, user, *argv, *(b"%s=%s" % pair for pair in env.items())]
        if any(b"\0" in string for string in strings):
            raise ValueError("arguments, environment, cwd and user cannot hold a NUL byte")
        flags = ExecFlag.STDIN if stdin else ExecFlag(0)
        flags |= ExecFlag.TELL_START if tell_start else ExecFlag(0)
        head = _EXEC_HEAD.pack(flags, stdout_credit, stderr_credit, len(argv), len(env))
        body = head + b"\0".join(strings) + b"\0"
        credit = {Channel.STDOUT: stdout_credit, Channel.STDERR: stderr_credit}
        opened = self._open(FrameType.EXEC, body, _Kind.EXEC, credit, takes_input=stdin)
        self._table.streams[opened[0]].begun = not tell_start
        return opened

    def read(
        self, path: bytes, *, credit: int, offset: int = 0, length: int | None = None
    ) -> tuple[int, bytes]:
        """Read a file: `Opened`, `Output` on the first channel, `Done`, or `Failed`.

        Raises:
            ValueError: the path is relative, too long, or holds a NUL.
        """
        size = LENGTH_UNKNOWN if length is None else length
        body = _READ_HEAD.pack(credit, offset, size) + _path(path)
        return self._open(FrameType.READ, body, _Kind.READ, {Channel.STDOUT: credit})

    def write(
        self,
        path: bytes,
        *,
        mode: int = 0o666,
        offset: int = 0,
        length: int | None = None,
        flags: WriteFlag = WriteFlag(0),  # noqa: B008 - an immutable value
    ) -> tuple[int, bytes]:
        """Write a file by `send` and `end`: `Granted` as it goes, then `Done` with its stat.

        An existing file keeps inode, mode, owner and links, and is cut after what was written
        unless ``flags`` say otherwise; a new one gets ``mode`` less the umask 022 and is removed
        again if the write fails or is cancelled. With ``length`` the space is reserved first, so
        that a full disk is found while the old content is whole.

        Raises:
            ValueError: the path is relative, too long, or holds a NUL.
        """
        size = LENGTH_UNKNOWN if length is None else length
        body = _WRITE_HEAD.pack(flags, mode, offset, size) + _path(path)
        return self._open(FrameType.WRITE, body, _Kind.WRITE, {}, takes_input=True)

    def stat(self, path: bytes, *, follow: bool = True) -> tuple[int, bytes]:
        """Look at a name: `Done` with ``stat``, and ``link`` for a link that is not followed."""
        flags = StatFlag(0) if follow else StatFlag.NO_FOLLOW
        return self._open(FrameType.STAT, _U32.pack(flags) + _path(path), _Kind.STAT)

    def list_directory(self, path: bytes, *, credit: int) -> tuple[int, bytes]:
        """List a directory: `Listed` until `Done`; give it credit for more than one name."""
        body = _U32.pack(credit) + _path(path)
        return self._open(FrameType.LIST, body, _Kind.LIST, {Channel.STDOUT: credit})

    def mkdir(
        self, path: bytes, *, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> tuple[int, bytes]:
        """Make a directory: `Done`."""
        flags = MkdirFlag.PARENTS if parents else MkdirFlag(0)
        flags |= MkdirFlag.EXIST_OK if exist_ok else MkdirFlag(0)
        return self._open(FrameType.MKDIR, _FLAGS_MODE.pack(flags, mode) + _path(path))

    def remove(self, path: bytes, *, directory: bool = False) -> tuple[int, bytes]:
        """Remove a name, or an empty directory: `Done`."""
        flags = RemoveFlag.DIRECTORY if directory else RemoveFlag(0)
        return self._open(FrameType.REMOVE, _U32.pack(flags) + _path(path))

    def rename(self, old: bytes, new: bytes, *, replace: bool = True) -> tuple[int, bytes]:
        """Give a file another name at once, in place of what had it: `Done`."""
        flags = RenameFlag(0) if replace else RenameFlag.NO_REPLACE
        head = _RENAME_HEAD.pack(flags, len(_path(new)))
        return self._open(FrameType.RENAME, head + new + _path(old))

    def get_blob(self, *, credit: int) -> tuple[int, bytes]:
        """Get what `set_blob` kept, by any client, as from `read`; empty at first."""
        channel = {Channel.STDOUT: credit}
        return self._open(FrameType.GET_BLOB, _U32.pack(credit), _Kind.READ, channel)

    def set_blob(self, blob: bytes) -> tuple[int, bytes]:
        """Let the agent keep some bytes for as long as it lives: `Done`.

        Raises:
            ValueError: more than 1 MiB.
        """
        if len(blob) > BLOB_MAX:
            raise ValueError(f"a blob holds at most {BLOB_MAX} bytes, not {len(blob)}")
        return self._open(FrameType.SET_BLOB, blob)

    def environ(self, *, credit: int) -> tuple[int, bytes]:
        """Get the container's environment as from `read`: ``NAME=value``, each ended by NUL."""
        channel = {Channel.STDOUT: credit}
        return self._open(FrameType.ENVIRON, _U32.pack(credit), _Kind.READ, channel)

    # Words to an open stream.

    def window(self, stream: int) -> int:
        """Give how many bytes `send` takes now; 0 when the stream has ended."""
        entry = self._find(stream)
        return entry.window if entry is not None and entry.input_open else 0

    def send(self, stream: int, data: bytes | bytearray | memoryview) -> bytes:
        """Give input to a program or contents to a file.

        Raises:
            ValueError: more than `window`, or a stream that takes none.
        """
        entry = self._find(stream)
        if entry is None:
            return b""
        if not entry.input_open:
            raise ValueError(f"stream {stream} takes no input, or no more of it")
        if len(data) > entry.window:
            raise ValueError(f"stream {stream} takes {entry.window} bytes now, not {len(data)}")
        entry.window -= len(data)
        entry.unused += len(data)
        view = memoryview(data)
        pieces = range(0, len(data), FRAME_BODY_MAX)
        return b"".join(
            encode_frame(FrameType.DATA, stream, view[at : at + FRAME_BODY_MAX]) for at in pieces
        )

    def end(self, stream: int) -> bytes:
        """Say that no more input comes.

        Raises:
            ValueError: a stream that takes none.
        """
        entry = self._find(stream)
        if entry is None:
            return b""
        if not entry.input_open:
            raise ValueError(f"stream {stream} takes no input, or no more of it")
        entry.input_open = False
        return encode_frame(FrameType.END, stream)

    def credit(self, stream: int, channel: Channel, amount: int) -> bytes:
        """Ask for so many bytes more; call it when as many have been dealt with.

        Raises:
            ValueError: a stream without this channel, or an amount that is not above 0.
        """
        entry = self._find(stream)
        if entry is None:
            return b""
        if channel not in entry.credit or not 0 < amount <= _CREDIT_MAX:
            raise ValueError(f"stream {stream} cannot get {amount} bytes of {channel!r}")
        entry.credit[channel] += amount
        return encode_frame(FrameType.CREDIT, stream, _CREDIT.pack(channel, amount))

    def kill(self, stream: int, *, grace_ms: int, discard_output: bool = False) -> bytes:
        """End everything that an exec started: SIGTERM, so much time, SIGKILL; then `Killed`.

        Also when the exec has ended: then it ends what was left behind. `Exited` comes first.

        Args:
            stream: an exec of this connection, ended or not.
            grace_ms: 0 for SIGKILL at once. A later kill can shorten an earlier one's grace.
            discard_output: want no output any more; else it has to be given credit to the end.
        """
        entry = self._find(stream)
        if entry is not None and entry.kind is not _Kind.EXEC:
            raise ValueError(f"stream {stream} is no exec")
        self._table.kills[stream] = self._table.kills.get(stream, 0) + 1
        flags = KillFlag.DISCARD_OUTPUT if discard_output else KillFlag(0)
        return encode_frame(FrameType.KILL, stream, _KILL.pack(grace_ms, flags))

    def signal(self, stream: int, number: int) -> bytes:
        """Send a signal to the process group of an exec's leader."""
        entry = self._find(stream)
        if entry is None:
            return b""
        if entry.kind is not _Kind.EXEC or not 0 < number <= _SIGNAL_MAX:
            raise ValueError(f"stream {stream} is no exec, or {number} is no signal")
        return encode_frame(FrameType.SIGNAL, stream, bytes([number]))

    def cancel(self, stream: int) -> bytes:
        """Give up a read, list or write: `Failed` with ``ECANCELED``, unless it was done."""
        entry = self._find(stream)
        if entry is None:
            return b""
        if entry.kind is _Kind.EXEC:
            raise ValueError(f"stream {stream} is an exec; kill it")
        entry.input_open = False
        return encode_frame(FrameType.CANCEL, stream)

    # What comes back.

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Give what the agent's bytes say.

        Raises:
            ProtocolError: they are not what an agent says; its ``events`` holds what preceded.
        """
        events: list[Event] = []
        try:
            if self._state is _State.BROKEN:
                raise ProtocolError("the connection to the agent is broken")
            if self._state is _State.NEW:
                raise ProtocolError("the agent spoke before the hello")
            if self._state is _State.GREETING:
                data = self._greet(data, events)
            if self._state is _State.READY:
                for kind, stream, body in self._reader.feed(data):
                    events.append(self._event(kind, stream, body))
        except ProtocolError as error:
            self._state = _State.BROKEN
            error.events = events
            raise
        return events

    # Inside.

    def _open(
        self,
        kind: FrameType,
        body: bytes,
        stream_kind: _Kind = _Kind.PLAIN,
        credit: dict[Channel, int] | None = None,
        *,
        takes_input: bool = False,
    ) -> tuple[int, bytes]:
        if self._state is not _State.READY:
            raise RuntimeError("the agent has not answered the hello, or the connection is broken")
        if len(body) > REQUEST_MAX:
            raise ValueError(f"a request holds at most {REQUEST_MAX} bytes, not {len(body)}")
        self._table.last += 1
        stream = self._table.last
        window = self._input_window if takes_input else 0
        self._table.streams[stream] = _Stream(
            stream_kind, credit or {}, window=window, input_open=takes_input
        )
        if len(body) <= FRAME_BODY_MAX:
            return stream, encode_frame(kind, stream, body)
        view = memoryview(body)
        starts = range(0, len(body), FRAME_BODY_MAX)
        kinds = [FrameType.PART] * (len(starts) - 1) + [kind]
        return stream, b"".join(
            encode_frame(part, stream, view[at : at + FRAME_BODY_MAX])
            for part, at in zip(kinds, starts, strict=True)
        )

    def _find(self, stream: int) -> _Stream | None:
        if not 0 < stream <= self._table.last:
            raise ValueError(f"no stream {stream} was opened here")
        return self._table.streams.get(stream)

    def _greet(self, data: bytes | bytearray | memoryview, events: list[Event]) -> bytes:
        """Skip what is not for us; give what follows the welcome."""
        held = self._greeting
        held += data
        size = len(_WELCOME_START) + _WELCOME.size + FRAME_TRAILER_BYTES
        while (at := held.find(_WELCOME_START)) >= 0:
            del held[:at]
            if len(held) < size:
                return b""
            version, nonce, capabilities, window = _WELCOME.unpack_from(held, len(_WELCOME_START))
            if nonce != self._nonce or held[size - 1] != FRAME_TRAILER:
                del held[:1]
                continue
            if version != PROTOCOL_VERSION:
                raise AgentVersionError(
                    f"the agent speaks version {version} of the protocol, this package version "
                    f"{PROTOCOL_VERSION}; recreate the session"
                )
            self._state, self._input_window = _State.READY, window
            events.append(Welcome(version, Capability(capabilities), window))
            rest = bytes(held[size:])
            held.clear()
            return rest
        del held[: max(0, len(held) - len(_WELCOME_START) + 1)]
        return b""

    def _event(self, kind: int, stream: int, body: bytes) -> Event:
        if kind == FrameType.FATAL and stream == 0:
            text = body[:200].decode("utf-8", "replace")
            raise ProtocolError(f"the agent gave up on this connection: {text}")
        if kind == FrameType.KILLED:
            return self._killed(stream, body)
        entry = self._table.streams.get(stream)
        if entry is None:
            raise ProtocolError(f"a frame of type {kind:#x} for stream {stream}, which is not open")
        if kind not in _EXPECTED[entry.kind]:
            raise ProtocolError(f"a frame of type {kind:#x} for a stream of {entry.kind.name}")
        try:
            return self._stream_event(FrameType(kind), stream, entry, body)
        except (struct.error, ValueError) as error:
            raise ProtocolError(f"a malformed frame of type {kind:#x}: {error}") from error

    def _killed(self, stream: int, body: bytes) -> Event:
        waiting = self._table.kills.get(stream, 0)
        if stream in self._table.streams or len(body) != _U32.size:
            raise ProtocolError(f"an answer to a kill of stream {stream} that has no place here")
        (answered,) = _U32.unpack(body)
        if not 0 < answered <= waiting:
            raise ProtocolError(f"{answered} kills of stream {stream} answered, {waiting} sent")
        if answered == waiting:
            del self._table.kills[stream]
        else:
            self._table.kills[stream] = waiting - answered
        return Killed(stream)

    def _stream_event(self, kind: FrameType, stream: int, entry: _Stream, body: bytes) -> Event:
        """Give the event of a frame that this kind of stream may get; ValueError: malformed."""
        if kind is FrameType.OUTPUT:
            return self._output(stream, entry, body)
        if kind is FrameType.GRANT:
            (amount,) = _U32.unpack(body)
            if not 0 < amount <= entry.unused:
                raise ValueError(f"{amount} bytes granted, {entry.unused} used")
            entry.unused -= amount
            entry.window += amount
            return Granted(stream, amount)
        if kind is FrameType.STARTED:
            (pid,) = _U32.unpack(body)
            _begin(entry)
            entry.heard = True
            if pid == 0:
                raise ValueError("no process id")
            return Started(stream, pid)
        if kind is FrameType.OPENED:
            _begin(entry)
            return Opened(stream, FileStat(*_STAT.unpack(body)))
        event = _last_event(kind, stream, entry, body)
        del self._table.streams[stream]
        return event

    def _output(self, stream: int, entry: _Stream, body: bytes) -> Event:
        channel = Channel(body[0]) if body else None
        if channel is None or channel not in entry.credit or len(body) == 1:
            raise ValueError("output on no channel, or none at all")
        if not entry.begun and entry.kind is not _Kind.LIST:
            raise ValueError("output before the start")
        size = len(body) - 1
        if size > entry.credit[channel]:
            raise ValueError(f"{size} bytes of output, {entry.credit[channel]} asked for")
        entry.credit[channel] -= size
        entry.heard = True
        if entry.kind is _Kind.LIST:
            return Listed(stream, _entries(body), size)
        return Output(stream, channel, body[1:])


def _path(path: bytes) -> bytes:
    if not path.startswith(b"/"):
        raise ValueError(f"a path must be absolute, not {path!r}")
    if b"\0" in path:
        raise ValueError(f"a path cannot hold a NUL byte: {path!r}")
    if len(path) > PATH_MAX_BYTES:
        raise ValueError(f"a path has at most {PATH_MAX_BYTES} bytes, not {len(path)}")
    return path


def _begin(entry: _Stream) -> None:
    if entry.begun:
        raise ValueError("a second start")
    entry.begun = True


def _last_event(kind: FrameType, stream: int, entry: _Stream, body: bytes) -> Event:
    """Give the event that ends a stream."""
    if kind is FrameType.ERROR:
        number, stage = _ERROR.unpack(body)
        if not 0 < number <= _ERRNO_MAX or (entry.heard and entry.kind is _Kind.EXEC):
            raise ValueError(f"error {number} has no place here")
        return Failed(stream, number, Stage(stage))
    if kind is FrameType.EXIT:
        if not entry.begun:
            raise ValueError("an end before the start")
        return _exited(stream, body)
    if entry.kind is _Kind.READ and not entry.begun:
        raise ValueError("an end before the start")
    if entry.kind is _Kind.STAT:
        if len(body) > STAT_BYTES + PATH_MAX_BYTES:
            raise ValueError("a link that is too long")
        stat = FileStat(*_STAT.unpack(body[:STAT_BYTES]))
        return Done(stream, stat, body[STAT_BYTES:] or None)
    if entry.kind is _Kind.WRITE:
        if entry.input_open:
            raise ValueError("an end before its end was said")
        return Done(stream, FileStat(*_STAT.unpack(body)))
    if body:
        raise ValueError("an end that holds something")
    return Done(stream)


def _exited(stream: int, body: bytes) -> Exited:
    bits, value, duration_ns = _EXIT.unpack(body)
    if bits & ~_EXIT_BITS:
        raise ValueError(f"flags {bits:#x}")
    flags = ExitFlag(bits)
    signaled = ExitFlag.SIGNALED in flags
    if signaled and not 0 < value <= _SIGNAL_MAX:
        raise ValueError(f"signal {value}")
    return Exited(
        stream,
        status=None if signaled else value,
        signal=value if signaled else None,
        core_dumped=ExitFlag.CORE in flags,
        left_behind=ExitFlag.LEFT_BEHIND in flags,
        lost=ExitFlag.LOST in flags,
        duration_s=duration_ns / 1e9,
    )


def _entries(body: bytes) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    at = 1
    while at < len(body):
        kind, length = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        name = body[at : at + length]
        at += length
        # A name that leads elsewhere would be used as a path by somebody, some day.
        if len(name) != length or not name or b"/" in name or b"\0" in name:
            raise ValueError(f"a directory cannot hold {name!r}")
        if name in (b".", b".."):
            raise ValueError(f"{name!r} is no entry")
        entries.append(Entry(name, kind))
    return tuple(entries)
