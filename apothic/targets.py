"""Where calls of an instance go: one container, or a pool that grows and shrinks with the load.

A `Target` admits calls (``max_pending_tasks``), picks the replica with the fewest unfinished ones,
starts another while ``ceil(in flight / tasks_per_container)`` wants it, and gives up the lease of
those that stand idle. It counts what this process has in flight; leases make the sum over all
processes come out right, since a replica ends when the last process has given it up.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from apothic.backend import CallRef, InstanceRef, ItemStream
from apothic.calls import AdmittedStream, RetryingCall, TrackedCall, run_call
from apothic.errors import (
    InstanceClosedError,
    InstanceLostError,
    PendingTasksExceededError,
    PlacementError,
    RemoteTraceback,
)
from apothic.retries import Retries
from apothic.values import CloseReport, MethodInfo

__all__ = ["IDLE_S", "Target", "was_refused"]

IDLE_S = 30.0
"""Seconds without a call after which an extra replica is given up."""

_SLOT_POLL_S = 0.005  # only `map` and its kin wait for a slot, and only when others hold them all
_PRUNE_SLACK = 32
_NO_RETRIES = Retries(0)

_counts = threading.Lock()
"""Guards what is in flight, everywhere. Held for moments only, never while anything is asked or opened:
calls end on threads of the engine, which may be what an opening waits for."""


class _Replica:
    """One container and what this process has in flight there; guarded by `_counts`."""

    __slots__ = ("idle_since", "index", "prune_at", "ref", "running", "tracked")

    def __init__(self, index: int, ref: InstanceRef) -> None:
        self.index = index
        self.ref = ref
        self.running = 0
        self.tracked: dict[CallRef, None] = {}
        self.prune_at = _PRUNE_SLACK
        self.idle_since = time.monotonic()

    @property
    def in_flight(self) -> int:
        return self.running + len(self.tracked)

    def forget(self, calls: Iterable[CallRef]) -> None:
        """Count calls no longer; with the lock held."""
        for call in calls:
            if call in self.tracked:
                del self.tracked[call]
                self.idle_since = time.monotonic()

    def prune(self) -> None:
        """Forget finished calls; amortised, since asking costs the engine a look at each."""
        with _counts:
            tracked = list(self.tracked)
        finished = tracked[0].finished(tracked) if tracked else []
        with _counts:
            self.forget(call for call, gone in zip(tracked, finished, strict=True) if gone)
            self.prune_at = 2 * len(self.tracked) + _PRUNE_SLACK


class _Slot:
    """One admitted call: it counts as pending until `leave`, between two attempts as well."""

    __slots__ = ("_left", "_replica", "_target")

    def __init__(self, target: Target) -> None:
        self._target = target
        self._replica: _Replica | None = None
        self._left = False

    def enter(self) -> InstanceRef:
        if self._replica is None:
            self._replica = self._target._place()
        return self._replica.ref

    def failed(self, error: BaseException) -> bool:
        replica = self._replica
        if replica is None:
            return False  # none could be opened
        with _counts:
            self._replica = None
            replica.running -= 1
            replica.idle_since = time.monotonic()
            self._target._resting += 1
        return self._target._note_failure(replica, error)

    def track(self, call: CallRef) -> _Replica:
        """Count a submitted call as long as the engine says that it goes on; in place of this."""
        replica = self._replica
        assert replica is not None
        with _counts:
            replica.tracked[call] = None
            replica.running -= 1
            self._left = True
        return replica

    def leave(self) -> None:
        with _counts:
            if self._left:
                return
            self._left = True
            if self._replica is None:
                self._target._resting -= 1
            else:
                self._replica.running -= 1
                self._replica.idle_since = time.monotonic()


class Target:
    """The replicas behind one instance object."""

    def __init__(
        self,
        open_replica: Callable[[int], InstanceRef],
        *,
        label: str,
        max_pending: int,
        max_containers: int = 1,
        tasks_per_container: int = 1,
        replaceable: bool = False,
        idle_s: float | None = None,
    ) -> None:
        """Describe the replicas; none is opened before the first use.

        Args:
            open_replica: starts or finds the replica of an index, under a lease.
            label: names the instance in errors.
            max_pending: unfinished calls of this process beyond which the next is refused.
            max_containers: upper limit of replicas.
            tasks_per_container: calls in flight that a replica takes before another is wanted.
            replaceable: a lost or closed replica is opened again for the next call.
            idle_s: seconds after which extra replicas are given up; `IDLE_S` by default.
        """
        self._open = open_replica
        self.label: str = label
        self._max_pending = max_pending
        self._max_containers = max_containers
        self._per_container = tasks_per_container
        self._replaceable = replaceable
        self._idle_s = idle_s
        self._replicas: list[_Replica] = []
        self._resting = 0  # calls that are admitted and at no replica
        self._opening = threading.RLock()
        self.closed: bool = False
        if max_containers > 1:
            _reaper.watch(self)

    # -- calls ---------------------------------------------------------------------------------

    def call(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        policy: Retries = _NO_RETRIES,
    ) -> Any:
        """Submit a call and wait for its value."""
        return run_call(
            policy, self._admit(), lambda ref: ref.submit(method, args, kwargs, timeout_s)
        )

    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        policy: Retries = _NO_RETRIES,
    ) -> CallRef:
        """Submit a call and return at once; it counts as pending until it has ended."""

        def send(ref: InstanceRef) -> CallRef:
            return ref.submit(method, args, kwargs, timeout_s)

        slot = self._admit()
        try:
            if policy.max_retries:
                return RetryingCall(policy, slot, send)
            return self._track(slot, send)
        except BaseException:
            slot.leave()
            raise

    def _track(self, slot: _Slot, send: Callable[[InstanceRef], CallRef]) -> CallRef:
        replica: _Replica

        def send_in(slot: _Slot) -> CallRef:
            nonlocal replica
            try:
                call = send(slot.enter())
                replica = slot.track(call)
            except BaseException:
                slot.leave()
                raise
            return call

        def ended(call: CallRef, error: BaseException | None) -> bool:
            with _counts:
                replica.forget((call,))
            return error is not None and self._note_failure(replica, error)

        # One that was refused is not admitted anew: it was accepted once.
        again = (lambda: send_in(self._rest())) if self._replaceable else None
        return TrackedCall(send_in(slot), again, ended)

    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
        policy: Retries = _NO_RETRIES,
    ) -> ItemStream:
        """Start a generator call; it counts as pending until the stream is closed or exhausted."""
        slot = self._admit()
        try:
            return AdmittedStream(
                policy, slot, lambda ref: ref.stream(method, args, kwargs, timeout_s)
            )
        except BaseException:
            slot.leave()
            raise

    def wait_for_slot(self) -> None:
        """Wait until a call would be admitted."""
        while not self._has_room():
            time.sleep(_SLOT_POLL_S)

    # -- life ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a replica is there, so that submitting does not wait for one."""
        return bool(self._replicas) or self.closed

    def primary(self) -> InstanceRef:
        """Give the first replica, opening it if there is none."""
        with self._opening:
            self._check_open()
            replicas = list(self._replicas)
            return (replicas[0] if replicas else self._open_next()).ref

    def close(self) -> CloseReport:
        """Stop every replica; the report joins theirs."""
        with self._opening:
            if self.closed:
                return CloseReport(closed=False, note="it was closed before")
            self.closed = True
            with _counts:
                replicas, self._replicas = self._replicas, []
        reports = [replica.ref.close() for replica in replicas]
        if len(reports) == 1:
            return reports[0]
        return CloseReport(
            closed=any(report.closed for report in reports),
            hooks=tuple(itertools.chain.from_iterable(report.hooks for report in reports)),
            interrupted_calls=sum(report.interrupted_calls for report in reports),
            note=None if reports else "it was never started",
        )

    def scale_down(self) -> None:
        """Give up extra replicas that have stood idle long enough."""
        idle_s = IDLE_S if self._idle_s is None else self._idle_s
        for replica in list(self._replicas):
            replica.prune()
        with _counts:
            now = time.monotonic()
            gone = [
                replica
                for replica in self._replicas[1:]
                if replica.in_flight == 0 and now - replica.idle_since >= idle_s
            ]
            self._replicas = [r for r in self._replicas if r not in gone]
        for replica in gone:
            replica.ref.release()

    # -- inside --------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many calls count as unfinished; some may have ended since anybody looked."""
        return self._resting + sum(replica.in_flight for replica in self._replicas)

    def _check_open(self) -> None:
        if self.closed:
            raise InstanceClosedError(
                f"{self.label} is closed: this process closed it. Make or name a new instance."
            )

    def _has_room(self) -> bool:
        if self.in_flight < self._max_pending:
            return True
        for replica in list(self._replicas):
            replica.prune()
        return self.in_flight < self._max_pending

    def _admit(self) -> _Slot:
        """Give a slot to one more call, or refuse it."""
        self._check_open()
        while True:
            room = self._has_room()
            with _counts:
                in_flight = self.in_flight
                if in_flight < self._max_pending:
                    return self._rest_locked()
            if not room:
                raise PendingTasksExceededError(
                    f"{self.label} has {in_flight} unfinished calls from this process, "
                    f"which is max_pending_tasks={self._max_pending}. Wait for some, use map, "
                    f"which paces itself, or raise max_pending_tasks."
                )

    def _rest(self) -> _Slot:
        with _counts:
            return self._rest_locked()

    def _rest_locked(self) -> _Slot:
        self._resting += 1
        return _Slot(self)

    def _place(self) -> _Replica:
        """Move an admitted call to the replica with the fewest, opening another if there is need."""
        self._check_open()
        replica = self._take_best()
        if replica is None:
            for each in list(self._replicas):
                each.prune()
            with self._opening:
                self._check_open()
                # Others may have opened one meanwhile, or have ended.
                replica = self._take_best() or self._open_next(self._take)
        if len(replica.tracked) >= replica.prune_at:
            replica.prune()
        return replica

    def _take_best(self) -> _Replica | None:
        """Give the best replica to a call that waits for one; None when another is to be opened."""
        with _counts:
            best = min(self._replicas, key=lambda replica: replica.in_flight, default=None)
            if best is None or (
                best.in_flight >= self._per_container and len(self._replicas) < self._max_containers
            ):
                return None
            self._take(best)
            return best

    def _take(self, replica: _Replica) -> None:
        self._resting -= 1
        replica.running += 1

    def _open_next(self, use: Callable[[_Replica], None] = lambda _: None) -> _Replica:
        """Open a replica; called by one thread at a time."""
        taken = {replica.index for replica in self._replicas}
        index = next(i for i in itertools.count() if i not in taken)
        replica = _Replica(index, self._open(index))
        with _counts:
            self._replicas.append(replica)
            use(replica)
        return replica

    def _note_failure(self, replica: _Replica, error: BaseException) -> bool:
        """Drop a replica that is gone; True when it had refused the call, which another may run."""
        if not self._replaceable or not _says_gone(error):
            return False
        with _counts:
            if replica in self._replicas:
                self._replicas.remove(replica)
        return was_refused(error) and not self.closed


def was_refused(error: BaseException) -> bool:
    """Tell whether an instance that was closed refused a call, so that it did not run."""
    return isinstance(error, InstanceClosedError) and error.refused and _is_own(error)


def _says_gone(error: BaseException | None) -> bool:
    gone = (InstanceLostError, InstanceClosedError, PlacementError)
    return isinstance(error, gone) and _is_own(error)


def _is_own(error: BaseException) -> bool:
    """Tell an instance's own end from that of another one, whose error its user code let through."""
    return not isinstance(error.__cause__, RemoteTraceback)


class _Reaper:
    """One daemon thread that scales all pools of this process down; started with the first."""

    def __init__(self) -> None:
        self._targets: weakref.WeakSet[Target] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, target: Target) -> None:
        with self._lock:
            self._targets.add(target)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="apothic-scale-down", daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(min(1.0, IDLE_S / 2))
            with self._lock:
                targets = list(self._targets)
            for target in targets:
                try:
                    target.scale_down()
                except Exception:
                    continue
            del targets


_reaper = _Reaper()
