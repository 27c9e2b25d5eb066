"""Calls in user code: their deadlines, and how they are interrupted.

One thread watches. It sleeps until a deadline that a running call may have, so an ordinary call costs
it nothing: a call that starts later cannot be due sooner than one ``timeout_s`` from now.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from ray_backend.actors.gate import AsyncStreamGate, StreamGate
from ray_backend.actors.hang import HANG_GRACE_S, HangGuard

__all__ = ["ActiveCall", "CallBook", "CallInterrupted", "make_sleep_interruptible"]

Reason = Literal["timeout", "cancelled", "closed"]

REPLACE_GRACE_S = 2.0
"""Seconds that an interrupted call gets to end before its process is replaced."""


class CallInterrupted(BaseException):
    """Raised inside a call whose time is up, which was cancelled, or whose instance closes."""


class ActiveCall:
    """One call in user code."""

    __slots__ = (
        "deadline",
        "gate",
        "interrupted",
        "kill_at",
        "loop",
        "method",
        "pending_exc",
        "remaining_s",
        "slot",
        "task",
        "task_id",
        "thread_id",
        "timeout_s",
        "wake",
    )

    def __init__(self, method: str, timeout_s: float, task_id: Any) -> None:
        self.method = method
        self.timeout_s = timeout_s
        self.remaining_s = timeout_s
        self.deadline: float | None = None  # None: user code is not running at this moment
        self.kill_at: float | None = None
        self.interrupted: Reason | None = None
        self.pending_exc = False
        self.slot = -1
        self.task_id = task_id
        self.thread_id: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[Any] | None = None
        self.wake: threading.Event | None = None
        self.gate: StreamGate | AsyncStreamGate | None = None


class CallBook:
    """The running calls of one instance."""

    def __init__(
        self,
        timeout_s: float,
        replace_process: Callable[[ActiveCall], None],
        guard: HangGuard | None = None,
    ) -> None:
        """Watch calls.

        Args:
            timeout_s: the limit of calls that bring none of their own.
            replace_process: ends a process whose call cannot be interrupted.
            guard: does so where not even the watching thread can run.
        """
        self._timeout_s = timeout_s
        self._guard = guard
        self._replace_process = replace_process
        self._calls: set[ActiveCall] = set()
        self._condition = threading.Condition()
        self._watchdog: threading.Thread | None = None
        self._cancelled: set[str] = set()
        self._by_thread: dict[int, ActiveCall] = {}
        self._wake_at = 0.0
        self.closing = False
        self.finished = 0

    # -- the call's own thread or loop ------------------------------------------------------------

    def begin(self, call: ActiveCall) -> bool:
        """Let a call into user code; False when it is not to run any more."""
        with self._condition:
            if self.closing:
                return False
            if self._cancelled and self._take_cancelled(call):
                call.interrupted = "cancelled"
                return False
            self._calls.add(call)
            self._run(call)
            if self._watchdog is None:
                self._watchdog = threading.Thread(
                    target=self._watch, name="apothic-watchdog", daemon=True
                )
                self._watchdog.start()
            return True

    def end(self, call: ActiveCall) -> None:
        """Take a call out of user code."""
        with self._condition:
            self._stop_running(call)
            self._calls.discard(call)
            self.finished += 1
            if self.closing:
                self._condition.notify_all()

    def pause(self, call: ActiveCall) -> None:
        """Stop the clock of a generator that waits for its consumer."""
        with self._condition:
            self._stop_running(call)

    def resume(self, call: ActiveCall) -> bool:
        """Start the clock of a generator again; False when it is to stop."""
        with self._condition:
            if call.interrupted is not None:
                return False
            if self._cancelled and self._take_cancelled(call):
                call.interrupted = "cancelled"
                return False
            self._run(call)
            return True

    def _run(self, call: ActiveCall) -> None:
        call.deadline = time.monotonic() + call.remaining_s
        if self._guard is not None:
            self._guard.cover(call.deadline, alone=len(self._calls) == 1)
            call.slot = self._guard.note(_binary(call.task_id), call.deadline, call.timeout_s)
        if call.deadline < self._wake_at:
            self._condition.notify_all()
        if call.task is None and call.loop is None:
            call.thread_id = threading.get_ident()
            self._by_thread[call.thread_id] = call

    def _stop_running(self, call: ActiveCall) -> None:
        if call.deadline is not None:
            call.remaining_s = max(0.0, call.deadline - time.monotonic())
            call.deadline = None
            if self._guard is not None:
                self._guard.forget(call.slot)
        if call.thread_id is not None:
            self._by_thread.pop(call.thread_id, None)
            if call.pending_exc:
                # Set but not yet delivered: it must not strike whatever this thread runs next.
                call.pending_exc = False
                _set_async_exc(call.thread_id, None)

    # -- other threads ----------------------------------------------------------------------------

    def current(self) -> ActiveCall | None:
        """Give the call that this thread runs, or None."""
        return self._by_thread.get(threading.get_ident())

    @property
    def running(self) -> int:
        """How many calls are in user code."""
        return len(self._calls)

    def cancel(self, task_id: str, queued_only: bool = False) -> None:
        """Interrupt a running call, or see to it that a queued one does not run.

        Args:
            task_id: the call's.
            queued_only: leave one that runs alone; to stop native code would take its process.
        """
        with self._condition:
            for call in self._calls:
                if _hex(call.task_id) == task_id:
                    if not queued_only:
                        self._interrupt(call, "cancelled")
                    return
            self._cancelled.add(task_id)

    def confirm(self, task_id: str, count: int) -> None:
        """Pass a consumer's confirmation on to its stream."""
        with self._condition:
            found = [(c, c.gate) for c in self._calls if c.gate and _hex(c.task_id) == task_id]
        for call, gate in found:
            _where_it_runs(call, partial(gate.confirm, count))

    def close(self, grace_s: float, interrupt_s: float) -> int:
        """Refuse new calls, wait for the running ones, then interrupt them.

        Returns:
            How many had to be interrupted.
        """
        with self._condition:
            self.closing = True
            self._condition.wait_for(lambda: not self._calls, grace_s)
            late = list(self._calls)
            for call in late:
                self._interrupt(call, "closed")
            self._condition.wait_for(lambda: not self._calls, interrupt_s)
            return len(late)

    def _take_cancelled(self, call: ActiveCall) -> bool:
        task_id = _hex(call.task_id)
        if task_id in self._cancelled:
            self._cancelled.discard(task_id)
            return True
        return False

    def _interrupt(self, call: ActiveCall, reason: Reason) -> None:
        if call.interrupted is None:
            call.interrupted = reason
        call.kill_at = time.monotonic() + REPLACE_GRACE_S
        if call.loop is not None:
            task = call.task
            if task is not None:
                call.loop.call_soon_threadsafe(task.cancel)
        elif call.deadline is not None and call.thread_id is not None:
            call.pending_exc = True
            _set_async_exc(call.thread_id, CallInterrupted)
            if call.wake is not None:
                call.wake.set()
        if call.gate is not None:
            _where_it_runs(call, call.gate.shut)
        self._condition.notify_all()

    def _watch(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                stuck = None
                next_at = now + self._timeout_s
                for call in self._calls:
                    if call.kill_at is not None:
                        # One that is outside user code, or whose instance closes anyway, may stay.
                        if call.deadline is None or call.interrupted == "closed":
                            continue
                        if now >= call.kill_at:
                            stuck = call
                        next_at = min(next_at, call.kill_at)
                    elif call.deadline is not None and call.interrupted is None:
                        if now >= call.deadline:
                            self._interrupt(call, "timeout")
                            next_at = min(next_at, now + REPLACE_GRACE_S)
                        else:
                            next_at = min(next_at, call.deadline)
                if stuck is None:
                    next_at = self._tend_guard(now, next_at)
                    # The lock is held since `now`, so no call can have been missed.
                    self._wake_at = next_at
                    self._condition.wait(max(0.001, min(next_at - now, threading.TIMEOUT_MAX)))
                    self._wake_at = 0.0
                    continue
            self._replace_process(stuck)
            return

    def _tend_guard(self, now: float, next_at: float) -> float:
        """Push the guard's timer on, or take it back; give when to look next."""
        guard = self._guard
        if guard is None or not guard.fires_at:
            return next_at
        deadlines = [call.deadline for call in self._calls if call.deadline is not None]
        if deadlines:
            # This thread runs, so nobody keeps the lock: what is overdue is not for the guard.
            guard.cover(max(now + 1.0, *deadlines), alone=False)
        elif now >= guard.fires_at - HANG_GRACE_S:
            guard.rest()
            return next_at
        return min(next_at, max(now, guard.fires_at - HANG_GRACE_S))


def _where_it_runs(call: ActiveCall, action: Callable[[], None]) -> None:
    """Do something to a call's gate, which on an event loop only that loop may use."""
    if call.loop is None:
        action()
    else:
        call.loop.call_soon_threadsafe(action)


def _hex(task_id: Any) -> str:
    return task_id.hex() if hasattr(task_id, "hex") else str(task_id)


def _binary(task_id: Any) -> bytes:
    return task_id.binary() if hasattr(task_id, "binary") else b""


def _set_async_exc(thread_id: int, exception: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), None if exception is None else ctypes.py_object(exception)
    )


def make_sleep_interruptible(book: CallBook) -> None:
    """Let `time.sleep` in a call end when the call is interrupted.

    An exception set in a thread strikes only when it runs Python code again, and the C function behind
    `time.sleep` resumes until the time is over. In a call's thread the sleep waits on an event
    instead; everywhere else it stays what it was.
    """
    original = time.sleep
    if getattr(original, "__apothic__", False):
        return

    def sleep(seconds: float, /) -> None:
        call = book.current()
        if call is None or not isinstance(seconds, (int, float)) or seconds < 0:
            original(seconds)
            return
        call.wake = wake = threading.Event()
        try:
            if call.interrupted is None:
                wake.wait(min(seconds, threading.TIMEOUT_MAX))
        finally:
            call.wake = None

    sleep.__apothic__ = True  # type: ignore[attr-defined]
    sleep.__doc__ = original.__doc__
    time.sleep = sleep  # type: ignore[assignment,unused-ignore]
