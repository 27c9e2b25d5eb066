"""Calls that are tried again: the retry policy, once for waiting callers and once for jobs."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from apothic.backend import CallRef
from apothic.errors import (
    ApothicError,
    InstanceLostError,
    JobCancelledError,
    RemoteError,
    RemoteTraceback,
    WaitTimeoutError,
)
from apothic.retries import Retries

__all__ = ["RetryingCall", "is_retryable", "with_retries"]


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


def with_retries(policy: Retries, attempt: Callable[[], Any]) -> Any:
    """Run ``attempt`` until it gives a value, fails for good, or the policy is used up."""
    for number in itertools.count(1):
        try:
            return attempt()
        except Exception as error:
            if number > policy.max_retries or not is_retryable(error):
                raise
            time.sleep(policy.delay_s(number))
    raise AssertionError("unreachable")


class RetryingCall(CallRef):
    """A submitted call that is submitted again when it fails in a way that the policy covers."""

    __slots__ = ("_attempt", "_cancelled", "_current", "_future", "_lock", "_policy", "_submit")

    def __init__(self, policy: Retries, submit: Callable[[], CallRef]) -> None:
        """Submit the first attempt."""
        self._policy = policy
        self._submit = submit
        self._attempt = 1
        self._cancelled = False
        self._lock = threading.Lock()
        self._future: Future[Any] = Future()
        self._current = submit()
        self._current.future().add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        try:
            value = future.result()
        except CancelledError:
            self._fail(JobCancelledError("the call was cancelled."))
        except BaseException as error:
            with self._lock:
                again = (
                    not self._cancelled
                    and self._attempt <= self._policy.max_retries
                    and is_retryable(error)
                )
            if not again:
                self._fail(error)
                return
            delay_s = self._policy.delay_s(self._attempt)
            self._attempt += 1
            _scheduler.after(delay_s, self._again)
        else:
            self._succeed(value)

    def _again(self) -> None:
        with self._lock:
            if self._cancelled:
                return
        try:
            current = self._submit()
        except BaseException as error:
            self._fail(error)
            return
        self._current = current
        current.future().add_done_callback(self._ended)

    def _succeed(self, value: Any) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            self._future.set_result(value)

    def _fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self._future.set_exception(error)

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
        """Give a future of the final outcome."""
        return self._future

    def done(self) -> bool:
        """Tell whether no attempt will follow."""
        return self._future.done()

    def cancel(self) -> None:
        """Stop the current attempt and make no other."""
        with self._lock:
            self._cancelled = True
        self._fail(JobCancelledError("the call was cancelled."))
        self._current.cancel()

    @property
    def native(self) -> Any:
        """The engine's reference to the current attempt."""
        return self._current.native


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
