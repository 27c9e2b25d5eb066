"""Calls on their way: what becomes of one when its attempt fails, for every verb.

An attempt that a closed replica refused did not run, and goes to another one at once. One that failed
is made again as far as the `Retries` of its class allow. A call keeps its slot from the first attempt
to the final outcome: it was accepted once.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any, Protocol

from apothic.backend import CallRef, InstanceRef, ItemStream
from apothic.errors import (
    ApothicError,
    InstanceLostError,
    JobCancelledError,
    RemoteError,
    RemoteTraceback,
    WaitTimeoutError,
)
from apothic.retries import Retries
from apothic.twins import in_thread

__all__ = ["AdmittedStream", "RetryingCall", "Slot", "TrackedCall", "is_retryable", "run_call"]


class Slot(Protocol):
    """A call's place among those that count as pending; `apothic.targets` gives it."""

    def enter(self) -> InstanceRef:
        """Give the instance for the next attempt; opens a replica if need be."""

    def failed(self, error: BaseException) -> bool:
        """Take note of an attempt's error; True when it was refused and another replica may run it."""

    def leave(self) -> None:
        """Give the place up; idempotent."""


def is_retryable(error: BaseException) -> bool:
    """Tell whether a policy covers ``error``: user code failed, or the instance was lost.

    Closing, bad arguments, pending limits, cancelling and time limits are final: the first three
    would fail again, and a call that ran out of time is never run twice.
    """
    if isinstance(error, ApothicError):
        # An error of ours that user code let through carries its remote traceback.
        return isinstance(error, (RemoteError, InstanceLostError)) or isinstance(
            error.__cause__, RemoteTraceback
        )
    return isinstance(error, Exception)


class _Attempts:
    """Counts the attempts of one call and says what follows a failure."""

    __slots__ = ("_policy", "_retries", "_slot")

    def __init__(self, policy: Retries, slot: Slot) -> None:
        self._policy = policy
        self._slot = slot
        self._retries = 0

    def delay_s(self, error: BaseException) -> float | None:
        """Give the seconds until the next attempt, or None when ``error`` is final."""
        if self._slot.failed(error):
            return 0.0
        if self._retries >= self._policy.max_retries or not is_retryable(error):
            return None
        self._retries += 1
        return self._policy.delay_s(self._retries)


def run_call(policy: Retries, slot: Slot, send: Callable[[InstanceRef], CallRef]) -> Any:
    """Make attempts until one gives a value or the error is final, and wait for them."""
    attempts = _Attempts(policy, slot)
    try:
        while True:
            try:
                return send(slot.enter()).result()
            except Exception as error:
                delay_s = attempts.delay_s(error)
                if delay_s is None:
                    raise
            time.sleep(delay_s)
    finally:
        slot.leave()


class RetryingCall(CallRef):
    """A submitted call that is submitted again when it fails in a way that its policy covers."""

    __slots__ = (
        "_attempts",
        "_cancelled",
        "_current",
        "_future",
        "_lock",
        "_rests",
        "_send",
        "_slot",
    )

    def __init__(self, policy: Retries, slot: Slot, send: Callable[[InstanceRef], CallRef]) -> None:
        """Submit the first attempt."""
        self._attempts = _Attempts(policy, slot)
        self._slot = slot
        self._send = send
        self._cancelled = False
        self._rests = False  # between two attempts
        self._lock = threading.Lock()
        self._future: Future[Any] = Future()
        self._current = send(slot.enter())
        self._current.future().add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        try:
            value = future.result()
        except CancelledError:
            self._fail(JobCancelledError("the call was cancelled."))
        except BaseException as error:
            delay_s = self._attempts.delay_s(error)
            with self._lock:
                again = delay_s is not None and not self._cancelled
                self._rests = again
            if not again or delay_s is None:
                self._fail(error)
            else:
                # Also without a delay: this may be a thread of the engine, and opening a replica waits.
                _scheduler.after(delay_s, self._again)
        else:
            self._slot.leave()
            _set(self._future, value, None)

    def _again(self) -> None:
        with self._lock:
            if self._cancelled:
                return
            self._rests = False
        try:
            current = self._send(self._slot.enter())
        except BaseException as error:
            self._fail(error)
            return
        with self._lock:
            self._current = current
            cancelled = self._cancelled
        current.future().add_done_callback(self._ended)
        if cancelled:
            current.cancel()

    def _fail(self, error: BaseException) -> None:
        self._slot.leave()
        _set(self._future, None, error)

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value of the attempt that succeeds, or the error of the last one."""
        try:
            return self._future.result(timeout_s)
        except FutureTimeout:
            if self._future.done():
                return self._future.result()  # the call's own error, or it ended just now
            raise WaitTimeoutError(
                f"the call has not ended after {timeout_s} s, retries included; it goes on. Wait "
                f"longer, or cancel it."
            ) from None

    def future(self) -> Future[Any]:
        """Give a future of the final outcome; who cancels it has only stopped waiting."""
        future: Future[Any] = Future()
        self._future.add_done_callback(partial(_copy, future))
        return future

    def done(self) -> bool:
        """Tell whether no attempt will follow."""
        return self._future.done()

    def cancel(self) -> None:
        """Stop the current attempt and make no other."""
        with self._lock:
            self._cancelled = True
            current, rests = self._current, self._rests
        if rests:
            self._slot.leave()
        _set(self._future, None, JobCancelledError("the call was cancelled."))
        current.cancel()

    def withdraw(self) -> None:
        """Make no other attempt, and not the current one if it has not begun."""
        with self._lock:
            self._cancelled = True
            current, rests = self._current, self._rests
        if rests:
            self._fail(JobCancelledError("the call was cancelled."))
        else:
            current.withdraw()

    @property
    def native(self) -> Any:
        """The engine's reference to the current attempt."""
        return self._current.native


class TrackedCall(CallRef):
    """A submitted call that is not retried: its outcome is looked at when somebody asks for it.

    So its value is not fetched before, or at all. Where its replica had refused it, asking sends it to
    another one; in the meantime its slot may have gone to a later call.
    """

    __slots__ = ("_again", "_cancelled", "_current", "_lock", "_settle")

    def __init__(
        self,
        current: CallRef,
        again: Callable[[], CallRef] | None,
        settle: Callable[[CallRef, BaseException | None], bool],
    ) -> None:
        """Take a submitted call over.

        Args:
            current: the call.
            again: sends it to where calls go now; None where nothing takes the place of a replica.
            settle: takes note of an outcome; True when the call was refused and can be sent again.
        """
        self._current = current
        self._again = again  # holds the arguments, which can be large
        self._settle = settle
        self._cancelled = False
        self._lock = threading.Lock()

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        left_s = timeout_s
        while True:
            current = self._current
            try:
                value = current.result(left_s)
            except Exception as error:
                # Waiting has an end of its own, which a call's own timeout is told from by `done`.
                if not current.done() or not self._is_sent_again(current, error):
                    raise
                if deadline is not None:
                    left_s = max(0.0, deadline - time.monotonic())
                continue
            self._succeeded(current)
            return value

    def _is_sent_again(self, attempt: CallRef, error: BaseException) -> bool:
        """Take note of an error; True when another attempt is under way, whoever has made it."""
        with self._lock:
            if attempt is not self._current:
                return True
            refused = self._settle(attempt, error)
            if not refused or self._again is None or self._cancelled:
                return False
            self._current = self._again()
            return True

    def _succeeded(self, attempt: CallRef) -> None:
        self._settle(attempt, None)
        self._again = None

    def future(self) -> Future[Any]:
        """Give a future of the value."""
        future: Future[Any] = Future()
        self._pass_to(future)
        return future

    def _pass_to(self, future: Future[Any]) -> None:
        current = self._current
        current.future().add_done_callback(partial(self._pass_on, future, current))

    def _pass_on(self, future: Future[Any], attempt: CallRef, outcome: Future[Any]) -> None:
        try:
            value = outcome.result()
        except CancelledError:
            _set(future, None, JobCancelledError("the call was cancelled."))
        except BaseException as error:
            if not self._settle(attempt, error):
                _set(future, None, error)
            else:
                # Opening a replica waits, and this may be a thread of the engine.
                _scheduler.after(0.0, partial(self._go_on, future, attempt, error))
        else:
            self._succeeded(attempt)
            _set(future, value, None)

    def _go_on(self, future: Future[Any], attempt: CallRef, error: BaseException) -> None:
        try:
            if self._is_sent_again(attempt, error):
                self._pass_to(future)
            else:
                _set(future, None, error)
        except BaseException as other:
            _set(future, None, other)

    def done(self) -> bool:
        """Tell whether the current attempt has ended."""
        return self._current.done()

    def cancel(self) -> None:
        """Stop the call wherever it is."""
        self._cancelled = True
        self._current.cancel()

    def withdraw(self) -> None:
        """Cancel the call if it has not begun."""
        self._cancelled = True
        self._current.withdraw()

    @property
    def native(self) -> Any:
        """The engine's own reference."""
        return self._current.native


def _copy(future: Future[Any], outcome: Future[Any]) -> None:
    error = outcome.exception()
    _set(future, None if error is not None else outcome.result(), error)


def _set(future: Future[Any], value: Any, error: BaseException | None) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        future.set_result(value) if error is None else future.set_exception(error)


class AdmittedStream(ItemStream):
    """A generator call, which is begun again as calls are as long as it has delivered no item."""

    def __init__(
        self, policy: Retries, slot: Slot, send: Callable[[InstanceRef], ItemStream]
    ) -> None:
        """Start the producer."""
        self._attempts = _Attempts(policy, slot)
        self._slot = slot
        self._send = send
        self._delivered = False
        self._closed = False
        self._stream = send(slot.enter())
        self._end = weakref.finalize(self, slot.leave)
        self._end.atexit = False

    def next_item(self) -> Any:
        """Wait for the next item."""
        try:
            while True:
                try:
                    item = self._stream.next_item()
                except Exception as error:
                    delay_s = self._delay_s(error)
                    if delay_s is None:
                        raise
                else:
                    self._delivered = True
                    return item
                time.sleep(delay_s)
                self._begin_again()
        except BaseException:
            self._end()
            raise

    async def anext_item(self) -> Any:
        """Await the next item."""
        try:
            while True:
                try:
                    item = await self._stream.anext_item()
                except Exception as error:
                    delay_s = self._delay_s(error)
                    if delay_s is None:
                        raise
                else:
                    self._delivered = True
                    return item
                await asyncio.sleep(delay_s)
                await in_thread(self._begin_again)
        except BaseException:
            self._end()
            raise

    def _delay_s(self, error: Exception) -> float | None:
        if isinstance(error, (StopIteration, StopAsyncIteration)):
            return None
        delay_s = self._attempts.delay_s(error)
        # Items that were delivered cannot be taken back.
        return None if self._delivered or self._closed else delay_s

    def _begin_again(self) -> None:
        self._stream = self._send(self._slot.enter())
        if self._closed:  # meanwhile
            self._stream.close()

    def close(self) -> None:
        """Stop the producer; idempotent."""
        self._closed = True
        self._end()
        self._stream.close()


class _Scheduler:
    """Runs functions later on one daemon thread, each on a thread of its own once it is due."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        with self._changed:
            entry = (time.monotonic() + delay_s, next(self._numbers), function)
            heapq.heappush(self._due, entry)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="apothic-retries", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    wait_s = self._due[0][0] - time.monotonic() if self._due else None
                    self._changed.wait(wait_s)
                _, _, function = heapq.heappop(self._due)
            # Submitting can wait for a container to start: later retries must not wait behind it.
            threading.Thread(target=function, name="apothic-retry", daemon=True).start()


_scheduler = _Scheduler()
