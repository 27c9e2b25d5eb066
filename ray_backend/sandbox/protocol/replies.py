"""Replies as events: what the body of a frame says, checked against its stream.

Everything here comes from the container. A function raises ValueError or struct.error for a body
that is malformed or has no place; the connection makes a `ProtocolError` of that.
"""

from __future__ import annotations

import struct

from ray_backend.sandbox.agent.constants import (
    NONCE_BYTES,
    PATH_MAX_BYTES,
    STAT_BYTES,
    Channel,
    ExitFlag,
    FrameType,
    Stage,
)
from ray_backend.sandbox.protocol.events import (
    Done,
    Entry,
    Event,
    Exited,
    Failed,
    FileStat,
    Granted,
    Listed,
    Opened,
    Output,
    Started,
)
from ray_backend.sandbox.protocol.streams import Stream, StreamKind

WELCOME = struct.Struct(f"<H{NONCE_BYTES}sII")
U32 = struct.Struct("<I")
_EXIT = struct.Struct("<BBQ")
_ERROR = struct.Struct("<IB")
STAT = struct.Struct("<IIIIQqQQ")
_ENTRY = struct.Struct("<BH")
_ERRNO_MAX = 4095
SIGNAL_MAX = 64
# Plain numbers: what enums do with theirs shows in the time of an exec.
_EXIT_BITS = sum(map(int, ExitFlag))
_SIGNALED, _CORE, _LEFT_BEHIND, _LOST, _OUT_OF_MEMORY = map(
    int,
    (
        ExitFlag.SIGNALED,
        ExitFlag.CORE,
        ExitFlag.LEFT_BEHIND,
        ExitFlag.LOST,
        ExitFlag.OUT_OF_MEMORY,
    ),
)


def event_of(kind: FrameType, stream: int, entry: Stream, body: memoryview) -> Event:
    """Give the event of a frame that this kind of stream may get, and note what it changes."""
    if kind is FrameType.OUTPUT:
        return _output(stream, entry, body)
    if kind is FrameType.GRANT:
        (amount,) = U32.unpack(body)
        if not 0 < amount <= entry.unused:
            raise ValueError(f"{amount} bytes granted, {entry.unused} used")
        entry.unused -= amount
        entry.window += amount
        return Granted(stream, amount)
    if kind is FrameType.STARTED:
        (pid,) = U32.unpack(body)
        _begin(entry)
        entry.heard = True
        if pid == 0:
            raise ValueError("no process id")
        return Started(stream, pid)
    if kind is FrameType.OPENED:
        _begin(entry)
        return Opened(stream, FileStat(*STAT.unpack(body)))
    if kind is FrameType.ERROR:
        return _failed(stream, entry, body)
    if kind is FrameType.EXIT:
        if not entry.begun:
            raise ValueError("an end before the start")
        return _exited(stream, body)
    return _done(stream, entry, body)


def _output(stream: int, entry: Stream, body: memoryview) -> Event:
    channel = Channel(body[0]) if body else None
    if channel is None or channel not in entry.credit or len(body) == 1:
        raise ValueError("output on no channel, or none at all")
    if not entry.begun and entry.kind is not StreamKind.LIST:
        raise ValueError("output before the start")
    size = len(body) - 1
    if size > entry.credit[channel]:
        raise ValueError(f"{size} bytes of output, {entry.credit[channel]} asked for")
    if entry.left is not None:
        if size > entry.left:
            raise ValueError(f"{size} bytes of a file, {entry.left} asked for")
        entry.left -= size
    entry.credit[channel] -= size
    entry.heard = True
    if entry.kind is StreamKind.LIST:
        return Listed(stream, _entries(body), size)
    return Output(stream, channel, bytes(body[1:]))


def _begin(entry: Stream) -> None:
    if entry.begun:
        raise ValueError("a second start")
    entry.begun = True


def _failed(stream: int, entry: Stream, body: memoryview) -> Failed:
    number, stage = _ERROR.unpack(body)
    if not 0 < number <= _ERRNO_MAX or (entry.heard and entry.kind is StreamKind.EXEC):
        raise ValueError(f"error {number} has no place here")
    return Failed(stream, number, Stage(stage))


def _done(stream: int, entry: Stream, body: memoryview) -> Done:
    if entry.kind is StreamKind.STAT:
        if len(body) > STAT_BYTES + PATH_MAX_BYTES:
            raise ValueError("a link that is too long")
        stat = FileStat(*STAT.unpack(body[:STAT_BYTES]))
        return Done(stream, stat, bytes(body[STAT_BYTES:]) or None)
    if entry.kind is StreamKind.WRITE:
        if entry.input_open:
            raise ValueError("an end before its end was said")
        return Done(stream, FileStat(*STAT.unpack(body)))
    if entry.kind is StreamKind.READ and not entry.begun:
        raise ValueError("an end before the start")
    if body:
        raise ValueError("an end that holds something")
    return Done(stream)


def _exited(stream: int, body: memoryview) -> Exited:
    bits, value, duration_ns = _EXIT.unpack(body)
    if bits & ~_EXIT_BITS:
        raise ValueError(f"flags {bits:#x}")
    signaled = bool(bits & _SIGNALED)
    if signaled and not 0 < value <= SIGNAL_MAX:
        raise ValueError(f"signal {value}")
    return Exited(
        stream,
        status=None if signaled else value,
        signal=value if signaled else None,
        core_dumped=bool(bits & _CORE),
        left_behind=bool(bits & _LEFT_BEHIND),
        lost=bool(bits & _LOST),
        out_of_memory=bool(bits & _OUT_OF_MEMORY),
        duration_s=duration_ns / 1e9,
    )


def _entries(body: memoryview) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    at = 1
    while at < len(body):
        kind, length = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        name = bytes(body[at : at + length])
        at += length
        # A name that leads elsewhere would be used as a path by somebody, some day.
        if len(name) != length or not name or b"/" in name or b"\0" in name:
            raise ValueError(f"a directory cannot hold {name[:80]!r}")
        if name in (b".", b".."):
            raise ValueError(f"{name!r} is no entry")
        entries.append(Entry(name, kind))
    return tuple(entries)
