"""`SessionCalls`: a session's verbs on their way to it: how many there may be, and files in parts."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from apothic.backend import CallRef, SandboxRef
from apothic.errors import PendingTasksExceededError, SandboxClosedError
from apothic.session_arguments import to_text
from apothic.steps import END, Steps

__all__ = ["PARTS_IN_FLIGHT", "PART_BYTES", "SessionCalls"]

PART_BYTES = 4 * 1024 * 1024
"""Files up to this size travel in one call, longer ones in parts of it."""

PARTS_IN_FLIGHT = 3
"""Parts that an upload sends ahead of their confirmation: 12 MiB at most."""


class _Pending:
    """How many verbs this process has under way in one session, through whichever objects."""

    __slots__ = ("__weakref__", "_count", "_lock")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._count = 0
        self._lock = threading.RLock()  # the garbage collector can end a stream anywhere

    def enter(self, limit: int) -> int:
        """Count one more if that makes no more than ``limit``; give how many there were."""
        with self._lock:
            count = self._count
            if count < limit:
                self._count = count + 1
            return count

    def leave(self) -> None:
        with self._lock:
            if self._count:  # in a fork, one of the parent's may end, which is not counted there
                self._count -= 1


_pending: weakref.WeakValueDictionary[Hashable, _Pending] = weakref.WeakValueDictionary()
"""By the session's identity; the objects of a session keep its count, and nothing else does."""

_pending_lock = threading.RLock()


def _pending_of(ref: SandboxRef) -> _Pending:
    identity = ref.identity
    with _pending_lock:
        found = _pending.get(identity)
        if found is None:
            _pending[identity] = found = _Pending()
        return found


def _begin_in_fork() -> None:
    """Count from nothing: what the parent waits for is not this process's, nor who held a lock here."""
    global _pending_lock
    _pending_lock = threading.RLock()
    for pending in list(_pending.values()):
        pending.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_fork)


class SessionCalls:
    """What an object of a session has under way there; those of one session count together."""

    def __init__(self, ref: SandboxRef, *, label: str, max_pending: int) -> None:
        """Start with nothing under way.

        Args:
            ref: the session as the engine reaches it.
            label: names it in messages.
            max_pending: unfinished verbs of this process beyond which the next is refused.
        """
        self._ref = ref
        self._label = label
        self._max_pending = max_pending
        self._pending = _pending_of(ref)
        self._lock = threading.Lock()
        self._closing = False
        self.closed: bool = False

    def close(self) -> bool:
        """Refuse every further verb; False where somebody has closed the session or is about to."""
        with self._lock:
            first, self._closing = not self._closing, True
            self.closed = True
        return first

    def close_failed(self) -> None:
        """Have the next `close` give True again; verbs stay refused."""
        self._closing = False

    def check_open(self) -> None:
        """Refuse a verb of a session that this process has closed.

        Raises:
            SandboxClosedError: it has.
        """
        if self.closed:
            raise SandboxClosedError(
                f"{self._label} is closed: this process closed it. Open another session."
            )

    def enter(self) -> None:
        """Count a verb that begins.

        Raises:
            SandboxClosedError: the session is closed.
            PendingTasksExceededError: too many are unfinished.
        """
        self.check_open()
        count = self._pending.enter(self._max_pending)
        if count >= self._max_pending:
            raise PendingTasksExceededError(
                f"{self._label} has {count} unfinished verbs of this process, of "
                f"max_pending_tasks={self._max_pending} that it may have. Wait for some, close streams, "
                f"or raise max_pending_tasks."
            )

    def leave(self) -> None:
        """Count a verb that has ended."""
        self._pending.leave()

    def ask(self, name: str, *args: Any) -> Steps[Any]:
        """Have a verb done and give what it gives."""
        self.enter()
        try:
            return (yield self._ref.call(name, *args))
        finally:
            self.leave()

    def read(self, path: bytes) -> Steps[bytes]:
        """Give a whole file."""
        data: bytes | None = yield from self.ask("read", path, PART_BYTES)
        if data is not None:
            return data
        pieces: list[bytes] = []
        yield from self.stream_to(path, pieces.append)
        return b"".join(pieces)

    def stream_to(self, path: bytes, take: Callable[[bytes], object]) -> Steps[None]:
        """Hand a file over in pieces."""
        self.enter()
        try:
            stream = self._ref.stream("read_stream", path)
            try:
                while (piece := (yield stream)) is not END:
                    take(piece)
            except Exception:
                stream.close()
                raise
            except BaseException:
                stream.abandon()  # closing could hold up what interrupts, or the event loop
                raise
        finally:
            self.leave()

    def write(
        self, path: bytes, content: bytes | bytearray | memoryview, append: bool, make_parents: bool
    ) -> Steps[str]:
        """Write a whole file; give its absolute path."""
        view = memoryview(content).cast("B")
        if len(view) <= PART_BYTES:
            written = yield from self.ask(
                "write", path, bytes(content), bool(append), bool(make_parents)
            )
            return to_text(written)
        parts = (view[at : at + PART_BYTES] for at in range(0, len(view), PART_BYTES))
        return (yield from self.send_parts(path, parts, len(view), append, make_parents))

    def send_parts(
        self,
        path: bytes,
        parts: Iterator[bytes | memoryview],
        size: int,
        append: bool,
        make_parents: bool,
    ) -> Steps[str]:
        """Send the parts of a file, a few ahead of their confirmation; give its absolute path."""
        self.enter()
        try:
            upload: str = yield self._ref.call(
                "upload_begin", path, size, bool(append), bool(make_parents)
            )
            waiting: list[CallRef] = []
            try:
                offset = 0
                for part in parts:
                    waiting.append(self._ref.call("upload_part", upload, offset, part))
                    offset += len(part)
                    if len(waiting) >= PARTS_IN_FLIGHT:
                        yield waiting.pop(0)
                while waiting:
                    yield waiting.pop(0)
                return to_text((yield self._ref.call("upload_end", upload)))
            except BaseException:
                # Not waited for: it may be because the session is gone that we are here.
                with contextlib.suppress(Exception):
                    self._ref.call("upload_abort", upload)
                raise
        finally:
            self.leave()
