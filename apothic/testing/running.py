"""Calls of the in-process engine: how they begin, are interrupted and end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any, Literal

from apothic.errors import JobCancelledError, RemoteError, RemoteTraceback
from apothic.inprocess import format_error
from apothic.packing import dumps, loads
from apothic.tracebacks import text_of
from apothic.values import MethodInfo

__all__ = [
    "GRACE_S",
    "Call",
    "Feed",
    "Interrupted",
    "Threads",
    "Watch",
    "travelled",
]

GRACE_S = 1.0
"""Seconds that an interrupted call gets to end before its instance is replaced."""

_AHEAD = 256
"""Items that a generator may be ahead of its consumer."""

# Raised again in the caller these would end its thread or its loop, so they arrive as RemoteError.
_CONTROL_FLOW = (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, StopAsyncIteration)

Reason = Literal["timeout", "cancelled", "closed"]


class Interrupted(BaseException):
    """Raised inside a call whose time is up, which was cancelled, or whose instance closes."""


class Call:
    """One call. Its future counts as running from the start: cancelling goes through `interrupt`."""

    def __init__(self, label: str, method: MethodInfo, timeout_s: float, watch: Watch) -> None:
        """Describe a call that waits."""
        self.label: str = f"{label}: {method.name}"
        self.method = method
        self.timeout_s = timeout_s
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()
        self.feed: Feed | None = (
            Feed(lambda: self.interrupt("cancelled")) if method.is_generator else None
        )
        self.interrupted: Reason | None = None
        self.begun: bool = False
        self.wake: threading.Event = threading.Event()
        self.on_stuck: Callable[[Call], None] = lambda _: None
        self._watch = watch
        self._remaining_s = timeout_s
        self._since: float | None = None
        self._lock = threading.Lock()
        self._thread_id: int | None = None
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    # -- on the call's own thread or loop -------------------------------------------------------

    def begin(self, task: asyncio.Task[Any] | None = None) -> bool:
        """Let the call run; False when it was stopped before."""
        with self._lock:
            if self.interrupted is not None or self.future.done():
                return False
            self.begun = True
            if task is not None:
                self._task = (asyncio.get_running_loop(), task)
            return True

    def enter_code(self) -> None:
        """Start the clock; raise `Interrupted` when the call is to stop."""
        self._since = time.monotonic()
        self._watch.after(self._remaining_s, self, lambda: self.interrupt("timeout"))
        # The last step: from here on an exception can strike this thread anywhere, and one that
        # strikes in the Python code of a Condition would leave it locked for ever.
        with self._lock:
            if self.interrupted is not None:
                raise Interrupted
            if self._task is None:
                self._thread_id = threading.get_ident()
                _by_thread[self._thread_id] = self

    def leave_code(self) -> None:
        """Stop the clock; nothing strikes this thread afterwards. Idempotent.

        It may itself be struck once, so it is called again where the call has failed.
        """
        with self._lock:
            if self._thread_id is not None:
                _by_thread.pop(self._thread_id, None)
                _set_async_exc(self._thread_id, None)
                self._thread_id = None
        if self._since is not None:
            self._remaining_s = max(0.0, self._remaining_s - (time.monotonic() - self._since))
            self._since = None
        self._watch.forget(self)

    # -- anywhere -------------------------------------------------------------------------------

    def interrupt(self, reason: Reason) -> None:
        """Stop the call wherever it is."""
        with self._lock:
            if self.interrupted is not None or self.future.done():
                return
            self.interrupted = reason
            waits = not self.begun
            self._strike()
        if waits:
            self.fail(JobCancelledError(f"{self.label} was cancelled."))
            return
        if self.feed is not None:
            self.feed.shut()
        if reason != "closed":  # an instance that closes anyway is not replaced
            self._watch.after(GRACE_S, self, self._check_stuck)

    def withdraw(self) -> None:
        """Stop the call if it has not begun."""
        with self._lock:
            if self.begun or self.interrupted is not None:
                return
            self.interrupted = "cancelled"
        self.fail(JobCancelledError(f"{self.label} was cancelled."))

    def abandon(self, error: BaseException) -> None:
        """Give the error at once, and stop the code that may still run."""
        self.fail(error)
        with self._lock:
            self.interrupted = self.interrupted or "closed"
            self._strike()
        if self.feed is not None:
            self.feed.shut()

    def _strike(self) -> None:
        if self._task is not None:
            loop, task = self._task
            loop.call_soon_threadsafe(task.cancel)
        elif self._thread_id is not None:
            _set_async_exc(self._thread_id, Interrupted)
            self.wake.set()

    def _check_stuck(self) -> None:
        if self._since is not None:  # a generator that cleans up is outside the clock, and may
            self.on_stuck(self)

    def succeed(self, value: Any) -> None:
        """Give the value, if nobody waits for an error instead."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(value)
        if self.feed is not None:
            self.feed.end(None)

    def fail(self, error: BaseException) -> None:
        """Give the error, if there is no outcome yet."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
        if self.feed is not None:
            self.feed.end(error)


class Feed(Iterator[Any]):
    """The items of a generator call, from the thread that makes them to whoever iterates."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """Start empty; ``stop`` interrupts the producer."""
        self._stop = stop
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._shut = False

    def put(self, item: Any) -> bool:
        """Add an item once there is room; False when nobody wants it."""
        with self._changed:
            self._changed.wait_for(lambda: self._shut or len(self._items) < _AHEAD)
            if not self._shut:
                self._items.append(item)
            self._changed.notify_all()
            return not self._shut

    def end(self, error: BaseException | None) -> None:
        """Note that no item will follow."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def shut(self) -> None:
        """Let a producer that waits for room go: it is to stop."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the producer; idempotent."""
        self.shut()
        self.end(None)
        self._stop()

    def __next__(self) -> Any:
        """Wait for an item."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration


class Threads:
    """A few daemon threads that take work from one queue, in its order."""

    def __init__(self, count: int, name: str) -> None:
        """Start them."""
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=name, daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue some work; give a future of its value."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                value = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        self._queue.put(run)
        return future

    def stop(self, *, wait: bool) -> None:
        """End them after the work that is queued."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads if wait else ():
            if thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


class Watch:
    """One thread that does something to a call later, unless told to forget it."""

    def __init__(self) -> None:
        """Start nothing yet; the first call does."""
        self._due: dict[Call, tuple[float, Callable[[], None]]] = {}
        self._changed = threading.Condition()
        self._wake_at = 0.0
        self._thread: threading.Thread | None = None
        self._stopped = False

    def after(self, delay_s: float, call: Call, action: Callable[[], None]) -> None:
        """Do ``action`` then; it takes the place of what was to be done to this call."""
        with self._changed:
            at = time.monotonic() + delay_s
            self._due[call] = (at, action)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="apothic-fake-watch", daemon=True
                )
                self._thread.start()
            if at < self._wake_at:
                self._changed.notify_all()

    def forget(self, call: Call) -> None:
        """Do nothing to this call."""
        with self._changed:
            self._due.pop(call, None)

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                due = [call for call, (at, _) in self._due.items() if at <= now]
                actions = [self._due.pop(call)[1] for call in due]
                if self._stopped:
                    return
                if not actions:
                    self._wake_at = min((at for at, _ in self._due.values()), default=now + 3600)
                    self._changed.wait(min(self._wake_at - now, threading.TIMEOUT_MAX))
                    self._wake_at = 0.0
            for action in actions:
                action()


# -- exceptions on their way to the caller ------------------------------------------------------


def travelled(error: BaseException) -> Exception:
    """Give an exception as it arrives: itself after pickling, or a `RemoteError` in its place."""
    trace = format_error(error)
    if isinstance(error, Exception) and not isinstance(error, _CONTROL_FLOW):
        try:
            back = loads(dumps(error))
            same = type(back) is type(error) and str(back) == str(error)
        except Exception:
            same = False
        if same:
            back.__cause__ = RemoteTraceback(trace)
            return back  # type: ignore[no-any-return]  # it is of the type of `error`
    kind = type(error)
    return RemoteError(f"{kind.__module__}.{kind.__qualname__}", text_of(error), trace)


# -- interrupting threads -----------------------------------------------------------------------

_by_thread: dict[int, Call] = {}


def _set_async_exc(thread_id: int, exception: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), None if exception is None else ctypes.py_object(exception)
    )


_plain_sleep = time.sleep
_sleep_users = 0
_sleep_lock = threading.Lock()


def _sleep(seconds: float, /) -> None:
    call = _by_thread.get(threading.get_ident())
    if call is None or not isinstance(seconds, (int, float)) or seconds < 0:
        _plain_sleep(seconds)
    else:
        call.wake.wait(min(seconds, threading.TIMEOUT_MAX))


def interruptible_sleep(wanted: bool) -> None:
    """Count the engines in whose calls `time.sleep` ends when the call is interrupted.

    The C function goes on sleeping when an exception is set in its thread. Outside calls it stays
    what it was, and after the last engine, too.
    """
    global _plain_sleep, _sleep_users
    with _sleep_lock:
        _sleep_users += 1 if wanted else -1
        if wanted and _sleep_users == 1:
            _plain_sleep = time.sleep
            time.sleep = _sleep  # type: ignore[assignment]  # it takes what the other takes
        elif not wanted and _sleep_users == 0 and time.sleep is _sleep:
            time.sleep = _plain_sleep
