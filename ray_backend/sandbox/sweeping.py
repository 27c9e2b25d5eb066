"""Which nodes are swept of what dead sessions left there, and when; and the sweep as it runs on one.

A session's actor leaves a word in the registry, its seat, before it makes anything on its node. The seat
of a session that was closed and left nothing goes with it. Any other outlives its session: the manager
has the node swept, and once more later, as an engine may still carry out what it was told by a process
that is dead. So a manager that was killed goes on where it was, and a node without seats costs nothing.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_backend import ray_api
from ray_backend.names import NAMESPACE
from ray_backend.registry import Registry

__all__ = ["INTERVAL_S", "NodeSweeper", "sweep_at_arrival", "sweep_node"]

INTERVAL_S = 30.0
"""Seconds between two sweeps of a node that has sessions."""

SETTLE_S = 5.0
"""Seconds from the sweep after a session's end to the second one, which finds what came late."""

MAX_INTERVAL_S = 600.0
"""The same after many failures in a row: an engine that is gone may come back."""


def sweep_node(cluster_id: str) -> tuple[str, ...]:
    """Sweep the node that this process is on; give the names of what was removed.

    Raises:
        SandboxEngineError: when the engine fails.
    """
    # Imported where a sweep runs: docker-py takes 50 ms.
    from ray_backend.sandbox.engine.connection import Engine
    from ray_backend.sandbox.engine.sweep import sweep

    registry = Registry()
    engine = Engine.connect()
    try:
        swept = sweep(engine, registry.list_leases, cluster_id, NAMESPACE)
    finally:
        engine.close()
    return (*swept.containers, *swept.volumes, *swept.networks)


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


@dataclass
class _Node:
    """What is known of a node between two looks.

    Attributes:
        due: when it is swept next, on the clock.
        task: the sweep that runs there, an ObjectRef; None between two.
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
    """Has nodes swept by short tasks pinned to them, one at a time on each; `look` never waits."""

    def __init__(
        self,
        registry: Registry,
        cluster_id: str,
        leased: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what the registry has.

        Args:
            registry: where the seats are.
            cluster_id: ours.
            leased: gives the names of the sessions that have a lease.
            clock: in seconds.
        """
        self._registry = registry
        self._cluster_id = cluster_id
        self._leased = leased
        self._clock = clock
        self._nodes: dict[str, _Node] = {}

    def look(self) -> None:
        """Take note of sweeps that have ended, and begin those that are due."""
        seats = self._registry.list_seats()
        leased = set(self._leased()) if seats else set()
        due = []
        for node_id, names in seats.items():
            ended = frozenset(names - leased)
            node = self._nodes.setdefault(node_id, _Node(self._clock() + INTERVAL_S))
            if node.task is not None:
                self._collect(node_id, node)
            elif not node.failures and ended - node.swept:
                node.due = self._clock()
            if node.task is None and node.due <= self._clock():
                node.covers = ended
                due.append(node_id)
        for node_id in self._nodes.keys() - seats.keys():
            if self._nodes[node_id].task is None:
                del self._nodes[node_id]
            else:
                self._collect(node_id, self._nodes[node_id])
        if due:
            self._begin(due)

    def forget_dead_nodes(self) -> None:
        """Drop what was noted of nodes that have left the cluster; now and then is enough."""
        alive = _live_nodes()
        for node_id in self._registry.list_seen_nodes():
            if node_id not in alive:
                self._registry.forget_node(node_id)

    def _begin(self, due: list[str]) -> None:
        alive = _live_nodes()
        for node_id in due:
            if node_id not in alive:
                self._registry.forget_node(node_id)
                continue
            pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
            task = _sweep_task().options(scheduling_strategy=pinned)
            self._nodes[node_id].task = task.remote(self._cluster_id)

    def _collect(self, node_id: str, node: _Node) -> None:
        done, _ = ray.wait([node.task], timeout=0)
        if not done:
            return
        task, node.task = node.task, None
        try:
            removed = ray.get(task)
        except Exception as error:
            node.failures += 1
            wait_s = min(MAX_INTERVAL_S, INTERVAL_S * 2 ** (node.failures - 1))
            node.due = self._clock() + wait_s
            first = str(error).strip().splitlines()[-1:]
            print(
                f"apothic manager: node {node_id} was not swept, again in {wait_s:g} s: {first}",
                file=sys.stderr,
            )
            return
        if removed:
            print(f"apothic manager: swept from node {node_id}: {', '.join(removed)}")
        node.failures = 0
        node.due = self._clock() + (SETTLE_S if node.covers - node.swept else INTERVAL_S)
        # One that was opened again under its name meanwhile took its lease first, then its seat.
        for name in (node.covers & node.swept).difference(self._leased()):
            self._registry.leave_seat(node_id, name)
        node.swept = node.covers - node.swept


def _live_nodes() -> set[str]:
    return {str(node["NodeID"]) for node in ray_api.live_nodes() if node["Alive"]}


@functools.cache
def _sweep_task() -> Any:
    """Give the task, which is exported once per process."""
    make: Any = ray.remote
    return make(num_cpus=0, max_retries=0)(sweep_node)
