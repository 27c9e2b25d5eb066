"""Who sits on the nodes: which actors hold the room, and whether one that waits is about to start."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote

from ray_backend.names import NAMESPACE, SESSION_MARK
from ray_backend.placement.demand import Plan
from ray_backend.placement.live import ClusterView
from ray_backend.ray_api import ActorSeat

__all__ = ["holders", "may_be_starting"]

_SLACK = 1e-3
_HELD = ("CPU", "GPU", "memory")


def holders(plan: Plan, seats: Sequence[ActorSeat]) -> list[str]:
    """Name the actors that hold CPUs, GPUs or memory on the nodes that would do."""
    nodes = {node_id for match in plan.survey.matches for node_id in match.room}
    return sorted(
        _label(seat)
        for seat in seats
        if seat.seated
        and seat.state != "DEAD"
        and seat.node_id in nodes
        and any(seat.resources.get(name) for name in _HELD)
    )


def may_be_starting(seat: ActorSeat, view: ClusterView, seats: Sequence[ActorSeat]) -> bool:
    """Tell whether the node that an actor waits at may have given it its room already.

    Ray lists an actor that queues and one whose worker is being started, with a runtime environment
    that may take minutes, in the same way. But the second holds its resources: there is more in use
    on the node than its other actors account for.
    """
    if view.available is None:
        return True
    total = next((node["Resources"] for node in view.nodes if node["NodeID"] == seat.node_id), None)
    if total is None:
        return False
    free = view.available.get(seat.node_id, {})
    others = [
        other.resources
        for other in seats
        if other.node_id == seat.node_id
        and other.seated
        and other.state != "DEAD"
        and other.actor_id != seat.actor_id
    ]
    for name, amount in seat.resources.items():
        used = total.get(name, 0.0) - free.get(name, 0.0)
        explained = sum(other.get(name, 0.0) for other in others)
        if used - explained < amount * (1 - _SLACK):
            return False
    return True


def _label(seat: ActorSeat) -> str:
    if seat.namespace == NAMESPACE and seat.name.count(":") >= 2:
        app, cls, instance_id = seat.name.split(":", 2)
        return f"{app}.{cls.removeprefix(SESSION_MARK)} {unquote(instance_id)!r}"
    return f"Ray actor {seat.class_name}" + (f" {seat.name!r}" if seat.name else "")
