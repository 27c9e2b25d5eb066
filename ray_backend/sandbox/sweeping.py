"""Which nodes are swept of what dead sessions left there, and when; and the sweep as it runs on one.

A session's actor leaves a word in the registry, its seat, before it makes anything on its node. The seat
of a session that was closed and left nothing goes with it. Any other outlives its session: the manager
has the node swept, and once more later, as an engine may still carry out what it was told by a process
that is dead. So a manager that was killed goes on where it was, and a node without seats costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_backend import ray_api
from ray_backend.directories import local_root
from ray_backend.names import NAMESPACE
from ray_backend.registry import Registry

__all__ = [
    "INTERVAL_S",
    "MAX_INTERVAL_S",
    "SETTLE_S",
    "NodeSweeper",
    "RayTasks",
    "SeatStore",
    "Tasks",
    "sweep_at_arrival",
    "sweep_behind_raylet",
    "sweep_dead_raylets",
    "sweep_node",
]

INTERVAL_S = 30.0
"""Seconds between two sweeps of a node that has sessions."""

SETTLE_S = 5.0
"""Seconds from the sweep after a session's end to the second one, which finds what came late."""

MAX_INTERVAL_S = 600.0
"""Seconds after many failures in a row, the first of which costs `SETTLE_S`: an engine may come back."""


def sweep_node(cluster_id: str) -> tuple[str, ...]:
    """Sweep the node that this process is on; give the names of what was removed.

    Raises:
        SandboxEngineError: when the engine fails.
    """
    # Imported where a sweep runs: docker-py takes 50 ms.
    from ray_backend.sandbox.engine.connection import Engine
    from ray_backend.sandbox.engine.sweep import sweep

    registry = Registry()
    with contextlib.closing(Engine.connect()) as engine:
        swept = sweep(engine, registry.list_leases, cluster_id, NAMESPACE)
    return (*swept.containers, *swept.volumes, *swept.networks, *swept.links)


def sweep_at_arrival(cluster_id: str) -> None:
    """Sweep what an earlier cluster left on this node, before its first session gets in its way.

    A failure is told in the log alone: the session meets the same engine, and says what is wrong.
    """
    try:
        removed = sweep_node(cluster_id)
    except Exception:
        traceback.print_exc()
        return
    if removed:
        print(f"apothic: removed what was left on this node: {', '.join(removed)}", file=sys.stderr)


def sweep_dead_raylets() -> None:
    """Remove what the sessions of raylets left that are dead; again a little later, for what came late.

    Raises:
        SandboxEngineError: when the engine fails.
    """
    from ray_backend.sandbox.engine.connection import Engine
    from ray_backend.sandbox.engine.sweep import sweep

    with contextlib.closing(Engine.connect()) as engine:
        for wait_s in (0.0, SETTLE_S):
            time.sleep(wait_s)
            sweep(engine, tuple, cluster_id="", namespace=NAMESPACE)


_BEHIND = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit()  # another of the node's sessions has begun it
from ray_backend.sandbox.sweeping import sweep_dead_raylets
sweep_dead_raylets()
"""


def sweep_behind_raylet() -> None:
    """Have `sweep_dead_raylets` run in a process of its own, since Ray ends this one any moment.

    For a session's process whose raylet has died: it removes its container itself if it has the time.
    """
    lock = local_root() / "locks" / "dead-raylets"
    lock.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        # Ray ends the children of its workers; this is nobody's child.
        ["/bin/sh", "-c", '"$@" &', "sh", sys.executable, "-c", _BEHIND, str(lock)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
        check=False,
    )


class SeatStore(Protocol):
    """Where seats are kept."""

    def list_seats(self) -> Mapping[str, Collection[str]]:
        """Name the sessions that may have something on a node, by node id."""

    def leave_seat(self, node_id: str, actor_name: str) -> None:
        """Note that nothing of a session is on a node any more."""

    def list_seen_nodes(self) -> Collection[str]:
        """Name the nodes on which a session ever was."""

    def forget_node(self, node_id: str) -> None:
        """Forget a node with the seats on it."""


class Tasks(Protocol):
    """Sweeps on nodes, none of which is waited for."""

    def live_nodes(self) -> Collection[str]:
        """Name the nodes that are in the cluster now."""

    def begin(self, node_id: str) -> Any:
        """Begin a sweep; give what the other verbs know it by."""

    def done(self, task: Any) -> bool:
        """Tell whether a sweep has ended."""

    def result(self, task: Any) -> Sequence[str]:
        """Give the names of what one removed, or raise how it failed."""


class RayTasks:
    """Short Ray tasks, pinned to their nodes: one whose node has gone fails at once."""

    def __init__(self, cluster_id: str) -> None:
        """Sweep for this cluster."""
        self._cluster_id = cluster_id
        make: Any = ray.remote
        self._sweep = make(num_cpus=0, max_retries=0)(sweep_node)

    def live_nodes(self) -> Collection[str]:
        """Name the nodes that are in the cluster now."""
        return {str(node["NodeID"]) for node in ray_api.live_nodes() if node["Alive"]}

    def begin(self, node_id: str) -> Any:
        """Begin a sweep; give its ObjectRef."""
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return self._sweep.options(scheduling_strategy=pinned).remote(self._cluster_id)

    def done(self, task: Any) -> bool:
        """Tell whether a sweep has ended."""
        return bool(ray.wait([task], timeout=0)[0])

    def result(self, task: Any) -> Sequence[str]:
        """Give the names of what one removed, or raise how it failed."""
        removed: Sequence[str] = ray.get(task)
        return removed


@dataclass
class _Node:
    """What is known of a node between two looks.

    Attributes:
        due: when it is swept next, on the clock.
        task: the sweep that runs there; None between two.
        covers: the ended sessions that were known when it began.
        swept: ended sessions that one sweep has covered; another is to follow.
        failures: in a row.
    """

    due: float
    task: Any = None
    covers: frozenset[str] = frozenset()
    swept: frozenset[str] = frozenset()
    failures: int = 0


class NodeSweeper:
    """Has nodes swept, one sweep at a time on each; plain, with its surroundings handed in."""

    def __init__(
        self,
        seats: SeatStore,
        tasks: Tasks,
        leased: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what the store has.

        Args:
            seats: the store.
            tasks: the sweeps.
            leased: gives the names of the sessions that have a lease.
            clock: in seconds.
        """
        self._seats = seats
        self._tasks = tasks
        self._leased = leased
        self._clock = clock
        self._nodes: dict[str, _Node] = {}

    def look(self) -> None:
        """Take note of sweeps that have ended, and begin those that are due; never waits."""
        for node_id, node in self._nodes.items():
            if node.task is not None and self._tasks.done(node.task):
                self._take_note(node_id, node)
        seats = self._seats.list_seats()
        leased = set(self._leased()) if seats else set()
        due = []
        for node_id, names in seats.items():
            node = self._nodes.setdefault(node_id, _Node(self._clock() + INTERVAL_S))
            ended = frozenset(names) - leased
            if ended - node.swept and not node.failures:
                node.due = self._clock()
            if node.task is None and node.due <= self._clock():
                node.covers = ended
                due.append(node_id)
        for node_id in self._nodes.keys() - seats.keys():
            if self._nodes[node_id].task is None:
                del self._nodes[node_id]
        if due:
            self._begin(due)

    def forget_dead_nodes(self) -> None:
        """Drop what was noted of nodes that have left the cluster; now and then is enough."""
        alive = self._tasks.live_nodes()
        for node_id in self._seats.list_seen_nodes():
            if node_id not in alive:
                self._seats.forget_node(node_id)

    def _begin(self, due: list[str]) -> None:
        alive = self._tasks.live_nodes()
        for node_id in due:
            if node_id in alive:
                self._nodes[node_id].task = self._tasks.begin(node_id)
            else:
                self._seats.forget_node(node_id)

    def _take_note(self, node_id: str, node: _Node) -> None:
        task, node.task = node.task, None
        try:
            removed = self._tasks.result(task)
        except Exception as error:
            node.failures += 1
            wait_s = min(MAX_INTERVAL_S, SETTLE_S * 2 ** (node.failures - 1))
            node.due = self._clock() + wait_s
            why = str(error).strip().rpartition("\n")[2]
            print(
                f"apothic manager: node {node_id} was not swept, again in {wait_s:g} s: {why}",
                file=sys.stderr,
            )
            return
        if removed:
            print(f"apothic manager: swept from node {node_id}: {', '.join(removed)}")
        node.failures = 0
        once, twice = node.covers - node.swept, node.covers & node.swept
        node.due = self._clock() + (SETTLE_S if once else INTERVAL_S)
        # One that was opened again under its name meanwhile took its lease first, then its seat.
        for name in twice.difference(self._leased()):
            self._seats.leave_seat(node_id, name)
        node.swept = once
