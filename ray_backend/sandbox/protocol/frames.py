"""Frames: how a stream of bytes is cut."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ray_backend.sandbox.agent.constants import (
    FRAME_BODY_MAX,
    FRAME_HEADER_BYTES,
    FRAME_TRAILER,
    FRAME_TRAILER_BYTES,
    FrameType,
)
from ray_backend.sandbox.protocol.errors import ProtocolError

HEADER = struct.Struct("<IIB")
"""Body length, stream id, type."""
_TRAILER = bytes([FRAME_TRAILER])


def encode_frame(kind: int, stream: int, body: bytes | bytearray | memoryview = b"") -> bytes:
    """Give one frame.

    Raises:
        ValueError: the body is longer than a frame may hold.
    """
    if len(body) > FRAME_BODY_MAX:
        raise ValueError(f"a frame holds at most {FRAME_BODY_MAX} bytes, not {len(body)}")
    return b"".join((HEADER.pack(len(body), stream, kind), body, _TRAILER))


def encode_frames(kind: int, stream: int, body: memoryview) -> bytes:
    """Give as many frames as a body needs, copying it once."""
    pieces: list[bytes | memoryview] = []
    for at in range(0, len(body), FRAME_BODY_MAX):
        piece = body[at : at + FRAME_BODY_MAX]
        pieces += (HEADER.pack(len(piece), stream, kind), piece, _TRAILER)
    return b"".join(pieces)


class FrameReader:
    """Cuts a byte stream into frames, however it is chopped; holds at most one of them."""

    def __init__(self) -> None:
        """Start at the beginning of a frame."""
        self._rest = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterable[tuple[int, int, memoryview]]:
        """Give (type, stream id, body) of each frame that is complete now.

        The bodies are views, of ``data`` where a frame lies in it whole.

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
                length, stream, kind = HEADER.unpack_from(view, at)
                if length > FRAME_BODY_MAX:
                    raise ProtocolError(f"a frame of {length} bytes is longer than allowed")
                start = at + FRAME_HEADER_BYTES
                stop = start + length
                if stop >= end:
                    break
                if view[stop] != FRAME_TRAILER:
                    raise ProtocolError("a frame does not end as frames do")
                at = stop + FRAME_TRAILER_BYTES
                yield kind, stream, view[start:stop]
        finally:
            self._rest += view[at:]


def encode_request(kind: FrameType, stream: int, body: bytes) -> bytes:
    """Give a request of any length: one frame, or parts and then the frame of its kind."""
    if len(body) <= FRAME_BODY_MAX:
        return encode_frame(kind, stream, body)
    view = memoryview(body)
    starts = range(0, len(body), FRAME_BODY_MAX)
    kinds = [FrameType.PART] * (len(starts) - 1) + [kind]
    return b"".join(
        encode_frame(part, stream, view[at : at + FRAME_BODY_MAX])
        for part, at in zip(kinds, starts, strict=True)
    )
