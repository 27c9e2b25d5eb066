"""The pure matcher: constraints and offers in; matching kinds of nodes and reasons out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apothic.constraints import PlacementConstraints
from apothic.gpus import resolve_gpu
from ray_backend.placement.criteria import compile_criteria, gpu_rank
from ray_backend.placement.criterion import Criterion, Slice
from ray_backend.placement.offers import Kind, Offer, group_nodes

__all__ = ["Match", "Rejection", "Survey", "survey"]


@dataclass(frozen=True, slots=True)
class Match:
    """A kind of node that qualifies.

    Attributes:
        offer: the kind.
        room: for how many such containers each node of it that qualifies has room now, by node id.
        rank: place of its GPU in the ``gpu`` list.
        cost_per_hour_usd: price of the slice; None where the nodes state none.
        gpu_type: the ``accelerator_type:`` resource that by itself names the wanted GPU.
        started: False for a node type that the autoscaler could start.
    """

    offer: Offer
    room: Mapping[str, int]
    rank: int
    cost_per_hour_usd: float | None
    gpu_type: str | None
    started: bool = True


@dataclass(frozen=True, slots=True)
class Rejection:
    """Nodes that do not qualify, for one reason.

    Attributes:
        offer: the name of their kind.
        offer_id: its ``offer:`` resource, if it has one.
        nodes: how many; 0 for a node type that the autoscaler could start.
        parameter: the first parameter that they fail.
        has: what they have.
        wanted: what is wanted.
        capacity: whether Ray would keep containers away from them by itself.
    """

    offer: str
    offer_id: str | None
    nodes: int
    parameter: str
    has: str
    wanted: str
    capacity: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """Every kind of node, sorted into those that qualify and those that do not."""

    matches: tuple[Match, ...]
    rejections: tuple[Rejection, ...]

    @property
    def is_vacant(self) -> bool:
        """Whether no node is known at all."""
        return not self.matches and not self.rejections


def survey(
    constraints: PlacementConstraints,
    part: Slice,
    nodes: Sequence[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]] | None = None,
    registered: Sequence[Offer] = (),
) -> Survey:
    """Look at every kind of node; the result does not depend on the order of the nodes.

    Args:
        constraints: what must hold.
        part: what one container takes.
        nodes: as ``ray.nodes()`` gives them.
        available: free resources by node id; all resources count as free where it has no entry.
        registered: node types that the autoscaler could start.
    """
    criteria = compile_criteria(constraints, part)
    of_kind = [each for each in criteria if not each.per_node]
    of_node = [each for each in criteria if each.per_node]
    free = available or {}
    matches: list[Match] = []
    counts: dict[tuple[str, str | None, Criterion, str], int] = {}

    def reject(offer: Offer, criterion: Criterion, has: str, nodes: int) -> None:
        key = (offer.name, offer.offer_id, criterion, has)
        counts[key] = counts.get(key, 0) + nodes

    def accept(offer: Offer, room: Mapping[str, int], started: bool) -> None:
        rank = gpu_rank(offer, constraints.gpu) if constraints.gpu else 0
        cost = part.cost_per_hour_usd(offer)
        gpu_type = _gpu_type(offer, constraints.gpu or (), rank or 0)
        matches.append(Match(offer, room, rank or 0, cost, gpu_type, started))

    live: set[str | None] = set()
    for kind in group_nodes(nodes):
        offer = kind.offer
        live.add(offer.offer_id)
        failed = _first_failure(offer, of_kind)
        if failed is not None:
            reject(offer, *failed, len(kind.ids))
            continue
        passing = _passing_nodes(kind, of_node, reject)
        if passing.ids:
            accept(offer, _room(part, passing, free), True)
    for offer in registered:
        # What live nodes of the offer say about themselves is newer than the registration.
        if offer.offer_id in live:
            continue
        failed = _first_failure(offer, of_kind) or _first_node_failure(offer, of_node)
        if failed is not None:
            reject(offer, *failed, 0)
        else:
            accept(offer, {}, False)
    rejections = [
        Rejection(name, offer_id, nodes, it.parameter, has, it.wanted, it.capacity)
        for (name, offer_id, it, has), nodes in counts.items()
    ]
    rejections.sort(key=lambda each: (each.offer, each.parameter, each.has, each.nodes))
    return Survey(tuple(matches), tuple(rejections))


def _first_failure(offer: Offer, criteria: Sequence[Criterion]) -> tuple[Criterion, str] | None:
    for criterion in criteria:
        has = criterion.failure(offer)
        if has is not None:
            return criterion, has
    return None


def _first_node_failure(
    offer: Offer, criteria: Sequence[Criterion]
) -> tuple[Criterion, str] | None:
    kind = Kind.of_type(offer)
    for criterion in criteria:
        has = criterion.node_failure(kind)
        if has is not None:
            return criterion, has
    return None


def _passing_nodes(
    kind: Kind,
    criteria: Sequence[Criterion],
    reject: Callable[[Offer, Criterion, str, int], None],
) -> Kind:
    """Keep the nodes of one kind whose memory will do; note the others, by their best figure."""
    for criterion in criteria:
        has = criterion.read(kind)
        fits = list(map(criterion.test, has))
        if all(fits):
            continue
        failing = [value for value, fit in zip(has, fits, strict=True) if not fit]
        best = criterion.show(max(failing))
        reject(kind.offer, criterion, best if len(failing) == 1 else f"up to {best}", len(failing))
        kind = kind.only(fits)
    return kind


def _room(part: Slice, kind: Kind, free: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Count the containers that fit into what is free of each node; Ray leaves out what is used up."""
    held = kind.resources
    if free:
        held = list(map(free.get, kind.ids, held))
    # Ray counts in units of 0.0001, so that a float may come a little short of a whole number.
    wants = [("memory", part.memory_bytes, 0.5), ("CPU", part.cpus, 1e-5), ("GPU", part.gpus, 1e-5)]
    rooms = [
        [(each.get(name, 0.0) + short) // amount for each in held]
        for name, amount, short in wants
        if amount
    ]
    counts = map(int, map(min, *rooms) if len(rooms) > 1 else rooms[0])
    return dict(zip(kind.ids, counts, strict=True))


def _gpu_type(offer: Offer, wanted: tuple[str, ...], rank: int) -> str | None:
    """Give the accelerator type that is the wanted GPU whatever the node's labels say."""
    if not wanted:
        return None
    for name in offer.gpu_resources:
        spec = resolve_gpu(name)
        if spec is not None and wanted[rank] in (spec.name, spec.family):
            return name
    return None
