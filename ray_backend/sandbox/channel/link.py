"""What a channel needs of the bytes below it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ByteLink"]


class ByteLink(Protocol):
    """Both directions to one agent: its stdin and its stdout."""

    async def read(self) -> bytes:
        """Give the next bytes of the agent's stdout, as many as are there; nothing at the end.

        One task reads. Errors of any kind end the channel and become its cause.
        """

    def write(self, data: bytes) -> None:
        """Send bytes to the agent's stdin, at once or from a buffer; an error if that is closed."""

    async def drain(self) -> None:
        """Wait until the buffer is small enough for more."""

    def abort(self) -> None:
        """Drop both directions at once; idempotent, raises nothing. A `read` that waits ends."""
