"""`LeaseBook`: who keeps which instance alive; plain, with its surroundings handed in.

An instance is leased to holders: jobs (``job:<id>``), actors (``actor:<id>``), or ``pinned`` for a named
one, which lives until it is closed. It ends when its last holder has gone. Every change is written
through to the store first, so that a manager that was killed comes back where it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

__all__ = ["PINNED", "SANDBOX", "LeaseBook", "LeaseStore", "Surroundings"]

PINNED = "pinned"

SANDBOX = "sandbox"
"""The ``kind`` in the lease of a sandbox session; that of an instance of a class has none."""

CREATION_GRACE_S = 20.0
"""Seconds that a lease may stand without its actor: creating one takes a moment."""

ORPHAN_SIGHTINGS = 3
"""Sweeps in a row that must see an actor without a lease before it counts as an orphan."""


class LeaseStore(Protocol):
    """Where leases are kept."""

    def put_lease(self, actor_name: str, record: dict[str, Any]) -> None: ...
    def get_lease(self, actor_name: str) -> dict[str, Any] | None: ...
    def list_leases(self) -> list[str]: ...
    def forget_lease(self, actor_name: str) -> None: ...


class Surroundings(Protocol):
    """What the book sees and does outside."""

    def live_jobs(self) -> set[str]: ...
    def actor_is_alive(self, actor_id: str) -> bool: ...
    def instance_names(self) -> Iterable[str]: ...
    def stop(self, actor_name: str) -> None: ...


class LeaseBook:
    """Leases by actor name."""

    def __init__(
        self,
        store: LeaseStore,
        surroundings: Surroundings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load what the store has."""
        self._store = store
        self._outside = surroundings
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, float] = {}
        self._came: set[str] = set()
        self._asked: dict[str, int] = {}
        self._orphans: dict[str, int] = {}
        self._stopping: set[str] = set()
        self._paused: set[str] = set()
        for name in store.list_leases():
            record = store.get_lease(name)
            if record is not None:
                self._leases[name] = record
                self._seen[name] = clock()
                self._asked[name] = 2  # who has asked is not known any more

    def acquire(
        self,
        name: str,
        holder: str,
        record: dict[str, Any],
        exists: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Add a holder; the first one writes ``record``.

        Args:
            name: its actor's.
            holder: who wants it.
            record: what the lease says where this writes it.
            exists: whether there is an actor of the name; asked where there was one before. If it
                was lost, its lease, and what is stored with it, does not count for the new one.

        Returns:
            False while the name is held back: what has it is being stopped or moved.
        """
        with self._lock:
            self._forget_if_lost(name, exists)
            return self._acquire(name, holder, record)

    def _acquire(self, name: str, holder: str, record: dict[str, Any]) -> bool:
        if self._is_held_back(name):
            return False
        lease = self._leases.get(name)
        if lease is None:
            lease = {**record, "holders": []}
            self._asked[name] = 0
        if holder not in lease["holders"]:
            lease = {**lease, "holders": [*lease["holders"], holder]}
        self._store.put_lease(name, lease)
        self._leases[name] = lease
        self._seen[name] = self._clock()
        self._asked[name] += 1
        return True

    def acquire_sandbox(
        self,
        name: str,
        holder: str,
        record: dict[str, Any],
        max_sessions: int,
        exists: Callable[[], bool] = lambda: True,
    ) -> tuple[bool, int]:
        """As `acquire`, for a session of a definition of which so many may live at once.

        Args:
            name: as for `acquire`, and so are the others.
            holder: as for `acquire`.
            record: as for `acquire`.
            max_sessions: how many.
            exists: as for `acquire`.

        Returns:
            Whether it is leased now, and when it is not since too many live, how many; else 0.
        """
        key = (record["app"], record["sandbox"])
        with self._lock:
            self._forget_if_lost(name, exists)
            if name not in self._leases:
                alive = sum(
                    lease.get("kind") == SANDBOX and (lease["app"], lease["sandbox"]) == key
                    for other, lease in self._leases.items()
                    if other not in self._stopping
                )
                if alive >= max_sessions:
                    return False, alive
            return self._acquire(name, holder, record), 0

    def join(self, name: str, holder: str) -> bool:
        """Add a holder to a lease that exists; False when there is none, or it is stopping."""
        with self._lock:
            if self._is_held_back(name) or name not in self._leases:
                return False
            lease = self._leases[name]
            if PINNED not in lease["holders"] and holder not in lease["holders"]:
                lease = {**lease, "holders": [*lease["holders"], holder]}
                self._store.put_lease(name, lease)
                self._leases[name] = lease
            return True

    def release(self, name: str, holder: str) -> bool:
        """Take a holder away; True when nobody is left and the instance is now stopping."""
        with self._lock:
            lease = self._leases.get(name)
            if lease is None or holder not in lease["holders"]:
                return False
            lease = {**lease, "holders": [h for h in lease["holders"] if h != holder]}
            self._leases[name] = lease
            if lease["holders"]:
                self._store.put_lease(name, lease)
                return False
            # The stored lease keeps its last holder until the stop is done: a manager that is killed
            # meanwhile finds it held by the dead or gone and stops it again.
            self._stopping.add(name)
            return True

    def begin_stop(self, name: str) -> bool:
        """Note that an instance is being stopped, so that nobody joins it; False if it was noted."""
        with self._lock:
            if name in self._stopping:
                return False
            self._stopping.add(name)
            return True

    def end_stop(self, name: str) -> None:
        """Give a name free that was to be stopped, where there was nothing to stop."""
        with self._lock:
            self._stopping.discard(name)

    def pause(self, name: str) -> bool:
        """Hold an instance's name back until `resume`, its lease kept; False where that cannot be.

        Whoever asks for the name meanwhile waits as for one that is stopping. If who paused it dies,
        its lease is dropped like one whose actor never came.
        """
        with self._lock:
            if self._is_held_back(name) or name not in self._leases:
                return False
            self._paused.add(name)
            self._seen[name] = self._clock()
            return True

    def is_paused(self, name: str) -> bool:
        """Tell whether a name is held back by `pause`."""
        with self._lock:
            return name in self._paused

    def resume(self, name: str) -> bool:
        """Give a paused name free; False when its lease has ended meanwhile."""
        with self._lock:
            self._paused.discard(name)
            if name not in self._leases or name in self._stopping:
                return False
            self._seen[name] = self._clock()
            self._came.discard(name)  # another actor is to come
            return bool(self._leases[name]["holders"])

    def keep(self, name: str) -> bool:
        """Keep a lease whose actor is gone for now and will be made again; False if there is none."""
        with self._lock:
            if self._is_held_back(name) or name not in self._leases:
                return False
            self._seen[name] = self._clock()
            return True

    def forget(self, name: str) -> None:
        """Drop the lease of an instance that is gone."""
        with self._lock:
            self._forget(name)

    def abandon(self, name: str) -> None:
        """Drop a lease whose actor could not be made, unless others asked for it and may make it.

        Where they do not, a sweep drops it.
        """
        with self._lock:
            if self._asked.get(name) == 1 and not self._is_held_back(name):
                self._forget(name)

    def drop_lost(self, name: str) -> None:
        """Drop the lease of an instance that was there and is gone, and that nobody is making again."""
        with self._lock:
            lease = self._leases.get(name, {})
            if lease.get("kind") == SANDBOX and not lease["named"]:
                self._came.add(name)  # only the one who made it has its name
            self._forget_if_lost(name, lambda: False)

    def _forget_if_lost(self, name: str, exists: Callable[[], bool]) -> None:
        if name in self._came and not self._is_held_back(name) and not exists():
            self._forget(name)

    def _is_held_back(self, name: str) -> bool:
        return name in self._stopping or name in self._paused

    def _forget(self, name: str) -> None:
        self._leases.pop(name, None)
        self._asked.pop(name, None)
        self._seen.pop(name, None)
        self._came.discard(name)
        self._orphans.pop(name, None)
        self._stopping.discard(name)
        self._paused.discard(name)
        self._store.forget_lease(name)

    def held_by(self, holder: str) -> list[str]:
        """Name the instances that a holder keeps alive, alone or with others."""
        with self._lock:
            return [name for name, lease in self._leases.items() if holder in lease["holders"]]

    def records(self) -> dict[str, dict[str, Any]]:
        """Give all leases."""
        with self._lock:
            return dict(self._leases)

    def sweep(self) -> list[str]:
        """Drop holders that are gone; name the instances to stop now, each once.

        These are the instances without a holder left, and actors of ours that have no lease, seen
        in several sweeps. Leases whose actor never came or has gone are dropped.
        """
        due: list[str] = []
        try:
            self._sweep(due)
        except BaseException:
            for name in due:  # no later sweep would find them
                self._outside.stop(name)
            raise
        return due

    def _sweep(self, due: list[str]) -> None:
        with self._lock:  # first: a job that is seen later than its lease would look dead
            known = {name: list(lease["holders"]) for name, lease in self._leases.items()}
        jobs = self._outside.live_jobs()
        names = set(self._outside.instance_names())
        for name, holders in known.items():
            for holder in holders:
                if not self._holder_lives(holder, jobs) and self.release(name, holder):
                    due.append(name)
            if not holders and not self.is_paused(name) and self.begin_stop(name):
                due.append(name)
        with self._lock:
            for name in known:
                if name not in self._leases:
                    continue
                if name in names:
                    self._seen[name] = self._clock()
                    self._came.add(name)
                elif name not in due and (
                    self._has_died(name) or self._clock() - self._seen[name] > CREATION_GRACE_S
                ):
                    self._forget(name)
        due.extend(self._find_orphans(names))

    def _has_died(self, name: str) -> bool:
        """Tell whether a session that was there, and is not, will not come back: no need to wait."""
        lease = self._leases[name]
        return (
            lease.get("kind") == SANDBOX
            and not lease["named"]
            and name in self._came
            and not self._is_held_back(name)
        )

    def _find_orphans(self, names: set[str]) -> list[str]:
        found = []
        with self._lock:
            loose = {n for n in names if n not in self._leases and n not in self._stopping}
            self._orphans = {name: self._orphans.get(name, 0) + 1 for name in loose}
            for name, sightings in self._orphans.items():
                if sightings >= ORPHAN_SIGHTINGS:
                    self._stopping.add(name)
                    found.append(name)
        return found

    def _holder_lives(self, holder: str, jobs: set[str]) -> bool:
        if holder == PINNED:
            return True
        kind, _, key = holder.partition(":")
        if kind == "job":
            return key in jobs
        return self._outside.actor_is_alive(key)
