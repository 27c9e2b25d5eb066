"""`RayInstance`: the seam's reference to a live instance, over an actor handle."""

from __future__ import annotations

import contextlib
import math
import pickle
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions as rays

from apothic.backend import CallRef, InstanceRef, ItemStream, StartRequest, version_lacks
from apothic.errors import (
    InstanceClosedError,
    InstanceLostError,
    PlacementError,
    SerializationError,
    UsageError,
)
from apothic.names import actor_name
from apothic.values import ClassInstanceHandle, CloseReport, InstanceInfo, MethodInfo
from ray_backend import ray_api
from ray_backend.actors.compile import actor_method_name
from ray_backend.actors.gate import CONSUMER_KEY
from ray_backend.actors.host import TIMEOUT_KEY
from ray_backend.calls import RayCall, RayStream, Submitted
from ray_backend.moves import find_other_actor
from ray_backend.translate import translate

if TYPE_CHECKING:
    from ray_backend.lifecycle import Instances
    from ray_backend.placement.live import Placement

__all__ = ["RayInstance"]

SUCCESSOR_WAIT_S = 15.0
"""Seconds to wait for the process after one that hung, which says what became of its calls."""

_RETRY_STEP_S = 0.05


class RayInstance(InstanceRef):
    """A live instance: its actor, and how to call it."""

    def __init__(
        self, instances: Instances, handle: ClassInstanceHandle, actor: Any, ready: bool
    ) -> None:
        """Wrap an actor handle; ``ready`` says that its ``enter`` is known to have finished."""
        self._instances = instances
        self._client = instances.client
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
    def name(self) -> str:
        """The actor's name."""
        return actor_name(self._handle.app, self._handle.cls, self._handle.instance_id)

    @property
    def actor_id(self) -> str:
        """The actor's id, in hex."""
        found: str = self._actor._actor_id.hex()
        return found

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
        self.go_to(other.native, other.placement)

    def go_to(self, actor: Any, placement: Placement | None) -> None:
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
            self._instances.wait_ready(self)
            self._ready = True

    def died_at_start(self) -> bool:
        """Tell whether one that lost its process had never been ready."""
        record = self._client.registry.start_record(self.name)
        return bool(record.begun) and not record.was_ready

    def inspect(self) -> InstanceInfo:
        """Ask the instance itself, through its control group."""
        handle, actor = self._handle, self._actor
        try:
            status = ray.get(actor.apothic_status.remote())
        except rays.RayError as error:
            raise translate(error, self.label) from None
        record = {} if self._client.is_proxy else ray_api.actor_record(actor._actor_id.hex())
        spec = self._instances.find_spec(status["spec_digest"])
        return InstanceInfo(
            app=handle.app,
            cls=handle.cls,
            instance_id=handle.instance_id,
            named=handle.named,
            state=status["state"],
            spec_digest=status["spec_digest"],
            tags=spec.tags if spec else (),
            metadata=spec.metadata if spec else {},
            pid=status["pid"],
            node_id=record.get("Address", {}).get("NodeID"),
            running_calls=status["running"],
            finished_calls=status["finished"],
            restarts=record.get("NumRestarts", 0),
            started_unix_s=status["started_unix_s"],
            arguments_digest=status["arguments_digest"],
        )

    def close(self) -> CloseReport:
        """Stop it through the manager, which sees to it even if this process ends meanwhile."""
        report = self._client.manager.close(self.name, self.actor_id)
        if not report.closed and self.is_connected and self.follow_successor():
            # It was made again elsewhere, and nobody has asked it since.
            report = self._client.manager.close(self.name, self.actor_id)
        return report

    def release(self) -> None:
        """Give up this process's lease."""
        self._client.leases.release(self.name)

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
            # A new one each time: an object that is raised twice mixes its tracebacks.
            return type(self.failure)(*self.failure.args)
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
            spec = self._instances.find_spec(self._handle.spec_digest)
            limit_s = 0.0 if spec is None else float(spec.options["timeout_s"])
        overdue = time.monotonic() - call.since >= limit_s
        return self._take_timeout(call.ref.task_id().hex(), overdue=overdue, until=until)

    def _take_timeout(self, task_id: str, *, overdue: bool, until: float) -> str | None:
        """Read what a replaced process left for a call.

        A process that hung with the interpreter lock could leave none; its successor does. For a call
        that is ``overdue`` this waits until the successor is there, or none is coming, at most to the
        time ``until``.
        """
        registry, actor_id = self._client.registry, self.actor_id
        found = registry.take_timeout(task_id)
        if found is not None or not overdue or self._client.is_proxy:
            return found
        began = time.monotonic()
        while time.monotonic() < min(began + SUCCESSOR_WAIT_S, until):
            state = ray_api.actor_record(actor_id).get("State")
            found = registry.take_timeout(task_id)
            # Its death may be news to the GCS: for a moment it still says ALIVE.
            settled = state == "ALIVE" and time.monotonic() - began > 1.0
            if found is not None or settled or state not in ("ALIVE", "RESTARTING"):
                return found
            time.sleep(0.05)
        return None

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
        """Go on with the actor that took a dead one's place on another node; False if none does.

        One that was closed, and made again by somebody, is another instance.
        """
        actor_id = self.actor_id
        if not self._client.registry.was_moved(actor_id) and not self._lost_its_nodes(actor_id):
            return False
        found = find_other_actor(self.name, actor_id)
        if found is None:
            return False
        self.go_to(found, None)
        return True

    def _lost_its_nodes(self, actor_id: str) -> bool:
        if not self._handle.named or self._client.is_proxy:
            return False
        seat = ray_api.actor_seat(actor_id)
        return seat is not None and seat.unschedulable

    def go_on_if_moved(self, error: BaseException) -> None:
        """Go on with the next actor where a call failed since its own was moved.

        Returns when what was on its way has been sent there, whichever thread does that: one that is at
        it has the next actor already, of which nobody can tell that it was moved.
        """
        if isinstance(error, rays.ActorDiedError) and self._may_wait and self.failure is None:
            self.follow_successor()
        with self._sending:
            pass
