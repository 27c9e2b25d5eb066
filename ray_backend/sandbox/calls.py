"""Verbs of a session under way, over ObjectRefs: `RaySandboxCall`, and `RaySandboxStream`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray import exceptions as rays
from typing_extensions import override

from apothic.backend import CallRef, ItemStream
from apothic.errors import JobCancelledError
from ray_backend import ray_api
from ray_backend.sandbox.packed import pack_arguments, unpack_result
from ray_backend.sandbox.plan import ACK_EVERY
from ray_backend.translate import was_never_sent

if TYPE_CHECKING:
    from ray_backend.sandbox.references import RaySandbox

__all__ = ["RESTART_S", "RaySandboxCall", "RaySandboxStream"]

RESTART_S = 60.0
"""Seconds to wait for a named session's process to come back before a verb fails."""

CLOSE_WAIT_S = 30.0
"""Seconds that closing a stream waits for its program to be dead; the session goes on killing it."""


class RaySandboxCall(CallRef):
    """One verb: an ObjectRef, and what it takes to send it again if it never reached the actor."""

    __slots__ = ("_again", "_args", "_cancelled", "_ref", "_session", "_verb")

    _sending = threading.Lock()

    def __init__(self, session: RaySandbox, verb: str, args: tuple[Any, ...]) -> None:
        """Submit it."""
        self._session = session
        self._verb = verb
        self._again = session.handle.named
        self._cancelled = False
        packed = pack_arguments(args)
        self._args = packed if self._again else ()  # kept only where needed: they can be large
        self._ref = session.method(verb).remote(*packed)

    @override
    def result(self, timeout_s: float | None = None) -> Any:
        give_up_at: float | None = None
        while True:
            ref = self._ref
            try:
                return unpack_result(ray.get(ref, timeout=timeout_s))
            except rays.RayError as error:
                give_up_at = give_up_at or time.monotonic() + RESTART_S
                if not self._is_to_be_sent_again(error, give_up_at):
                    self._raise(error, timeout_s)
            try:
                self._session.wait_for_restart()
            except rays.RayError as error:
                self._raise(error, timeout_s)
            self._send_again(ref)

    def _is_to_be_sent_again(self, error: BaseException, give_up_at: float) -> bool:
        """Tell whether it found its session between two processes, and has not run."""
        return self._again and was_never_sent(error) and time.monotonic() < give_up_at

    def _send_again(self, ref: Any) -> None:
        """Send it to the session that is back; once, whoever waits, and not what was cancelled."""
        with self._sending:
            if self._ref is not ref:
                return
            if self._cancelled:
                raise JobCancelledError(f"{self._session.label}: the call was cancelled.")
            self._ref = self._session.method(self._verb).remote(*self._args)
        if self._cancelled:  # meanwhile
            self._session.cancel(self._ref.task_id().hex())

    def _raise(self, error: BaseException, timeout_s: float | None) -> NoReturn:
        found = self._session.error_of(error, timeout_s)
        raise found from found.__cause__

    @override
    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        self._finish(future, math.inf)
        return future

    def _finish(self, future: Future[Any], give_up_at: float) -> None:
        """Have a future told the value or the error, once it is there."""
        ref = self._ref

        def finish(raw: Future[Any]) -> None:
            error = raw.exception()
            if error is None:
                if future.set_running_or_notify_cancel():
                    future.set_result(unpack_result(raw.result()))
            else:
                # Ray calls this on the thread that its replies come on, which must not wait.
                self._session.in_background.submit(
                    self._finish_error, future, ref, error, give_up_at
                )

        ref.future().add_done_callback(finish)

    def _finish_error(
        self, future: Future[Any], ref: Any, error: BaseException, give_up_at: float
    ) -> None:
        """Go on after an error; holds a thread until the session is back, not until the verb ends."""
        try:
            if self._is_to_be_sent_again(error, give_up_at) and not future.cancelled():
                give_up_at = min(give_up_at, time.monotonic() + RESTART_S)
                self._session.wait_for_restart()
                self._send_again(ref)
                self._finish(future, give_up_at)
                return
            found: BaseException = self._session.error_of(error)
        except rays.RayError as other:
            found = self._session.error_of(other)
        except BaseException as other:
            found = other
        if future.set_running_or_notify_cancel():
            future.set_exception(found)

    @override
    def done(self) -> bool:
        return self.finished([self])[0]

    @override
    @classmethod
    def finished(cls, calls: Sequence[CallRef]) -> list[bool]:
        return ray_api.are_done([call.native for call in calls])

    @override
    def cancel(self) -> None:
        self._cancelled = True
        if not self.done():
            self._session.cancel(self._ref.task_id().hex())

    @property
    @override
    def native(self) -> Any:
        """The ``ray.ObjectRef``."""
        return self._ref


class RaySandboxStream(ItemStream):
    """The items of one verb that gives several."""

    def __init__(self, session: RaySandbox, send: Callable[[], Any]) -> None:
        """Start it; ``send`` gives a ``ray.ObjectRefGenerator``."""
        self._session = session
        self._send = send
        self._open = True
        self._count = 0
        self._begin()

    def _begin(self) -> None:
        self._generator = self._send()
        self._task_id: str = self._generator._generator_ref.task_id().hex()

    @override
    def next_item(self) -> Any:
        try:
            while True:
                try:
                    item = ray.get(next(self._generator))
                    break
                except rays.RayError as error:
                    self._go_on_after(error)
        except StopIteration:
            self._open = False
            raise
        self._confirm()
        return unpack_result(item)

    @override
    async def anext_item(self) -> Any:
        try:
            while True:
                try:
                    item = await (await self._generator.__anext__())
                    break
                except rays.RayError as error:
                    # Off the loop: it may wait to learn what became of the session.
                    going_on = self._session.in_background.submit(self._go_on_after, error)
                    await asyncio.wrap_future(going_on)
        except StopAsyncIteration:
            self._open = False
            raise
        self._confirm()
        return unpack_result(item)

    def _go_on_after(self, error: rays.RayError) -> None:
        """Begin anew where it found its session between two processes, and has not run; else fail."""
        if self._count or not self._open:
            self._fail(error)
        if not (self._session.handle.named and was_never_sent(error)):
            self._fail(error)
        try:
            self._session.wait_for_restart()
        except rays.RayError as other:
            self._fail(other)
        self._begin()
        if not self._open:  # closed meanwhile
            self._session.cancel(self._task_id)

    def _fail(self, error: rays.RayError) -> NoReturn:
        self._open = False
        found = self._session.error_of(error)
        raise found from found.__cause__

    def _confirm(self) -> None:
        self._count += 1
        if self._count % ACK_EVERY == 0:
            self._session.native.apothic_confirm.remote(self._task_id, ACK_EVERY)

    @override
    def close(self) -> None:
        """Stop the producer, also one that waits for its consumer; Ray does not do so by itself."""
        self._stop(CLOSE_WAIT_S)

    @override
    def abandon(self) -> None:
        self._stop(0.0)

    def _stop(self, wait_s: float) -> None:
        if self._open:
            self._open = False
            self._session.cancel(self._task_id, wait_s)

    def __del__(self) -> None:
        """Stop what nobody reads any more."""
        with contextlib.suppress(Exception):
            self.abandon()
