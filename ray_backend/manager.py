"""The manager: one detached actor per cluster that ends what nobody keeps alive any more.

It is on the path of no call. Losing it loses nothing: Ray restarts it, it reads the leases back and
goes on sweeping. Its name carries the protocol version, so that jobs with two releases of this package
can share a cluster.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from ray_backend import ray_api
from ray_backend.leases import LeaseBook
from ray_backend.names import NAMESPACE, PROTOCOL_VERSION
from ray_backend.registry import Registry
from ray_backend.revival import Reviver
from ray_backend.sandbox.sweeping import NodeSweeper, RayTasks

__all__ = [
    "CLOSING_GROUP",
    "CLOSING_THREADS",
    "Manager",
    "instance_names",
    "remove_actor",
    "stop_actor",
]

SWEEP_S = 0.5
LOOK_EVERY = 2
SLOW_SWEEP_EVERY = 120
STOP_THREADS = 16

DRAIN_S = 10.0
HOOKS_S = 30.0
REMOVAL_S = 10.0

_GONE: dict[str, Any] = {
    "closed": False,
    "hooks": [],
    "interrupted_calls": 0,
    "note": "it was gone already",
}


CLOSING_GROUP = "closing"
"""The threads that wait for instances to stop, so that whoever starts one never waits for those."""

CLOSING_THREADS = 64


class Manager:
    """The actor's plain class; its methods may run side by side."""

    def __init__(self) -> None:
        """Read the leases back and start to sweep."""
        self._registry = Registry()
        self._book = LeaseBook(self._registry, self)
        self._reviver = Reviver(
            self._registry, self._book, self.begin_move, self.end_move, remove_actor
        )
        tasks = RayTasks(self._registry.cluster_id())
        self._sweeper = NodeSweeper(self._registry, tasks, self._book.records)
        self._unused_specs: set[str] = set()
        self._unused_blobs: set[str] = set()
        self._stops = ThreadPoolExecutor(STOP_THREADS, thread_name_prefix="apothic-stop")
        self._running_stops: dict[str, Future[bool]] = {}
        self._stops_lock = threading.Lock()
        threading.Thread(target=self._sweep_for_ever, name="apothic-sweep", daemon=True).start()

    # -- what clients ask ------------------------------------------------------------------------

    def acquire(self, name: str, holder: str, record: dict[str, Any]) -> bool:
        """Lease an instance that is about to be made; False while one of this name is stopping."""
        return self._book.acquire(name, holder, record, lambda: actor_of(name) is not None)

    def acquire_sandbox(
        self,
        name: str,
        holder: str,
        record: dict[str, Any],
        max_sessions: int,
    ) -> tuple[bool, int]:
        """Lease a session about to be made, unless too many live: then tell how many."""
        return self._book.acquire_sandbox(
            name, holder, record, max_sessions, lambda: actor_of(name) is not None
        )

    def join(self, name: str, holder: str) -> bool:
        """Lease an instance that exists."""
        return self._book.join(name, holder)

    def release(self, name: str, holder: str) -> None:
        """Give up a lease; the instance is stopped when it was the last."""
        if self._book.release(name, holder):
            self._stops.submit(self._stop, name)

    def release_all(self, holder: str) -> list[dict[str, Any]]:
        """Give up all leases of a holder, and wait until what nobody else keeps has stopped."""
        stops = [
            self._stops.submit(self._stop, name)
            for name in self._book.held_by(holder)
            if self._book.release(name, holder)
        ]
        return [stop.result() for stop in stops]

    def stop_all(self) -> list[dict[str, Any]]:
        """Stop every instance, named ones too: the cluster is about to end."""
        names = list(set(self._book.records()) | set(self.instance_names()))
        for name in names:
            self._book.begin_stop(name)
        return list(self._stops.map(self._stop, names))

    def close(self, name: str, actor_id: str | None) -> dict[str, Any]:
        """Stop an instance now, whoever holds it; with an actor id only that very actor."""
        if actor_id is not None and not self._book.is_paused(name):
            current = actor_of(name)
            if current is None:
                self._book.drop_lost(name)
            if current != actor_id:
                # Another took the name since, or is about to, and the lease is that one's.
                return {"name": name, **_GONE}
            return self._stop(name, actor_id)
        return self._stop(name)

    def begin_move(self, name: str, actor_id: str, has_room: bool = False) -> bool:
        """Remove an actor that waits for room, so that another takes its name and lease.

        Nobody else gets the name before `end_move`. False when there is nothing to move: the actor
        has its room by now, unless with ``has_room``, is another one, or is being stopped.
        """
        if not self._book.pause(name):
            return False
        moving = False
        try:
            seat = ray_api.actor_seat(actor_id)
            if seat is not None and (seat.waits or has_room) and actor_of(name) == actor_id:
                self._registry.mark_moved(actor_id)
                remove_actor(name)
                moving = True
        finally:
            if not moving:
                self._book.resume(name)
        return moving

    def end_move(self, name: str) -> bool:
        """Give the name free; False when the instance was closed meanwhile, and must go."""
        return self._book.resume(name)

    def free_resources(self) -> dict[str, dict[str, float]]:
        """Tell what is free on each node, to clients behind a proxy, which cannot see it."""
        return ray_api.free_resources()

    def seat(self, actor_id: str) -> ray_api.ActorSeat | None:
        """Tell where an actor is, to clients behind a proxy."""
        return ray_api.actor_seat(actor_id)

    def seats(self, state: str | None = None) -> list[ray_api.ActorSeat]:
        """Tell where all actors are, to clients behind a proxy."""
        return ray_api.actor_seats(state)

    def forget(self, name: str, actor_id: str | None = None) -> None:
        """Drop the lease of an instance that is gone; with an actor id, unless another has the name."""
        if actor_id is None or actor_of(name) in (None, actor_id):
            self._book.forget(name)

    def abandon(self, name: str) -> None:
        """Drop the lease of an instance that could not be made, unless others may be making it."""
        self._book.abandon(name)

    def records(self) -> dict[str, dict[str, Any]]:
        """Give all leases."""
        return self._book.records()

    def instances(self) -> dict[str, dict[str, Any]]:
        """Give the leases of the instances that exist, with what Ray knows of each, asking none."""
        found = {}
        exist = set(self.instance_names())
        for name, lease in self.records().items():
            if name not in exist:
                continue
            try:
                actor = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:
                continue  # it has ended since
            record = ray_api.actor_record(actor._actor_id.hex())
            found[name] = {
                **lease,
                "state": "ready" if record.get("State") == "ALIVE" else "starting",
                "restarts": int(record.get("NumRestarts", 0)),
                "pid": record.get("Pid") or None,
                "node_id": record.get("Address", {}).get("NodeID") or None,
            }
        return found

    def ping(self) -> int:
        """Give the protocol version."""
        return PROTOCOL_VERSION

    # -- what the book asks ----------------------------------------------------------------------

    def live_jobs(self) -> set[str]:
        """Name the jobs whose driver lives."""
        return ray_api.live_jobs()

    def actor_is_alive(self, actor_id: str) -> bool:
        """Tell whether an actor that holds leases lives."""
        return ray_api.actor_is_alive(actor_id)

    def instance_names(self) -> list[str]:
        """Name the instance actors that exist."""
        return instance_names()

    def stop(self, name: str) -> None:
        """Stop an instance in the background."""
        self._stops.submit(self._stop, name)

    # -- inside ----------------------------------------------------------------------------------

    def _stop(self, name: str, actor_id: str | None = None) -> dict[str, Any]:
        """Stop what has a name, or only a certain actor; once for all who ask for it meanwhile."""
        mine: Future[bool] = Future()
        while True:
            with self._stops_lock:
                running = self._running_stops.setdefault(name, mine)
            if running is mine:
                break
            # What it stopped was the one that is meant here, unless that one still has the name.
            if running.result() and (actor_id is None or actor_of(name) != actor_id):
                return {"name": name, **_GONE, "note": "somebody else was closing it"}
        report: dict[str, Any] | None = None
        try:
            report = self._stop_now(name, actor_id)
        finally:
            with self._stops_lock:
                del self._running_stops[name]
            mine.set_result(report is not None)
        return {"name": name, **(report or _GONE)}

    def _stop_now(self, name: str, actor_id: str | None) -> dict[str, Any] | None:
        noted = self._book.begin_stop(name)
        try:
            report = stop_only(name, actor_id)
        except Exception:
            traceback.print_exc()
            report = {**_GONE, "note": "stop failed"}
        if report is None:  # somebody stopped it before, and the lease may be another's
            if noted:
                self._book.end_stop(name)
            return None
        seat = report.pop("left_nothing_on", None)
        if seat:
            self._registry.leave_seat(seat, name)
        self._book.forget(name)
        return report

    def _sweep_for_ever(self) -> None:
        rounds = 0
        while True:
            time.sleep(SWEEP_S)
            rounds += 1
            try:
                for name in self._book.sweep():
                    self.stop(name)
                if rounds % LOOK_EVERY == 0:
                    self._reviver.sweep(instance_names())
                    self._sweeper.look()
                if rounds % SLOW_SWEEP_EVERY == 0:
                    self._sweep_store()
            except Exception:
                # The next round tries again; a GCS that restarts is away for a while.
                print("apothic manager: sweep failed", file=sys.stderr)
                traceback.print_exc()

    def _sweep_store(self) -> None:
        """Remove specs and code that no app and no instance uses any more.

        A spec that was stored a moment ago for an instance about to be leased must not go: only what
        two sweeps in a row found unused does.
        """
        self._sweeper.forget_dead_nodes()
        self._registry.sweep_words()
        unused = self._registry.unused_specs(self._book.records().values())
        for digest in unused & self._unused_specs:
            self._registry.delete_spec(digest)
        self._unused_specs = unused
        self._unused_blobs = self._registry.sweep_blobs(self._unused_blobs)


for _name in ("close", "release_all", "stop_all"):
    getattr(Manager, _name).__ray_concurrency_group__ = CLOSING_GROUP


def instance_names() -> list[str]:
    """Name the instance actors of this namespace; the manager and others have no ``:``."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return [
        entry["name"] for entry in found if entry["namespace"] == NAMESPACE and ":" in entry["name"]
    ]


def actor_of(name: str) -> str | None:
    """Give the id of the actor that has a name, in hex, or None."""
    try:
        found: str = ray.get_actor(name, namespace=NAMESPACE)._actor_id.hex()
    except ValueError:
        return None
    return found


def stop_actor(name: str) -> dict[str, Any]:
    """Stop an instance with its exit hooks, then remove its actor and wait until the name is free."""
    return stop_only(name, None) or dict(_GONE)


def stop_only(name: str, actor_id: str | None) -> dict[str, Any] | None:
    """Do the same; None where there is an ``actor_id`` and that actor does not have the name."""
    try:
        actor = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return dict(_GONE) if actor_id is None else None
    if actor_id not in (None, actor._actor_id.hex()):
        return None
    seat = ray_api.actor_seat(actor._actor_id.hex())
    report = dict(_GONE)
    if seat is not None and seat.waits:
        # No process of it runs, so that nothing would answer before there is room.
        _remove(actor, name)
        return {**report, "closed": True, "note": "it had not started"}
    try:
        report = ray.get(
            actor.apothic_stop.remote(DRAIN_S, HOOKS_S), timeout=DRAIN_S + HOOKS_S + 15.0
        )
    except ray.exceptions.GetTimeoutError:
        report = {**_GONE, "closed": True, "note": "it did not answer and was killed"}
    except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError):
        pass
    _remove(actor, name)
    return report


def remove_actor(name: str) -> None:
    """Kill the actor of a name for good, and wait until the name is free."""
    with contextlib.suppress(ValueError):
        _remove(ray.get_actor(name, namespace=NAMESPACE), name)


def _remove(actor: Any, name: str) -> None:
    """Kill an actor for good, and wait until it does not have its name any more."""
    try:
        ray.kill(actor, no_restart=True)
    except Exception:
        return  # it is gone
    deadline = time.monotonic() + REMOVAL_S
    while time.monotonic() < deadline and actor_of(name) == actor._actor_id.hex():
        time.sleep(0.002)
