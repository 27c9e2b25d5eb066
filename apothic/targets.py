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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from apothic.backend import CallRef, InstanceRef, ItemStream
from apothic.errors import (
    InstanceClosedError,
    InstanceLostError,
    PendingTasksExceededError,
    PlacementError,
    RemoteTraceback,
)
from apothic.values import CloseReport, MethodInfo

__all__ = ["IDLE_S", "Target", "was_refused"]

IDLE_S = 30.0
"""Seconds without a call after which an extra replica is given up."""

_SLOT_POLL_S = 0.005  # only `map` and its kin wait for a slot, and only when others hold them all
_PRUNE_SLACK = 32


class _Replica:
    """One container and what this process has in flight there; guarded by its target's lock."""

    __slots__ = ("idle_since", "index", "prune_at", "ref", "running", "tracked")

    def __init__(self, index: int, ref: InstanceRef) -> None:
        self.index = index
        self.ref = ref
        self.running = 0
        self.tracked: list[CallRef] = []
        self.prune_at = _PRUNE_SLACK
        self.idle_since = time.monotonic()

    @property
    def in_flight(self) -> int:
        return self.running + len(self.tracked)

    def prune(self) -> None:
        """Forget finished calls; amortised, since asking costs the engine a look at each."""
        if self.tracked:
            finished = self.tracked[0].finished(self.tracked)
            self.tracked = [c for c, gone in zip(self.tracked, finished, strict=True) if not gone]
            if not self.tracked:
                self.idle_since = time.monotonic()
        self.prune_at = 2 * len(self.tracked) + _PRUNE_SLACK


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
        self._lock = threading.RLock()
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
    ) -> Any:
        """Submit a call and wait for its value."""
        while True:
            with self._running() as replica:
                try:
                    return replica.ref.submit(method, args, kwargs, timeout_s).result()
                except Exception as error:
                    # Another process may have closed a shared replica. Only what it refused is sent
                    # to the next one: a call that was interrupted has run.
                    if not self._forget_if_gone(replica, error) or not was_refused(error):
                        raise

    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> CallRef:
        """Submit a call and return at once; it counts as pending until it has ended."""
        with self._lock:
            replica = self._admit()
            call = replica.ref.submit(method, args, kwargs, timeout_s)
            replica.tracked.append(call)
            return call

    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> ItemStream:
        """Start a generator call; it counts as pending until the stream is closed or exhausted."""
        with self._lock:
            replica = self._admit()
            stream = replica.ref.stream(method, args, kwargs, timeout_s)
            replica.running += 1
        return _CountedStream(stream, lambda: self._leave(replica))

    def settle(self, call: CallRef, error: BaseException | None) -> None:
        """Note that a submitted call has ended, before the next look would find out."""
        with self._lock:
            for replica in list(self._replicas):
                if call in replica.tracked:
                    replica.tracked.remove(call)
                    replica.idle_since = time.monotonic()
                    self._forget_if_gone(replica, error)

    def wait_for_slot(self) -> None:
        """Wait until a call would be admitted."""
        while True:
            with self._lock:
                if self._in_flight() < self._max_pending:
                    return
                for replica in self._replicas:
                    replica.prune()
                if self._in_flight() < self._max_pending:
                    return
            time.sleep(_SLOT_POLL_S)

    # -- life ----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a replica is there, so that submitting does not wait for one."""
        return bool(self._replicas) or self.closed

    @property
    def in_flight(self) -> int:
        """How many calls count as unfinished; some may have ended since anybody looked."""
        return self._in_flight()

    def primary(self) -> InstanceRef:
        """Give the first replica, opening it if there is none."""
        with self._lock:
            self._check_open()
            if not self._replicas:
                self._replicas.append(_Replica(0, self._open(0)))
            return self._replicas[0].ref

    def close(self) -> CloseReport:
        """Stop every replica; the report joins theirs."""
        with self._lock:
            if self.closed:
                return CloseReport(closed=False, note="it was closed before")
            self.closed = True
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
        with self._lock:
            for replica in self._replicas:
                replica.prune()
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

    @contextmanager
    def _running(self) -> Iterator[_Replica]:
        with self._lock:
            replica = self._admit()
            replica.running += 1
        try:
            yield replica
        finally:
            self._leave(replica)

    def _leave(self, replica: _Replica) -> None:
        with self._lock:
            replica.running -= 1
            replica.idle_since = time.monotonic()

    def _in_flight(self) -> int:
        return sum(replica.in_flight for replica in self._replicas)

    def _check_open(self) -> None:
        if self.closed:
            raise InstanceClosedError(
                f"{self.label} is closed: this process closed it. Make or name a new instance."
            )

    def _admit(self) -> _Replica:
        """Pick the replica for one more call, or refuse it; called with the lock held."""
        self._check_open()
        if not self._replicas:
            self._replicas.append(_Replica(0, self._open(0)))
        best = min(self._replicas, key=lambda replica: replica.in_flight)
        if len(best.tracked) >= best.prune_at:
            best.prune()
        if self._in_flight() >= self._max_pending:
            for replica in self._replicas:
                replica.prune()
            if self._in_flight() >= self._max_pending:
                raise PendingTasksExceededError(
                    f"{self.label} has {self._in_flight()} unfinished calls from this process, "
                    f"which is max_pending_tasks={self._max_pending}. Wait for some, use map, "
                    f"which paces itself, or raise max_pending_tasks."
                )
        if best.in_flight >= self._per_container and len(self._replicas) < self._max_containers:
            for replica in self._replicas:
                replica.prune()
            best = min(self._replicas, key=lambda replica: replica.in_flight)
            if best.in_flight >= self._per_container:
                taken = {replica.index for replica in self._replicas}
                index = next(i for i in itertools.count() if i not in taken)
                best = _Replica(index, self._open(index))
                self._replicas.append(best)
        return best

    def _forget_if_gone(self, replica: _Replica, error: BaseException | None) -> bool:
        """Drop a replica if that is what an error says; True when another can take its place."""
        if not self._replaceable or not _says_gone(error):
            return False
        with self._lock:
            if replica in self._replicas:
                self._replicas.remove(replica)
        return not self.closed


def was_refused(error: BaseException) -> bool:
    """Tell whether an instance that was closed refused a call, so that it did not run."""
    return isinstance(error, InstanceClosedError) and error.refused and _is_own(error)


def _says_gone(error: BaseException | None) -> bool:
    gone = (InstanceLostError, InstanceClosedError, PlacementError)
    return isinstance(error, gone) and _is_own(error)


def _is_own(error: BaseException) -> bool:
    """Tell an instance's own end from that of another one, whose error its user code let through."""
    return not isinstance(error.__cause__, RemoteTraceback)


class _CountedStream(ItemStream):
    """A stream that tells its target when it has ended."""

    def __init__(self, stream: ItemStream, ended: Callable[[], None]) -> None:
        self._stream = stream
        self._end = weakref.finalize(self, ended)
        self._end.atexit = False

    def next_item(self) -> Any:
        try:
            return self._stream.next_item()
        except BaseException:
            self._end()
            raise

    async def anext_item(self) -> Any:
        try:
            return await self._stream.anext_item()
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        self._end()
        self._stream.close()


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
