"""The replicas behind an instance, as this process uses them: pending limit, scaling, sharing.

A `Pool` admits calls (``max_pending_tasks``), picks the replica with the fewest unfinished ones,
starts another while ``ceil(in flight / tasks_per_container)`` wants it, and gives up the lease of
those that stand idle. It counts what this process has in flight, through whichever object: all
objects of an instance share one pool. Leases make the sum over all processes come out right, since a
replica ends when the last process has given it up.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

from apothic.backend import CallRef, ControlPlaneClient, InstanceRef
from apothic.errors import (
    InstanceClosedError,
    InstanceLostError,
    PendingTasksExceededError,
    PlacementError,
    RemoteTraceback,
)
from apothic.values import CloseReport

__all__ = ["IDLE_S", "Pool", "PoolSlot", "Replica", "close_everywhere", "pool_of", "shared_pool"]

IDLE_S = 30.0
"""Seconds without a call after which an extra replica is given up."""

_SLOT_POLL_S = 0.005  # only `map` and its kin wait for a slot, and only when others hold them all
_PRUNE_SLACK = 32

_T = TypeVar("_T")

_counts = threading.RLock()
"""Guards what is in flight, everywhere, and who shares what. Held for moments only, never while anything
is asked or opened: calls end on threads of the engine, which may be what an opening waits for. It is
reentrant, since the garbage collector can end a stream anywhere."""


class Replica:
    """One container and what this process has in flight there; guarded by `_counts`."""

    __slots__ = ("__weakref__", "idle_since", "prune_at", "ref", "running", "tracked", "users")

    def __init__(self, ref: InstanceRef) -> None:
        """Take a container over that nothing was sent to yet."""
        self.ref: InstanceRef = ref
        self.running: int = 0
        self.tracked: dict[CallRef, None] = {}
        self.prune_at: int = _PRUNE_SLACK
        self.idle_since: float = time.monotonic()
        self.users: weakref.WeakSet[Pool] = weakref.WeakSet()

    @property
    def in_flight(self) -> int:
        """How many calls count as unfinished here."""
        return self.running + len(self.tracked)

    def forget(self, calls: Iterable[CallRef]) -> None:
        """Count calls no longer."""
        with _counts:
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
            self.forget([call for call, gone in zip(tracked, finished, strict=True) if gone])
            self.prune_at = 2 * len(self.tracked) + _PRUNE_SLACK


class PoolSlot:
    """One admitted call: it counts as pending until `leave`, between two attempts as well."""

    __slots__ = ("_check", "_left", "_replica", "pool")

    def __init__(self, pool: Pool, check: Callable[[], None]) -> None:
        """Stand at no replica yet, counted by the pool; ``check`` refuses further attempts."""
        self.pool: Pool = pool
        self._check = check
        self._replica: Replica | None = None
        self._left = False

    def enter(self) -> InstanceRef:
        """Give the instance for the next attempt; opens a replica if need be."""
        if self._replica is None:
            self._replica = self.pool.place(self._check)
        return self._replica.ref

    def failed(self, error: BaseException) -> bool:
        """Leave the replica of an attempt that failed; True when another one may run the call."""
        replica = self._replica
        if replica is None:
            return False  # none could be opened
        with _counts:
            self._replica = None
            replica.running -= 1
            replica.idle_since = time.monotonic()
            self.pool.resting += 1
        return self.pool.note_failure(replica, error)

    def track(self, call: CallRef) -> Replica:
        """Count a submitted call, in place of this, as long as the engine says that it goes on."""
        replica = self._replica
        assert replica is not None
        with _counts:
            replica.tracked[call] = None
            replica.running -= 1
            self._left = True
            _keeper.keep(self.pool)
        return replica

    def leave(self) -> None:
        """Count the call no longer; idempotent."""
        with _counts:
            if self._left:
                return
            self._left = True
            if self._replica is None:
                self.pool.resting -= 1
            else:
                self._replica.running -= 1
                self._replica.idle_since = time.monotonic()


class Pool:
    """The replicas of one instance."""

    def __init__(
        self,
        open_replica: Callable[[int], InstanceRef],
        *,
        label: str,
        max_pending: int,
        max_containers: int = 1,
        tasks_per_container: int = 1,
        replaceable: bool = False,
        client: ControlPlaneClient | None = None,
    ) -> None:
        """Describe the replicas; none is opened before the first use.

        Args:
            open_replica: starts or finds the replica of an index, under a lease.
            label: names the instance in errors.
            max_pending: unfinished calls of this process beyond which the next is refused.
            max_containers: upper limit of replicas.
            tasks_per_container: calls in flight that a replica takes before another is wanted.
            replaceable: a lost or closed replica is opened again for the next call.
            client: whose instances they are; None where nobody else can reach them.
        """
        self._open = open_replica
        self._label = label
        self._max_pending = max_pending
        self._max_containers = max_containers
        self._per_container = tasks_per_container
        self.replaceable: bool = replaceable
        self._client = client
        self._replicas: dict[int, Replica] = {}
        self._opening = threading.RLock()
        self.resting: int = 0  # calls that are admitted and at no replica

    @property
    def replicas(self) -> list[Replica]:
        """Those that are open, the first one first."""
        with _counts:
            return list(self._replicas.values())

    @property
    def in_flight(self) -> int:
        """How many calls count as unfinished; some may have ended since anybody looked."""
        with _counts:
            return self.resting + sum(replica.in_flight for replica in self._replicas.values())

    # -- admission -----------------------------------------------------------------------------

    def admit(self, check: Callable[[], None]) -> PoolSlot:
        """Give a slot to one more call.

        Raises:
            PendingTasksExceededError: when ``max_pending`` calls are unfinished.
        """
        while True:
            room = self._has_room()
            with _counts:
                in_flight = self.in_flight
                if in_flight < self._max_pending:
                    return self.rest(check)
            if not room:
                raise PendingTasksExceededError(
                    f"{self._label} has {in_flight} unfinished calls from this process, "
                    f"which is max_pending_tasks={self._max_pending}. Wait for some, use map, "
                    f"which paces itself, or raise max_pending_tasks."
                )

    def rest(self, check: Callable[[], None]) -> PoolSlot:
        """Give a slot to a call that was admitted before, whatever the limit is."""
        with _counts:
            self.resting += 1
        return PoolSlot(self, check)

    def wait_for_slot(self) -> None:
        """Wait until a call would be admitted."""
        while not self._has_room():
            time.sleep(_SLOT_POLL_S)

    def _has_room(self) -> bool:
        if self.in_flight >= self._max_pending:
            self._prune()
        return self.in_flight < self._max_pending

    def _prune(self) -> None:
        for replica in self.replicas:
            replica.prune()

    # -- replicas ------------------------------------------------------------------------------

    def place(self, check: Callable[[], None]) -> Replica:
        """Move an admitted call to the replica with the fewest, opening another if there is need."""
        check()
        replica = self._take_best()
        if replica is None:
            self._prune()
            with self._opening:
                check()
                # Others may have opened one meanwhile, or have ended.
                replica = self._take_best() or self._open_next(self._take)
        if len(replica.tracked) >= replica.prune_at:
            replica.prune()
        return replica

    def primary(self, check: Callable[[], None]) -> Replica:
        """Give the first replica, opening it if there is none."""
        with self._opening:
            check()
            replicas = self.replicas
            return replicas[0] if replicas else self._open_next(lambda _: None)

    @property
    def would_open(self) -> bool:
        """Whether the next call would open a replica."""
        if self._best() is not None:
            return False
        self._prune()
        return self._best() is None

    def _best(self) -> Replica | None:
        """Give the replica for the next call; None when another one is to be opened for it."""
        with _counts:
            replicas = self._replicas.values()
            best = min(replicas, key=lambda replica: replica.in_flight, default=None)
            if best is None or (
                best.in_flight >= self._per_container and len(replicas) < self._max_containers
            ):
                return None
            return best

    def _take_best(self) -> Replica | None:
        """Give the best replica to a call that waits for one."""
        with _counts:
            best = self._best()
            if best is not None:
                self._take(best)
            return best

    def _take(self, replica: Replica) -> None:
        self.resting -= 1
        replica.running += 1

    def _open_next(self, use: Callable[[Replica], None]) -> Replica:
        """Open a replica; called by one thread at a time."""
        index = next(i for i in itertools.count() if i not in self._replicas)
        ref = self._open(index)
        with _counts:
            replica = _known_replica(self._client, ref)
            replica.users.add(self)
            self._replicas[index] = replica
            if len(self._replicas) > 1:
                _keeper.keep(self)
            use(replica)
        return replica

    def serves(self, ref: InstanceRef) -> bool:
        """Tell whether one of the replicas is the instance that ``ref`` reaches."""
        return any(replica.ref.is_same(ref) for replica in self.replicas)

    def note_failure(self, replica: Replica, error: BaseException) -> bool:
        """Drop a replica that is gone; True when it had refused the call, which another may run."""
        if not _says_gone(error):
            return False
        self.drop(replica)
        return self.replaceable and _was_refused(error)

    def drop(self, replica: Replica) -> None:
        """Send nothing to a replica any more, where another can take its place."""
        if not self.replaceable:
            return
        with _counts:
            self._replicas = {i: each for i, each in self._replicas.items() if each is not replica}
            replica.users.discard(self)

    def take_all(self) -> list[Replica]:
        """Give every replica to whoever closes them; others take their place, where that can be."""
        with self._opening:  # one that is being opened is closed as well
            replicas = self.replicas
            for replica in replicas:
                _drop_everywhere(replica)
            return replicas

    def scale_down(self) -> None:
        """Give up extra replicas that have stood idle long enough, and that no other object uses."""
        self._prune()
        with self._opening:  # who opens one in its place would lose that as well
            with _counts:
                now = time.monotonic()
                gone = [
                    replica
                    for replica in list(self._replicas.values())[1:]
                    if replica.in_flight == 0
                    and now - replica.idle_since >= IDLE_S
                    and not any(pool is not self for pool in replica.users)
                ]
                for replica in gone:
                    self.drop(replica)
            for replica in gone:
                replica.ref.release()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is in flight and no extra replica is open."""
        with _counts:
            return len(self._replicas) <= 1 and self.in_flight == 0


def _was_refused(error: BaseException) -> bool:
    """Tell whether an instance that was closed refused a call, so that it did not run."""
    return isinstance(error, InstanceClosedError) and error.refused and _is_own(error)


def _says_gone(error: BaseException) -> bool:
    gone = (InstanceLostError, InstanceClosedError, PlacementError)
    return isinstance(error, gone) and _is_own(error)


def _is_own(error: BaseException) -> bool:
    """Tell an instance's own end from that of another one, whose error its user code let through."""
    return not isinstance(error.__cause__, RemoteTraceback)


# -- what the objects of this process share -------------------------------------------------------

_Weak = weakref.WeakValueDictionary[tuple[object, ...], _T]

_pools: weakref.WeakKeyDictionary[ControlPlaneClient, _Weak[Pool]] = weakref.WeakKeyDictionary()
_replicas: weakref.WeakKeyDictionary[ControlPlaneClient, _Weak[Replica]] = (
    weakref.WeakKeyDictionary()
)


def shared_pool(
    client: ControlPlaneClient, key: tuple[object, ...], make: Callable[[], Pool]
) -> Pool:
    """Give this process's pool of a key, made by the first who asks; objects and calls keep it."""
    with _counts:
        pools = _pools.setdefault(client, weakref.WeakValueDictionary())
        pool = pools.get(key)
        if pool is None:
            pools[key] = pool = make()
        return pool


def pool_of(client: ControlPlaneClient, ref: InstanceRef, *, label: str, max_pending: int) -> Pool:
    """Give this process's pool of one instance that lives: it has this replica and no other."""
    with _counts:
        pools = _pools.setdefault(client, weakref.WeakValueDictionary())
        key = (*_key(ref), max_pending)
        pool = pools.get(key)
        # Not that of an earlier instance of the same name, which was closed since.
        if pool is None or not pool.serves(ref):
            pool = Pool(lambda _: ref, label=label, max_pending=max_pending, client=client)
            pool.primary(lambda: None)
            pools[key] = pool
        return pool


def close_everywhere(client: ControlPlaneClient, ref: InstanceRef) -> CloseReport:
    """Close an instance, whichever objects of this process use it."""
    with _counts:
        _drop_everywhere(_known_replica(client, ref))
    return ref.close()


def _known_replica(client: ControlPlaneClient | None, ref: InstanceRef) -> Replica:
    if client is None:
        return Replica(ref)
    replicas = _replicas.setdefault(client, weakref.WeakValueDictionary())
    known = replicas.get(_key(ref))
    if known is None or not known.ref.is_same(ref):
        replicas[_key(ref)] = known = Replica(ref)
    return known


def _key(ref: InstanceRef) -> tuple[object, ...]:
    handle = ref.handle
    return handle.app, handle.cls, handle.instance_id


def _drop_everywhere(replica: Replica) -> None:
    with _counts:
        for pool in list(replica.users):
            pool.drop(replica)


class _Keeper:
    """Keeps pools as long as calls are in flight there, or replicas open that are to be closed.

    Objects and jobs may be gone by then. One daemon thread looks, started with the first pool.
    """

    def __init__(self) -> None:
        self._kept: set[Pool] = set()
        self._thread: threading.Thread | None = None

    def keep(self, pool: Pool) -> None:
        """Keep a pool until it is at rest; called with the lock held."""
        self._kept.add(pool)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="apothic-scale-down", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(min(1.0, IDLE_S / 2))
            self._look()  # apart, since a variable here would keep what it had last

    def _look(self) -> None:
        with _counts:
            pools = list(self._kept)
        for pool in pools:
            ended = False
            try:
                pool.scale_down()
            except Exception:
                ended = True  # its engine is gone, and everything with it
            with _counts:
                if ended or pool.is_at_rest:
                    self._kept.discard(pool)


_keeper = _Keeper()
