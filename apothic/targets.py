"""`Target`: where the calls of one instance object go, and whether the object was closed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from apothic.backend import CallRef, InstanceRef, ItemStream
from apothic.calls import AdmittedStream, RetryingCall, TrackedCall, run_call
from apothic.errors import InstanceClosedError
from apothic.pools import Pool, PoolSlot, Replica
from apothic.retries import Retries
from apothic.values import CloseReport, MethodInfo

__all__ = ["Target"]

_NO_RETRIES = Retries(0)


class Target:
    """One object's way to the replicas of its instance, which it may share with other objects."""

    _pool: Pool | None

    def __init__(
        self, open_replica: Callable[[int], InstanceRef], *, label: str, max_pending: int
    ) -> None:
        """Reach an instance that only this object has.

        Args:
            open_replica: gives it; called at first use.
            label: names it in errors.
            max_pending: unfinished calls beyond which the next is refused.
        """
        self._set_up(lambda: pool, label)
        self._pool = pool = Pool(open_replica, label=label, max_pending=max_pending)

    @classmethod
    def shared(cls, find_pool: Callable[[], Pool], label: str) -> Target:
        """Reach the pool that ``find_pool`` gives; it is asked at first use, not before."""
        made = cls.__new__(cls)
        made._set_up(find_pool, label)
        return made

    def _set_up(self, find_pool: Callable[[], Pool], label: str) -> None:
        self._find_pool = find_pool
        self._pool = None
        self._lock = threading.Lock()
        self._left: list[Replica] = []  # what `close` has yet to close
        self._reports: list[CloseReport] = []  # of what it has closed
        self.label: str = label
        self.closed: bool = False

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

    def _track(self, slot: PoolSlot, send: Callable[[InstanceRef], CallRef]) -> CallRef:
        pool = slot.pool
        replica: Replica

        def send_in(slot: PoolSlot) -> CallRef:
            nonlocal replica
            try:
                call = send(slot.enter())
                replica = slot.track(call)
            except BaseException:
                slot.leave()
                raise
            return call

        def settle(call: CallRef, error: BaseException | None) -> bool:
            replica.forget((call,))
            refused = error is not None and pool.note_failure(replica, error)
            return refused and not self.closed

        # One that was refused is not admitted anew: it was accepted once.
        again = (lambda: send_in(pool.rest(self._check_open))) if pool.replaceable else None
        return TrackedCall(send_in(slot), again, settle)

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
        self.pool.wait_for_slot()

    @property
    def in_flight(self) -> int:
        """How many calls of this process count as unfinished, through whichever object."""
        return 0 if self._pool is None else self._pool.in_flight

    # -- life ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a replica is there."""
        return self.closed or (self._pool is not None and bool(self._pool.replicas))

    @property
    def would_open(self) -> bool:
        """Whether the next call would open a replica, which takes a while."""
        return not self.closed and (self._pool is None or self._pool.would_open)

    def primary(self) -> InstanceRef:
        """Give the first replica, opening it if there is none."""
        self._check_open()
        return self.pool.primary(self._check_open).ref

    def close(self) -> CloseReport:
        """Stop every replica, for all objects that share them; the report joins theirs.

        Where that failed it can be called again.

        Raises:
            ApothicError: a replica could not be stopped; the others were, as far as that went.
        """
        with self._lock:
            if self.closed and not self._left:
                return CloseReport(closed=False, note="it was closed before")
            first, self.closed = not self.closed, True
            if first and self._pool is not None:
                self._left = self._pool.take_all()
            replicas, self._left = self._left, []
        failures: list[Exception] = []
        try:
            while replicas:
                try:
                    self._reports.append(replicas[0].ref.close())
                except Exception as error:
                    failures.append(error)
                    self._left.append(replicas[0])
                del replicas[0]
        finally:
            self._left += replicas  # an interrupted one keeps the rest
        if failures:
            raise failures[0]
        reports, self._reports = self._reports, []
        if len(reports) == 1:
            return reports[0]
        return CloseReport(
            closed=any(report.closed for report in reports),
            hooks=tuple(itertools.chain.from_iterable(report.hooks for report in reports)),
            interrupted_calls=sum(report.interrupted_calls for report in reports),
            note=None if reports else "it was never started",
        )

    # -- inside --------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """What all objects of the instance share in this process; found at first use."""
        pool = self._pool
        if pool is None or (pool.replaceable and not pool.replicas):
            # Without replicas the next one is opened on the connection that there is now.
            self._pool = pool = self._find_pool()
        return pool

    def _admit(self) -> PoolSlot:
        self._check_open()
        return self.pool.admit(self._check_open)

    def _check_open(self) -> None:
        if self.closed:
            raise InstanceClosedError(
                f"{self.label} is closed: this process closed it. Make or name a new instance."
            )
