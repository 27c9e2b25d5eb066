"""What one stream may still say: the state that replies are checked against."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from ray_backend.sandbox.agent.constants import Channel, FrameType


class StreamKind(enum.IntEnum):
    """What a stream was opened for, as far as its replies differ; numbers are found faster."""

    EXEC = enum.auto()
    READ = enum.auto()
    LIST = enum.auto()
    WRITE = enum.auto()
    STAT = enum.auto()
    PLAIN = enum.auto()


EXPECTED: Mapping[StreamKind, frozenset[FrameType]] = {
    StreamKind.EXEC: frozenset(
        {FrameType.STARTED, FrameType.OUTPUT, FrameType.GRANT, FrameType.EXIT, FrameType.ERROR}
    ),
    StreamKind.READ: frozenset(
        {FrameType.OPENED, FrameType.OUTPUT, FrameType.DONE, FrameType.ERROR}
    ),
    StreamKind.LIST: frozenset({FrameType.OUTPUT, FrameType.DONE, FrameType.ERROR}),
    StreamKind.WRITE: frozenset({FrameType.GRANT, FrameType.DONE, FrameType.ERROR}),
    StreamKind.STAT: frozenset({FrameType.DONE, FrameType.ERROR}),
    StreamKind.PLAIN: frozenset({FrameType.DONE, FrameType.ERROR}),
}
"""Which frames a stream may get; `Stream.begun` says which of them at first or later only."""

LAST = frozenset({FrameType.EXIT, FrameType.DONE, FrameType.ERROR})
"""Which frames end a stream."""


@dataclass(slots=True)
class Stream:
    """One request that has not ended.

    Attributes:
        kind: what it was opened for.
        credit: for each channel that it has, how many bytes may still come.
        window: how many bytes may be sent now.
        begun: STARTED or OPENED has come, or is not awaited.
        heard: the program has shown that it runs.
        unused: what has been sent and not been granted again: no grant can exceed it.
        input_open: its end has not been said.
        left: how much of a READ of a known length may still come.
    """

    kind: StreamKind
    credit: dict[Channel, int]
    window: int = 0
    begun: bool = False
    heard: bool = False
    unused: int = 0
    input_open: bool = False
    left: int | None = None
