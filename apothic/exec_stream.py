"""`SandboxExecStream`: the output of one exec as it is written."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Iterator

from apothic.backend import ExecOutcome, ExecRequest, SandboxRef
from apothic.exec_request import exec_result
from apothic.sandbox_values import SandboxStreamEvent
from apothic.session_calls import SessionCalls
from apothic.twins import in_thread

__all__ = ["SandboxExecStream"]


class SandboxExecStream(Iterator[SandboxStreamEvent]):
    """The events of one `SandboxSession.exec_stream`; iterate with ``for`` or ``async for``."""

    def __init__(
        self,
        ref: SandboxRef,
        calls: SessionCalls,
        request: ExecRequest,
        stdin: bytes | None,
        memory_mb: int | None,
    ) -> None:
        """Start the program; ``calls`` counts it as under way, ``memory_mb`` is for its result."""
        self._ended = True
        self._calls = calls
        self._request = request
        self._memory_mb = memory_mb
        self._stream = ref.stream("exec_stream", request, stdin)
        self._ended = False
        self._channels = {
            "stdout": _Channel(request.max_output_bytes),
            "stderr": _Channel(request.max_output_bytes),
        }
        self._last: list[SandboxStreamEvent] = []

    def __iter__(self) -> SandboxExecStream:
        """Iterate over the events."""
        return self

    def __next__(self) -> SandboxStreamEvent:
        """Wait for the next event. What interrupts the wait, as Ctrl-C does, closes the stream.

        Raises:
            ExecTimeoutError: the program ran longer than ``timeout_s``.
        """
        if self._last:
            return self._last.pop(0)
        if self._ended:
            raise StopIteration
        try:
            item = self._stream.next_item()
        except BaseException as error:
            self._give_up(error)
            raise
        return self._event(item)

    def __aiter__(self) -> AsyncIterator[SandboxStreamEvent]:
        """Iterate over the events without blocking the event loop."""
        return self

    async def __anext__(self) -> SandboxStreamEvent:
        """Await the next event. Cancelling the task closes the stream."""
        if self._last:
            return self._last.pop(0)
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._stream.anext_item()
        except BaseException as error:
            self._give_up(error)
            raise
        return self._event(item)

    def close(self) -> None:
        """Kill the program and all it started, unless it has ended; idempotent."""
        self._last.clear()
        if not self._ended:
            self._end()
            self._stream.close()

    async def aclose(self) -> None:
        """Do what `close` does."""
        await in_thread(self.close)

    def __enter__(self) -> SandboxExecStream:
        """Give the stream."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    async def __aenter__(self) -> SandboxExecStream:
        """Give the stream."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        await self.aclose()

    def __del__(self) -> None:
        """Close it, without waiting: a collection may come at any time, on any thread."""
        if not getattr(self, "_ended", True):
            self._end()
            self._stream.abandon()

    def _give_up(self, error: BaseException) -> None:
        # What is no Exception did not come from the stream: Ctrl-C, or the task was cancelled. The
        # program runs on then. Waiting for its end would hold up what interrupts, or the event loop.
        if not isinstance(error, Exception):
            self._stream.abandon()
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._calls.leave()

    def _event(self, item: tuple[str, bytes] | ExecOutcome) -> SandboxStreamEvent:
        if not isinstance(item, ExecOutcome):
            kind, data = item
            text = self._channels[kind].add(data)
            return SandboxStreamEvent(kind=kind, text=text, data=data)  # type: ignore[arg-type]
        self._end()
        out, err = self._channels["stdout"], self._channels["stderr"]
        outcome = item._replace(stdout_truncated=out.truncated, stderr_truncated=err.truncated)
        result = exec_result(
            self._request, outcome, bytes(out.kept), bytes(err.kept), self._memory_mb
        )
        # A character that the program never finished.
        for kind, channel in self._channels.items():
            if rest := channel.rest():
                self._last.append(
                    SandboxStreamEvent(kind=kind, text=rest)  # type: ignore[arg-type]
                )
        self._last.append(
            SandboxStreamEvent(kind="exit", returncode=result.returncode, result=result)
        )
        return self._last.pop(0)


class _Channel:
    """One of the two streams on this side: decoded as it comes, kept up to a limit."""

    def __init__(self, limit: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._limit = limit
        self.kept = bytearray()
        self.truncated = False

    def add(self, data: bytes) -> str:
        room = self._limit - len(self.kept)
        self.truncated |= len(data) > room
        self.kept += data[:room]
        return self._decoder.decode(data)

    def rest(self) -> str:
        return self._decoder.decode(b"", True)
