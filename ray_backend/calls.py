"""`RayCall`, `RayStream`: the seam's references to calls under way, over ObjectRefs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray import exceptions as rays

from apothic.backend import CallRef, ItemStream
from apothic.errors import FunctionTimeoutError
from ray_backend import ray_api
from ray_backend.actors.gate import ACK_EVERY
from ray_backend.translate import was_never_sent

if TYPE_CHECKING:
    from ray_backend.instances import RayInstance

__all__ = ["RayCall", "RayStream", "Submitted"]

RESTART_S = 60.0
"""Seconds to wait for a named instance to come back before a call that never reached it fails."""


@dataclass(frozen=True)
class Submitted:
    """What is known of a call when it fails.

    Attributes:
        ref: its reference.
        timeout_s: its own limit, or None.
        since: when it was submitted, on the monotonic clock.
        in_vain: its actor was known to be dead before, so that it did not run.
    """

    ref: Any
    timeout_s: float | None
    since: float
    in_vain: bool = False


class RayCall(CallRef):
    """One call: an ObjectRef, and what it takes to send it again if it never reached the actor."""

    __slots__ = (
        "_args",
        "_cancelled",
        "_in_vain",
        "_instance",
        "_kwargs",
        "_method",
        "_overran",
        "_ref",
        "_since",
        "_timeout_s",
    )

    _sending = threading.Lock()

    def __init__(
        self,
        instance: RayInstance,
        ref: Any,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        in_vain: bool,
    ) -> None:
        """Wrap a submitted call; ``in_vain`` says that its actor was known to be dead before."""
        self._in_vain = in_vain
        self._overran: BaseException | None = None
        self._instance = instance
        self._ref = ref
        self._timeout_s = timeout_s
        self._since = time.monotonic()
        self._method = method
        # Kept only where they may be needed again: they can be large.
        again = instance.handle.named or instance.may_wait
        self._args: tuple[Any, ...] | None = args if again else None
        self._kwargs: dict[str, Any] | None = kwargs if again else None
        self._cancelled = False

    def send_anew(self) -> None:
        """Send it to the actor that its instance has now; it has not run."""
        assert self._args is not None
        assert self._kwargs is not None
        self._in_vain = False
        self._ref = self._instance.submitter(self._method)(*self._args, **self._kwargs)
        if self._cancelled:
            self._instance.cancel(self._ref.task_id().hex())

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value."""
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        give_up_at: float | None = None
        while True:
            ref = self._ref
            left_s = None if timeout_s is None else max(0.0, until - time.monotonic())
            try:
                return ray.get(ref, timeout=left_s)
            except rays.RayError as error:
                if self._is_sent_anew(ref, error):
                    continue
                if give_up_at is None:
                    give_up_at = time.monotonic() + RESTART_S
                if not self._is_to_be_sent_again(error) or time.monotonic() > give_up_at:
                    self._raise(error, timeout_s, until)
            # Its instance is between two processes.
            try:
                if self._instance.wait_for_restart(min(give_up_at, until)):
                    self._send_again(ref)
                elif time.monotonic() >= until:
                    raise rays.GetTimeoutError
            except rays.RayError as error:
                self._raise(error, timeout_s, until)

    @property
    def _submitted(self) -> Submitted:
        return Submitted(self._ref, self._timeout_s, self._since, self._in_vain)

    def _raise(self, error: BaseException, timeout_s: float | None, until: float) -> NoReturn:
        found = self._error_of(error, timeout_s, until)
        raise found from found.__cause__  # keeps the remote traceback, drops Ray's own frames

    def _error_of(
        self, error: BaseException, timeout_s: float | None = None, until: float = math.inf
    ) -> BaseException:
        if self._overran is None:
            found = self._instance.error_of(error, self._submitted, timeout_s, until)
            if not (isinstance(found, FunctionTimeoutError) and found.state_lost):
                return found
            self._overran = found  # what says so can be read once
        return copy.copy(self._overran)

    def _is_to_be_sent_again(self, error: BaseException) -> bool:
        return self._args is not None and self._instance.handle.named and was_never_sent(error)

    def _is_sent_anew(self, ref: Any, error: BaseException) -> bool:
        """Tell whether it failed only on its way to an actor that was moved before it ran."""
        if self._ref is ref:
            self._instance.go_on_if_moved(error)
        return self._ref is not ref

    def _send_again(self, ref: Any) -> None:
        """Send a call again that found its instance between two processes; once, whoever waits."""
        with self._sending:
            if self._ref is ref:
                self.send_anew()

    def future(self) -> Future[Any]:
        """Give a future of the value, its error translated."""
        future: Future[Any] = Future()
        self._finish(future)
        return future

    def _finish(self, future: Future[Any], give_up_at: float = math.inf) -> None:
        """Have a future told the value or the error, once it is there."""
        ref = self._ref

        def finish(raw: Future[Any]) -> None:
            error = raw.exception()
            if error is None:
                _set(future, raw.result(), None)
            else:
                # Ray calls this on the thread that its replies come on; asking the registry or
                # sending again from there would wait for itself.
                self._instance._client.background.submit(
                    self._finish_error, future, ref, error, give_up_at
                )

        ref.future().add_done_callback(finish)

    def _finish_error(
        self, future: Future[Any], ref: Any, error: BaseException, give_up_at: float
    ) -> None:
        """Go on after an error, holding no thread for as long as anything takes."""
        try:
            now = time.monotonic()
            if self._is_sent_anew(ref, error):
                self._finish(future)
            elif self._is_to_be_sent_again(error) and now < give_up_at:
                give_up_at = min(give_up_at, now + RESTART_S)

                def go_on(obstacle: BaseException | None) -> None:
                    try:
                        if obstacle is not None:
                            _set(future, None, self._error_of(obstacle))
                            return
                        self._send_again(ref)
                        self._finish(future, give_up_at)
                    except BaseException as other:
                        _set(future, None, other)

                self._instance.when_restarted(give_up_at, go_on)
            else:
                _set(future, None, self._error_of(error))
        except BaseException as other:
            _set(future, None, other)

    def done(self) -> bool:
        """Tell whether the value or the error is there."""
        return self.finished([self])[0]

    @classmethod
    def finished(cls, calls: Sequence[CallRef]) -> list[bool]:
        """Look at all calls in one request."""
        if calls and isinstance(calls[0], RayCall) and not calls[0]._instance.is_connected:
            return [True] * len(calls)  # they ended with their connection
        return ray_api.are_done([call.native for call in calls])

    def cancel(self) -> None:
        """Stop the call wherever it is."""
        self._cancelled = True
        if not self.done():
            self._instance.cancel(self._ref.task_id().hex())

    def withdraw(self) -> None:
        """Cancel the call if it has not begun."""
        self._cancelled = True  # one that is sent anew has not
        if not self.done():
            self._instance.cancel(self._ref.task_id().hex(), queued_only=True)

    @property
    def native(self) -> Any:
        """The ``ray.ObjectRef``."""
        return self._ref


def _set(future: Future[Any], value: Any, error: BaseException | None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


class RayStream(ItemStream):
    """The items of a streaming generator call."""

    def __init__(
        self, instance: RayInstance, send: Callable[[], Any], timeout_s: float | None, in_vain: bool
    ) -> None:
        """Start it.

        Args:
            instance: which runs it.
            send: gives a ``ray.ObjectRefGenerator`` of the actor that the instance has.
            timeout_s: the call's own limit, or None.
            in_vain: its actor was known to be dead before.
        """
        self._instance = instance
        self._send = send
        self._timeout_s = timeout_s
        self._in_vain = in_vain
        self._open = True
        self._count = 0
        self.send_anew()

    def send_anew(self) -> None:
        """Send it to the actor that its instance has now; it has not run."""
        self._generator = self._send()
        ref = self._generator._generator_ref
        self._submitted = Submitted(ref, self._timeout_s, time.monotonic(), self._in_vain)
        self._in_vain = False
        if not self._open:  # closed before it ran
            self._instance.cancel(ref.task_id().hex())

    def next_item(self) -> Any:
        """Wait for the next item."""
        while True:
            generator = self._generator
            try:
                item = ray.get(next(generator))
                self._confirm()
                return item
            except StopIteration:
                self._open = False
                raise
            except rays.RayError as error:
                if self._is_sent_anew(generator, error):
                    continue
                self._open = False
                found = self._error(error)
                raise found from found.__cause__

    async def anext_item(self) -> Any:
        """Await the next item."""
        while True:
            generator = self._generator
            try:
                item = await (await generator.__anext__())
                self._confirm()
                return item
            except StopAsyncIteration:
                self._open = False
                raise
            except rays.RayError as error:
                # Both ask the registry.
                if await asyncio.to_thread(self._is_sent_anew, generator, error):
                    continue
                self._open = False
                found = await asyncio.to_thread(self._error, error)
                raise found from found.__cause__

    def _is_sent_anew(self, generator: Any, error: rays.RayError) -> bool:
        """Tell whether it failed only on its way to an actor that was moved before it ran."""
        if self._generator is generator:
            self._instance.go_on_if_moved(error)
        return self._generator is not generator

    def _confirm(self) -> None:
        self._count += 1
        if self._count % ACK_EVERY == 0:
            task_id = self._generator._generator_ref.task_id().hex()
            self._instance.native.apothic_confirm.remote(task_id, ACK_EVERY)

    def _error(self, error: rays.RayError) -> BaseException:
        return self._instance.error_of(error, self._submitted)

    def close(self) -> None:
        """Stop the producer, also one that waits for its consumer; Ray does not do so by itself."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(Exception):
            self._instance.cancel(self._generator._generator_ref.task_id().hex())
