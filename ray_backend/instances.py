"""`RayInstance`, `RayCall`, `RayStream`: the seam's references, over actor handles and ObjectRefs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray import exceptions as rays

from apothic.backend import CallRef, InstanceRef, ItemStream, StartRequest, version_lacks
from apothic.errors import (
    FunctionTimeoutError,
    InstanceClosedError,
    InstanceLostError,
    PlacementError,
    SerializationError,
    UsageError,
)
from apothic.values import ClassInstanceHandle, CloseReport, InstanceInfo, MethodInfo
from ray_backend import ray_api
from ray_backend.actors.compile import actor_method_name
from ray_backend.actors.gate import ACK_EVERY, CONSUMER_KEY
from ray_backend.actors.host import TIMEOUT_KEY
from ray_backend.translate import translate, was_never_sent

if TYPE_CHECKING:
    from ray_backend.client import RayClient
    from ray_backend.placement.live import Placement

__all__ = ["RayCall", "RayInstance", "RayStream"]

RESTART_S = 60.0
"""Seconds to wait for a named instance to come back before a call that never reached it fails."""

_RETRY_STEP_S = 0.05


class RayInstance(InstanceRef):
    """A live instance: its actor, and how to call it."""

    def __init__(
        self, client: RayClient, handle: ClassInstanceHandle, actor: Any, ready: bool
    ) -> None:
        """Wrap an actor handle; ``ready`` says that its ``enter`` is known to have finished."""
        self._client = client
        self._handle = handle
        self._actor = actor
        self._ready = ready
        self.request: StartRequest | None = None
        self.placement: Placement | None = None  # of an actor that this process made
        self._may_wait = False  # it may still be moved to where there is room
        self._sent_early: list[RayCall | RayStream] = []  # before it is known to have room
        self._sending = threading.RLock()
        self.failure: PlacementError | None = None  # why it never had room
        self.label = f"{handle.app}.{handle.cls} {handle.instance_id!r}"
        self._submitters: dict[str, Callable[..., Any]] = {}
        self._waiting: list[Callable[[BaseException | None], None]] = []
        self._waiting_lock = threading.Lock()

    @property
    def handle(self) -> ClassInstanceHandle:
        """Where it is."""
        return self._handle

    @property
    def native(self) -> Any:
        """The Ray actor handle."""
        return self._actor

    @property
    def may_wait(self) -> bool:
        """Whether it may still be moved to where there is room."""
        return self._may_wait

    def is_same(self, other: InstanceRef) -> bool:
        """Compare the actors; one that was moved is another until it is followed."""
        return isinstance(other, RayInstance) and self._actor._actor_id == other._actor._actor_id

    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> CallRef:
        """Submit a call; arguments go to Ray natively, so that large arrays are not copied."""
        if timeout_s is not None:
            kwargs = {**kwargs, TIMEOUT_KEY: timeout_s}
        self.submitter(method.name)  # says here that there is none
        in_vain = self.is_known_dead
        try:
            with self._sending if self._may_wait else contextlib.nullcontext():
                ref = self.submitter(method.name)(*args, **kwargs)
                call = RayCall(self, ref, method.name, args, kwargs, timeout_s, in_vain)
                if self._may_wait:
                    self._sent_early.append(call)
            return call
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            raise self._unserializable(method, args, kwargs, error) from error

    @property
    def is_known_dead(self) -> bool:
        """Whether it had ended before what is sent to it now, which then cannot run."""
        return not self._handle.named and ray_api.is_known_dead(self._actor)

    def submitter(self, method: str) -> Callable[..., Any]:
        """Give what sends a call of a method to the actor."""
        found = self._submitters.get(method)
        if found is None:
            found = self._actor_method(method).remote
            self._submitters[method] = found
        return found

    def _actor_method(self, method: str) -> Any:
        try:
            return getattr(self._actor, actor_method_name(method))
        except AttributeError:
            raise version_lacks(self.label, method, self._handle.spec_digest) from None

    def _unserializable(
        self, method: MethodInfo, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
    ) -> Exception:
        for name, value in [*((f"#{i}", a) for i, a in enumerate(args, 1)), *kwargs.items()]:
            try:
                ray.cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
            except Exception as reason:
                return SerializationError(
                    f"{self.label}.{method.name}: argument {name} of type "
                    f"{type(value).__qualname__} cannot travel: {reason}. Pass plain data, or make "
                    f"it where it is used."
                )
        return error

    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> ItemStream:
        """Start a generator call, which stays a bounded number of items ahead."""
        if self._client.is_proxy:
            raise UsageError(
                f"{self.label}.{method.name}: generators cannot stream through a ray:// connection, "
                f"which Ray does not support. Run the program on the cluster with `ray job submit`, "
                f"or collect the items in a plain method."
            )
        kwargs = {**kwargs, CONSUMER_KEY: self._client.holder}
        if timeout_s is not None:
            kwargs[TIMEOUT_KEY] = timeout_s

        def send() -> Any:
            return self._stream_submitter(method.name)(*args, **kwargs)

        self._stream_submitter(method.name)  # says here that there is none
        in_vain = self.is_known_dead
        try:
            with self._sending if self._may_wait else contextlib.nullcontext():
                stream = RayStream(self, send, timeout_s, in_vain)
                if self._may_wait:
                    self._sent_early.append(stream)
            return stream
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            raise self._unserializable(method, args, kwargs, error) from error

    def _stream_submitter(self, method: str) -> Callable[..., Any]:
        key = f"{method}()"
        found = self._submitters.get(key)
        if found is None:
            found = self._actor_method(method).options(num_returns="streaming").remote
            self._submitters[key] = found
        return found

    def take_over(self, other: RayInstance) -> None:
        """Go on with another actor of the same name."""
        self.follow(other.native, other.placement)

    def follow(self, actor: Any, placement: Placement | None) -> None:
        """Go on with another actor; ``placement`` says where it was asked for, if we made it.

        What was on its way to one that waited for room has not run, and is sent to this one.
        """
        with self._sending:
            is_new = actor._actor_id != self._actor._actor_id
            self._actor = actor
            self.placement = placement
            self._submitters.clear()
            if is_new:
                for early in self._sent_early:
                    early.send_anew()

    def begin_waiting(self) -> None:
        """Note that it may be moved to where there is room, with the calls that are sent from now."""
        self._may_wait = True

    def end_waiting(self) -> None:
        """Note that it has its room, or never will."""
        with self._sending:
            self._may_wait = False
            self._sent_early.clear()

    def runs_version(self, spec_digest: str) -> None:
        """Note which version of its class an instance runs: one that was found may run an older one."""
        if spec_digest != self._handle.spec_digest:
            self._handle = self._handle.model_copy(update={"spec_digest": spec_digest})

    def wait_ready(self) -> None:
        """Wait for ``enter``; a failure is raised here, and nothing is left behind."""
        if not self._ready:
            self._client.wait_ready(self)
            self._ready = True

    def inspect(self) -> InstanceInfo:
        """Ask the instance itself, through its control group."""
        return self._client.inspect_instance(self._handle, self._actor, self.label)

    def close(self) -> CloseReport:
        """Stop it through the manager, which sees to it even if this process ends meanwhile."""
        return self._client.close_instance(self)

    def release(self) -> None:
        """Give up this process's lease; with the connection they have all ended."""
        if self.is_connected:
            self._client.release(self)

    @property
    def is_connected(self) -> bool:
        """Whether the connection that it was reached by is still there."""
        return self._client.is_live

    def cancel(self, task_id: str, queued_only: bool = False) -> None:
        """Stop a call that waits or runs; with ``queued_only`` leave a running one alone."""
        with contextlib.suppress(rays.RayError):
            self._actor.apothic_cancel.remote(task_id, queued_only)

    def error_of(
        self,
        error: BaseException,
        call: Submitted,
        waited_s: float | None = None,
        until: float = math.inf,
    ) -> BaseException:
        """Translate what a call raised.

        Args:
            error: what it raised.
            call: what is known of it.
            waited_s: what its caller was ready to wait.
            until: when its caller wants an answer, whatever more could be found out.
        """
        gone = isinstance(error, (rays.RayActorError, rays.ActorUnschedulableError))
        if gone and self.failure is not None:
            return type(self.failure)(
                *self.failure.args
            )  # one object raised twice mixes tracebacks
        if gone and not isinstance(error, rays.ActorUnavailableError) and self.follow_successor():
            return InstanceLostError(
                f"{self.label} lost its node and was made again on another; this call may or may not "
                f"have had effects. Call again, or give the class retries=."
            )
        found = translate(error, self.label, lambda: self._timeout_word(call, until), waited_s)
        if isinstance(found, InstanceClosedError) and gone:
            found.refused = call.in_vain
        return found

    def _timeout_word(self, call: Submitted, until: float) -> str | None:
        """Read what the process left for a call that it could only end together with itself."""
        limit_s = call.timeout_s
        if limit_s is None:
            spec = self._client.find_spec(self._handle.spec_digest)
            limit_s = 0.0 if spec is None else float(spec.options["timeout_s"])
        return self._client.take_timeout(
            call.ref.task_id().hex(),
            self._actor._actor_id.hex(),
            overdue=time.monotonic() - call.since >= limit_s,
            until=until,
        )

    def wait_for_restart(self, until: float) -> bool:
        """Wait until an instance that is coming back answers again; False when the time is over."""
        while True:
            left_s = max(0.0, until - time.monotonic())
            try:
                ray.get(self._actor.apothic_status.remote(), timeout=left_s)
                return True
            except rays.GetTimeoutError:
                return False
            except rays.ActorUnavailableError:
                if not left_s:
                    return False
                time.sleep(min(_RETRY_STEP_S, left_s))
            except (rays.RayActorError, rays.ActorUnschedulableError):
                if not self.follow_successor():
                    raise

    def when_restarted(self, until: float, then: Callable[[BaseException | None], None]) -> None:
        """Call ``then`` when an instance that is coming back answers, or the time is over.

        It gets what stands in the way for good, or None. All that wait at once share one thread.
        """
        with self._waiting_lock:
            self._waiting.append(then)
            if len(self._waiting) > 1:
                return
        threading.Thread(
            target=self._watch_restart, args=(until,), name="apothic-restart", daemon=True
        ).start()

    def _watch_restart(self, until: float) -> None:
        error: BaseException | None = None
        try:
            self.wait_for_restart(until)
        except BaseException as raised:
            error = raised
        with self._waiting_lock:
            waiting, self._waiting = self._waiting, []
        for then in waiting:
            self._client.background.submit(then, error)

    def follow_successor(self) -> bool:
        """Go on with the actor that took a dead one's place on another node; False if none does."""
        found = self._client.find_successor(self._handle, self._actor._actor_id.hex())
        if found is None:
            return False
        self.follow(found, None)
        return True

    def is_moving(self, error: BaseException) -> bool:
        """Tell whether a call failed since its actor was moved; then this goes on with the next."""
        died = isinstance(error, rays.ActorDiedError)
        return died and self._may_wait and self.failure is None and self.follow_successor()


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

    _moving = threading.Lock()

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
        return self._ref is not ref or (self._instance.is_moving(error) and self._ref is not ref)

    def _send_again(self, ref: Any) -> None:
        """Send a call again that found its instance between two processes; once, whoever waits."""
        with self._moving:
            if self._ref is ref and self._args is not None and self._kwargs is not None:
                self._ref = self._instance.submitter(self._method)(*self._args, **self._kwargs)

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
        refs = [call.native for call in calls]
        unique = list(dict.fromkeys(refs))
        ready, _ = ray.wait(unique, num_returns=len(unique), timeout=0, fetch_local=False)
        found = set(ready)
        return [ref in found for ref in refs]

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
        return self._generator is not generator or (
            self._instance.is_moving(error) and self._generator is not generator
        )

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
