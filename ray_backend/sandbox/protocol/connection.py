"""The connection: one client's view of one agent, which ties requests and replies together."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    FRAME_BODY_MAX,
    FRAME_HEADER_BYTES,
    FRAME_TRAILER,
    FRAME_TRAILER_BYTES,
    MAGIC,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    REQUEST_MAX,
    Capability,
    Channel,
    ExecFlag,
    FrameType,
    KillFlag,
    MkdirFlag,
    RemoveFlag,
    RenameFlag,
    StatFlag,
    WriteFlag,
)
from ray_backend.sandbox.protocol import replies, requests
from ray_backend.sandbox.protocol.errors import AgentVersionError, ProtocolError
from ray_backend.sandbox.protocol.events import Event, Killed, Welcome
from ray_backend.sandbox.protocol.frames import (
    HEADER,
    FrameReader,
    encode_frame,
    encode_frames,
    encode_request,
)
from ray_backend.sandbox.protocol.streams import EXPECTED, LAST, Stream, StreamKind

_HELLO = struct.Struct(f"<H{NONCE_BYTES}s")
_WELCOME_START = MAGIC + HEADER.pack(replies.WELCOME.size, 0, FrameType.WELCOME)
_RESYNC_PADDING = bytes(FRAME_HEADER_BYTES + FRAME_BODY_MAX + FRAME_TRAILER_BYTES)
_STREAM_MAX = 2**32 - 1
# Plain numbers: what enums do with theirs shows in the time of an exec.
_FRAME_TYPES = {int(each): each for each in FrameType}
_STDIN, _TELL_START = int(ExecFlag.STDIN), int(ExecFlag.TELL_START)


class _State(enum.Enum):
    NEW = enum.auto()
    GREETING = enum.auto()
    READY = enum.auto()
    BROKEN = enum.auto()


@dataclass(slots=True)
class _Table:
    """The open streams, and the kills that wait for an answer, which may outlive their stream."""

    streams: dict[int, Stream] = field(default_factory=dict)
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
        flags = (_STDIN if stdin else 0) | (_TELL_START if tell_start else 0)
        body = requests.exec_body(flags, (stdout_credit, stderr_credit), cwd, user, argv, env)
        credit = {Channel.STDOUT: stdout_credit, Channel.STDERR: stderr_credit}
        opened = self._open(FrameType.EXEC, body, StreamKind.EXEC, credit, takes_input=stdin)
        self._table.streams[opened[0]].begun = not tell_start
        return opened

    def read(
        self, path: bytes, *, credit: int, offset: int = 0, length: int | None = None
    ) -> tuple[int, bytes]:
        """Read a file: `Opened`, `Output` on the first channel, `Done`, or `Failed`.

        Raises:
            ValueError: the path is relative, too long, or holds a NUL.
        """
        body = requests.read_body(path, credit, offset, length)
        opened = self._open(FrameType.READ, body, StreamKind.READ, {Channel.STDOUT: credit})
        self._table.streams[opened[0]].left = length
        return opened

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

        A new file gets ``mode`` less the umask 022 and is removed again if the write fails or is
        cancelled. An existing one is written over in place: it keeps inode, mode, owner and links,
        and is cut after what was written. With ``length`` the space is reserved first, so that a
        full disk is found while the old content is whole, where the file system can (ext4, XFS,
        Btrfs, tmpfs, overlays of them); otherwise a write that fails half way leaves the beginning
        of the new content over the old.

        ``flags`` change that: APPEND writes at the end, KEEP_REST does not cut, EXCLUSIVE refuses
        an existing file, MAKE_PARENTS makes missing directories. REPLACE writes another file beside
        it that takes the name at the end, with the old mode and owner, so that the old content is
        whole until the new one is; symbolic links are followed, other hard links and extended
        attributes stay with the old.

        Raises:
            ValueError: the path is relative, too long, or holds a NUL; a number is out of range;
                REPLACE with an offset, APPEND, KEEP_REST or EXCLUSIVE.
        """
        body = requests.write_body(path, flags, mode, offset, length)
        return self._open(FrameType.WRITE, body, StreamKind.WRITE, {}, takes_input=True)

    def stat(self, path: bytes, *, follow: bool = True) -> tuple[int, bytes]:
        """Look at a name: `Done` with ``stat``, and ``link`` for a link that is not followed."""
        flags = StatFlag(0) if follow else StatFlag.NO_FOLLOW
        return self._open(FrameType.STAT, requests.stat_body(path, flags), StreamKind.STAT)

    def list_directory(self, path: bytes, *, credit: int) -> tuple[int, bytes]:
        """List a directory: `Listed` until `Done`; give it credit for more than one name."""
        body = requests.list_body(path, credit)
        return self._open(FrameType.LIST, body, StreamKind.LIST, {Channel.STDOUT: credit})

    def mkdir(
        self, path: bytes, *, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> tuple[int, bytes]:
        """Make a directory: `Done`."""
        flags = MkdirFlag.PARENTS if parents else MkdirFlag(0)
        flags |= MkdirFlag.EXIST_OK if exist_ok else MkdirFlag(0)
        return self._open(FrameType.MKDIR, requests.mkdir_body(path, flags, mode))

    def remove(self, path: bytes, *, directory: bool = False) -> tuple[int, bytes]:
        """Remove a name, or an empty directory: `Done`."""
        flags = RemoveFlag.DIRECTORY if directory else RemoveFlag(0)
        return self._open(FrameType.REMOVE, requests.remove_body(path, flags))

    def rename(self, old: bytes, new: bytes, *, replace: bool = True) -> tuple[int, bytes]:
        """Give a file another name at once, in place of what had it: `Done`."""
        flags = RenameFlag(0) if replace else RenameFlag.NO_REPLACE
        return self._open(FrameType.RENAME, requests.rename_body(old, new, flags))

    def get_blob(self, *, credit: int) -> tuple[int, bytes]:
        """Get what `set_blob` kept, by any client, as from `read`; empty at first."""
        channel = {Channel.STDOUT: credit}
        return self._open(
            FrameType.GET_BLOB, requests.credit_only_body(credit), StreamKind.READ, channel
        )

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
        return self._open(
            FrameType.ENVIRON, requests.credit_only_body(credit), StreamKind.READ, channel
        )

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
        view = memoryview(data).cast("B")
        if len(view) > entry.window:
            raise ValueError(f"stream {stream} takes {entry.window} bytes now, not {len(view)}")
        entry.window -= len(view)
        entry.unused += len(view)
        return encode_frames(FrameType.DATA, stream, view)

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
        if channel not in entry.credit or amount <= 0:
            raise ValueError(f"stream {stream} cannot get {amount} bytes of {channel!r}")
        frame = encode_frame(FrameType.CREDIT, stream, requests.more_credit_body(channel, amount))
        entry.credit[channel] += amount
        return frame

    def kill(self, stream: int, *, grace_ms: int, discard_output: bool = False) -> bytes:
        """End everything that an exec started: SIGTERM, so much time, SIGKILL; then `Killed`.

        Also when the exec has ended: then it ends what was left behind. `Exited` comes first.

        Args:
            stream: an exec of this connection, ended or not.
            grace_ms: 0 for SIGKILL at once. A later kill can shorten an earlier one's grace.
            discard_output: want no output any more; else it has to be given credit to the end.
        """
        entry = self._find(stream)
        if entry is not None and entry.kind is not StreamKind.EXEC:
            raise ValueError(f"stream {stream} is no exec")
        flags = KillFlag.DISCARD_OUTPUT if discard_output else KillFlag(0)
        frame = encode_frame(FrameType.KILL, stream, requests.kill_body(grace_ms, flags))
        self._table.kills[stream] = self._table.kills.get(stream, 0) + 1
        return frame

    def signal(self, stream: int, number: int) -> bytes:
        """Send a signal to the process group of an exec's leader."""
        entry = self._find(stream)
        if entry is None:
            return b""
        if entry.kind is not StreamKind.EXEC or not 0 < number <= replies.SIGNAL_MAX:
            raise ValueError(f"stream {stream} is no exec, or {number} is no signal")
        return encode_frame(FrameType.SIGNAL, stream, bytes([number]))

    def cancel(self, stream: int) -> bytes:
        """Give up a read, list or write: `Failed` with ``ECANCELED``, unless it was done."""
        entry = self._find(stream)
        if entry is None:
            return b""
        if entry.kind is StreamKind.EXEC:
            raise ValueError(f"stream {stream} is an exec; kill it")
        entry.input_open = False
        return encode_frame(FrameType.CANCEL, stream)

    # What comes back.

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Give what the agent's bytes say.

        What comes before the hello is not for this client: with an agent that another one left, it
        is the end of what that one asked for. So it is skipped, like what comes before the welcome.

        Raises:
            ProtocolError: they are not what an agent says; its ``events`` holds what preceded.
        """
        events: list[Event] = []
        try:
            if self._state is _State.BROKEN:
                raise ProtocolError("the connection to the agent is broken")
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
        stream_kind: StreamKind = StreamKind.PLAIN,
        credit: dict[Channel, int] | None = None,
        *,
        takes_input: bool = False,
    ) -> tuple[int, bytes]:
        if self._state is not _State.READY:
            raise RuntimeError("the agent has not answered the hello, or the connection is broken")
        if len(body) > REQUEST_MAX:
            raise ValueError(f"a request holds at most {REQUEST_MAX} bytes, not {len(body)}")
        if self._table.last >= _STREAM_MAX:
            raise RuntimeError("this connection has used up its stream ids; make a new one")
        self._table.last += 1
        stream = self._table.last
        window = self._input_window if takes_input else 0
        self._table.streams[stream] = Stream(
            stream_kind, credit or {}, window=window, input_open=takes_input
        )
        return stream, encode_request(kind, stream, body)

    def _find(self, stream: int) -> Stream | None:
        if not 0 < stream <= self._table.last:
            raise ValueError(f"no stream {stream} was opened here")
        return self._table.streams.get(stream)

    def _greet(self, data: bytes | bytearray | memoryview, events: list[Event]) -> bytes:
        """Skip what is not for us; give what follows the welcome."""
        held = self._greeting
        held += data
        size = len(_WELCOME_START) + replies.WELCOME.size + FRAME_TRAILER_BYTES
        while (at := held.find(_WELCOME_START)) >= 0:
            del held[:at]
            if len(held) < size:
                return b""
            version, nonce, capabilities, window = replies.WELCOME.unpack_from(
                held, len(_WELCOME_START)
            )
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

    def _event(self, kind: int, stream: int, body: memoryview) -> Event:
        if kind == FrameType.FATAL and stream == 0:
            text = bytes(body[:200]).decode("utf-8", "replace")
            raise ProtocolError(f"the agent gave up on this connection: {text}")
        if kind == FrameType.KILLED:
            return self._killed(stream, body)
        entry = self._table.streams.get(stream)
        if entry is None:
            raise ProtocolError(f"a frame of type {kind:#x} for stream {stream}, which is not open")
        if kind not in EXPECTED[entry.kind]:
            raise ProtocolError(f"a frame of type {kind:#x} for a stream of {entry.kind.name}")
        try:
            event = replies.event_of(_FRAME_TYPES[kind], stream, entry, body)
        except (struct.error, ValueError) as error:
            raise ProtocolError(f"a malformed frame of type {kind:#x}: {error}") from error
        if kind in LAST:
            del self._table.streams[stream]
        return event

    def _killed(self, stream: int, body: memoryview) -> Event:
        waiting = self._table.kills.get(stream, 0)
        if stream in self._table.streams or len(body) != replies.U32.size:
            raise ProtocolError(f"an answer to a kill of stream {stream} that has no place here")
        (answered,) = replies.U32.unpack(body)
        if not 0 < answered <= waiting:
            raise ProtocolError(f"{answered} kills of stream {stream} answered, {waiting} sent")
        if answered == waiting:
            del self._table.kills[stream]
        else:
            self._table.kills[stream] = waiting - answered
        return Killed(stream, answered)
