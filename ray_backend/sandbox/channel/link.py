"""What a channel needs of the bytes below it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["ByteLink", "ByteSink"]


class ByteSink(Protocol):
    """Takes what comes over a link, on its event loop. Raises nothing."""

    def received(self, data: bytes | memoryview) -> None:
        """Take the next bytes; a view is of a buffer that the next ones overwrite."""

    def ended(self, error: Exception | None) -> None:
        """Take the end: the agent closed its stdout, or the error that broke the link."""


class ByteLink(Protocol):
    """Both directions to one agent: its stdin and its stdout."""

    def listen(self, sink: ByteSink) -> None:
        """Give ``sink`` the agent's stdout as it comes, and at last the end; called once.

        It is called and not waited for: a task that waited would cost each answer one more turn of
        the event loop.
        """

    def write(self, data: bytes) -> None:
        """Send bytes to the agent's stdin, at once or from a buffer; an error if that is closed."""

    async def drain(self) -> None:
        """Wait until the buffer is small enough for more."""

    def abort(self) -> None:
        """Drop both directions at once; idempotent, raises nothing. The end comes soon."""
