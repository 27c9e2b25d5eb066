"""Waiting until an instance is ready: for room on a node, then for ``enter``.

An instance that waits for room is looked at every half second at first, then less often. While its own
offer is full, so that it queues there, and another one that qualifies has room, it is taken back and
asked for there, under the same name and lease:

- after `MOVE_AFTER_S`, when the race for the room was lost, or a better one came free;
- after `SETUP_WAIT_S`, doubled with each move, when its node may have given it its room already and is
  preparing the runtime environment or starting the process, which look the same.

Only the process that made an instance moves it. Where nobody waits for it (`Cls.bind` does not),
`ray_backend.starting` looks.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import ray
from ray import exceptions as rays

from apothic.backend import StartRequest
from apothic.errors import (
    ConflictError,
    InstanceClosedError,
    InstanceLostError,
    InstanceStartError,
    InvalidOptionError,
    NoMatchingOfferError,
    PlacementError,
    PlacementTimeoutError,
)
from apothic.options import ClassOptions
from ray_backend import ray_api
from ray_backend.placement.live import ClusterView, Placement
from ray_backend.placement.seats import holders, may_be_starting
from ray_backend.translate import failure_inside, translate, was_never_sent

if TYPE_CHECKING:
    from apothic.sandbox_values import SandboxHandle
    from apothic.values import ClassInstanceHandle, ClassSpec, SandboxSpec
    from ray_backend.client import RayClient
    from ray_backend.instances import RayInstance
    from ray_backend.lifecycle import Instances

__all__ = ["STOPPING_WAIT_S", "MovedError", "PlacementWatch", "give_up", "wait_ready"]

PLACEMENT_TIMEOUT_VARIABLE = "APOTHIC_PLACEMENT_TIMEOUT_S"
PLACEMENT_TIMEOUT_S = 600.0
"""Seconds that an instance may wait for room before `PlacementTimeoutError`."""

STOPPING_WAIT_S = 60.0
"""Seconds to wait for a name whose instance is being stopped."""

MOVE_AFTER_S = 1.0
"""Seconds that an instance queues at a full offer before it is moved to one with room."""

SETUP_WAIT_S = 30.0
"""The same, where the instance may have its room already and its process is being prepared."""

_LOOK_S = 0.5
_MAX_LOOK_S = 5.0


class MovedError(Exception):
    """The instance has another actor now."""


def wait_ready(instances: Instances, instance: RayInstance) -> None:
    """Wait for ``enter``; what cannot become ready is removed before the error is raised.

    An existing instance that was asked for may be found while it stops: then another is made.
    """
    request: StartRequest | None = instance.request
    deadline = time.monotonic() + STOPPING_WAIT_S
    watch = PlacementWatch(instances, instance)
    while True:
        try:
            _wait_once(instance, request, watch)
            return
        except MovedError:
            continue
        except rays.ActorUnavailableError:
            # A named one that is coming back: it waits for room, or has its process started.
            watch.look()
            time.sleep(_LOOK_S / 5)
        except rays.ActorUnschedulableError as error:
            # The node that was asked for has left; another look finds what there is now.
            if request is None or time.monotonic() > deadline:
                raise translate(error, instance.label) from None
            instance.take_over(instances.start(request))
        except (InstanceClosedError, InstanceLostError) as error:
            if request is None and instance.follow_successor():
                continue  # its maker moved it
            if request is None or not request.reuse or time.monotonic() > deadline:
                raise
            if isinstance(error, InstanceClosedError) and instance.placement is not None:
                raise  # what this process made was closed before it was ready, by somebody's wish
            time.sleep(0.01)
            instance.take_over(instances.start(request))


def _wait_once(
    instance: RayInstance, request: StartRequest | None, watch: PlacementWatch[RayInstance]
) -> None:
    actor = instance.native
    label = instance.label
    try:
        if request is None or request.reuse:
            status = watch.get(actor.apothic_status.remote())
            instance.runs_version(status["spec_digest"])
            if request is not None:
                _check_same_arguments(request, status, label)
            if status["state"] == "ready":
                return
        watch.get(actor.apothic_start.remote())
    except rays.ActorUnschedulableError:
        raise
    except rays.RayError as error:
        if was_never_sent(error) and instance.handle.named:
            raise
        found = translate(error, label)
        failure = failure_inside(error)
        started_badly = failure is not None and failure.kind == "start"
        if isinstance(found, InstanceLostError) and instance.died_at_start():
            found = InstanceStartError(
                f"{label} did not start: its process ended while it was constructed or entered, by "
                f"running out of memory, os._exit or a crash in native code; nothing was left "
                f"behind. Its log on the node tells more. {found}"
            )
            started_badly = True
        if started_badly or (request is not None and not request.reuse):
            instance.close()
        raise found from found.__cause__
    except PlacementError as error:
        give_up(instance, error)
        raise


def give_up(instance: RayInstance, error: PlacementError) -> None:
    """Close what waits for room in vain; what somebody else made waits on for those who want it.

    Args:
        instance: the one.
        error: what its calls get that are on their way.
    """
    instance.failure = error
    if instance.placement is not None:
        instance.close()
    elif not instance.handle.named:
        instance.release()


class Waiting(Protocol):
    """What waits for room: an instance or a session, by its actor."""

    label: str
    placement: Placement | None

    @property
    def native(self) -> Any: ...
    @property
    def handle(self) -> ClassInstanceHandle | SandboxHandle: ...


W = TypeVar("W", bound=Waiting, contravariant=True)


class Mover(Protocol[W]):
    """What knows where there is room."""

    @property
    def client(self) -> RayClient: ...
    def find_spec(self, digest: str) -> ClassSpec | SandboxSpec | None: ...
    def place(self, view: ClusterView, options: ClassOptions) -> Placement: ...
    def move(self, instance: W) -> bool: ...


class PlacementWatch(Generic[W]):
    """Sees to it that an instance gets room, or that its caller is told why not."""

    def __init__(self, mover: Mover[W], instance: W) -> None:
        """Start the clock."""
        self._mover = mover
        self._client = mover.client
        self._instance = instance
        self._limit_s = _placement_timeout_s()
        self._deadline = time.monotonic() + self._limit_s
        self._queued_since: float | None = None
        self._moves = 0
        self.gone: bool = False

    def get(self, ref: Any, meanwhile: Callable[[], None] | None = None) -> Any:
        """Get a first reply, but do not wait for ever for room.

        Args:
            ref: to the reply.
            meanwhile: called now and then once there is room.

        Raises:
            MovedError: when the actor was replaced by one that asks for room elsewhere.
            PlacementTimeoutError: when there was no room in time.
            NoMatchingOfferError: when at that time nothing qualifies any more.
        """
        pause_s = _LOOK_S
        while True:
            left_s = max(self._deadline - time.monotonic(), 0.01)
            try:
                return ray.get(ref, timeout=min(pause_s, left_s))
            except rays.GetTimeoutError:
                if self.look():
                    break
            pause_s = min(pause_s * 1.5, _MAX_LOOK_S)
        while meanwhile is not None:
            meanwhile()
            with contextlib.suppress(rays.GetTimeoutError):
                return ray.get(ref, timeout=_LOOK_S)
        return ray.get(ref)

    def look(self) -> bool:
        """Tell whether the instance has room, or is gone, and needs no more looks.

        It is moved where it queues in vain.

        Raises:
            MovedError: it was.
            PlacementTimeoutError: there was no room in time.
            NoMatchingOfferError: nothing qualifies any more.
        """
        seat = self._client.seat(self._instance.native._actor_id.hex())
        if seat is None or not seat.waits:
            self._queued_since = None
            self.gone = seat is not None and seat.state == "DEAD"
            return self.gone or (seat is not None and seat.state == "ALIVE")
        now = time.monotonic()
        if self._queued_since is None:
            self._queued_since = now
        if now > self._deadline:
            self._give_up()
        if seat.state == "PENDING_CREATION" and self._instance.placement is not None:
            self._move_if_queued(seat, now - self._queued_since)
        return False

    def _move_if_queued(self, seat: ray_api.ActorSeat, queued_s: float) -> None:
        current = self._instance.placement
        assert current is not None
        if queued_s < MOVE_AFTER_S or current.is_free:
            return
        try:
            found, view = self._place()
        except NoMatchingOfferError:
            return  # its nodes have left; they may come back before the deadline
        if not current.is_worth_leaving_for(found):
            return
        patience_s = SETUP_WAIT_S * math.pow(2, self._moves)
        if queued_s < patience_s and may_be_starting(seat, view, self._client.seats()):
            return
        self._moves += 1
        self._queued_since = None
        if self._mover.move(self._instance):
            raise MovedError

    def _place(self) -> tuple[Placement, ClusterView]:
        spec = self._mover.find_spec(self._instance.handle.spec_digest)
        assert spec is not None  # the lease keeps it
        options = ClassOptions.model_validate(spec.options)
        view = self._client.view()
        return self._mover.place(view, options), view

    def _give_up(self) -> None:
        found, _ = self._place()
        held = holders(found.plan, self._client.seats())
        error = found.plan.timed_out(self._limit_s, held, f"raise {PLACEMENT_TIMEOUT_VARIABLE}")
        raise PlacementTimeoutError(f"{self._instance.label}: {error}")


def _placement_timeout_s() -> float:
    text = os.environ.get(PLACEMENT_TIMEOUT_VARIABLE, "")
    if not text.strip():
        return PLACEMENT_TIMEOUT_S
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise InvalidOptionError(
            f"{PLACEMENT_TIMEOUT_VARIABLE}={text!r} is not valid: it takes seconds above 0. Correct it "
            f"or unset it for {PLACEMENT_TIMEOUT_S:g} s."
        )
    return value


def _check_same_arguments(request: StartRequest, status: Mapping[str, Any], label: str) -> None:
    if request.match_arguments and status["arguments_digest"] != request.arguments_digest:
        raise ConflictError(
            f"{label} exists already with other constructor arguments. Leave the arguments out "
            f"to use it as it is, close it first, or use another id."
        )
