"""Placement on a cluster as it is now: a view of it and what is wanted in, options for an actor out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apothic.constraints import PlacementConstraints
from apothic.errors import NoMatchingOfferError
from apothic.options import MountSpec
from ray_backend.placement.criterion import figure
from ray_backend.placement.demand import NODE_ID_LABEL, Choice, Plan, plan
from ray_backend.placement.offers import Offer, group_nodes
from ray_backend.placement.table import table

__all__ = ["ClusterView", "Placeable", "Placement", "explain", "offers_table", "place"]


class Placeable(Protocol):
    """What can be placed: the options of a class or of a sandbox."""

    @property
    def mounts(self) -> Sequence[MountSpec]:
        """The volumes that it mounts."""

    @property
    def constraints(self) -> PlacementConstraints:
        """What the node must have."""

    @property
    def cpu(self) -> int:
        """CPU cores that the container takes."""

    @property
    def memory_mb(self) -> int:
        """Memory that it takes, in units of 2**20 bytes."""


@dataclass(frozen=True)
class ClusterView:
    """What is known of a cluster at one moment.

    Attributes:
        nodes: as ``ray.nodes()`` gives them.
        available: free resources by node id; None where they are not known, so that all count as free.
        registered: node types that the autoscaler could start.
    """

    nodes: Sequence[Mapping[str, Any]]
    available: Mapping[str, Mapping[str, float]] | None = None
    registered: Sequence[Offer] = ()


@dataclass(frozen=True)
class Placement:
    """A decision where to run something, and what else would have done.

    Attributes:
        plan: every way to run it.
        tied_to: the one node that it must run on, for its host-local volumes; None for any.
        chosen: the node that was picked for what must stay on the node where it began.
    """

    plan: Plan
    tied_to: str | None = None
    chosen: str | None = None

    @property
    def choice(self) -> Choice:
        """The offer with room that ranks first, else the cheapest that could ever fit."""
        return self.plan.choices[0]

    @property
    def is_free(self) -> bool:
        """Whether any node may take it, so that no other choice can be better."""
        demand = self.choice.demand
        return not (
            self.node_id or demand.resources or demand.label_selector or demand.accelerator_type
        )

    @property
    def node_id(self) -> str | None:
        """The only node that it may run on; None for any that the demand reaches."""
        return self.tied_to or self.chosen

    def with_a_node(self) -> Placement:
        """Pick one node with room, by chance as far as it has room; itself where none has any."""
        room = self.choice.room_by_node
        if self.node_id is not None or not self.choice.room:
            return self
        (chosen,) = random.choices(list(room), weights=list(room.values()))
        return replace(self, chosen=chosen)

    def on_node(self, node_id: str) -> Placement:
        """Stay on a node that qualifies, with room or not; itself where it does not."""
        for choice in self.plan.choices:
            if node_id in choice.room_by_node:
                others = (each for each in self.plan.choices if each is not choice)
                plan = replace(self.plan, choices=(choice, *others))
                return replace(self, plan=plan, chosen=node_id)
        return self

    def avoiding(self, node_ids: Iterable[str]) -> Placement:
        """Keep away from nodes that the plan leaves out, which a demand alone could reach."""
        ids = sorted(node_ids)
        selector = {NODE_ID_LABEL: f"!in({','.join(ids)})" if len(ids) > 1 else f"!{ids[0]}"}
        choices = tuple(
            choice
            if choice.demand.label_selector  # names nodes that it may take
            else replace(choice, demand=replace(choice.demand, label_selector=selector))
            for choice in self.plan.choices
        )
        return replace(self, plan=replace(self.plan, choices=choices))

    def is_worth_leaving_for(self, found: Placement) -> bool:
        """Tell whether what queues with this placement had better ask for ``found``, made just now."""
        if self.chosen is None:
            return found.plan.has_room and found.choice.demand != self.choice.demand
        # Where its node has no room and no other has, it waits better without a node.
        return not any(choice.room_by_node.get(self.chosen) for choice in found.plan.choices)

    def ray_options(self) -> dict[str, Any]:
        """Give the keyword arguments for an actor's ``.options``."""
        options = self.choice.demand.ray_options()
        if self.node_id is not None:
            options.pop("label_selector", None)
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                self.node_id, soft=False
            )
        return options


def place(view: ClusterView, wanted: Placeable, tied_to: Sequence[str] = ()) -> Placement:
    """Decide where to run something.

    Args:
        view: the cluster.
        wanted: what to run.
        tied_to: the nodes that its host-local volumes are on.

    Raises:
        NoMatchingOfferError: when no node can ever run it; Ray itself would wait for ever.
    """
    if len(tied_to) > 1:
        raise NoMatchingOfferError(
            f"its host-local volumes lie on {len(tied_to)} different nodes ({', '.join(tied_to)}): no "
            f"node has them all. Use Volume.cloud for all but one."
        )
    if not tied_to:
        return Placement(_plan(view, wanted))
    node = tied_to[0]
    tied = _only(view, node)
    if not tied.nodes:
        raise NoMatchingOfferError(
            f"its host-local volume lies on node {node}, which is not in the cluster any more: what "
            f"is in it cannot be reached. Bring the node back, delete the volume, or use Volume.cloud, "
            f"which outlives a node."
        )
    try:
        return Placement(_plan(tied, wanted), node)
    except NoMatchingOfferError as error:
        raise NoMatchingOfferError(
            f"its host-local volume lies on node {node}, so that no other can run it, and there "
            f"{error}\n\nOther nodes may qualify: delete the volume to begin anew there, or use "
            f"Volume.cloud, which every node reaches."
        ) from None


def explain(view: ClusterView, wanted: Placeable, tied_to: Sequence[str] = ()) -> str:
    """Tell which nodes qualify and why others do not, starting nothing; arguments as of `place`."""
    try:
        found = place(view, wanted, tied_to)
    except NoMatchingOfferError as error:
        return str(error)
    if found.tied_to is None:
        return found.plan.explain()
    return f"Its host-local volume lies on node {found.tied_to}.\n\n{found.plan.explain()}"


def _only(view: ClusterView, node: str) -> ClusterView:
    """Give what is known of one node; nothing is to be started in its place."""
    nodes = [each for each in view.nodes if each["NodeID"] == node and each["Alive"]]
    return ClusterView(nodes, view.available)


def offers_table(view: ClusterView) -> str:
    """List every kind of node, live or registered, with what it states and what is free of it."""
    rows = []
    live = set()
    available = view.available or {}
    for kind in group_nodes(view.nodes):
        live.add(kind.offer.offer_id)
        free = list(map(available.get, kind.ids, kind.resources))
        rows.append(_offer_row(kind.offer, str(len(kind.ids)), min(kind.memory_bytes), free))
    for offer in view.registered:
        if offer.offer_id not in live:
            rows.append(_offer_row(offer, "not started", offer.resources.get("memory", 0.0), ()))
    if not rows:
        return "No node is known."
    head = ("offer", "nodes", "GPUs", "GB/GPU", "CPUs", "memory_mb", "USD/h", "place", "free now")
    return table(head, sorted(rows), (1, 2, 3, 4, 5, 6))


def _offer_row(
    offer: Offer, nodes: str, memory_bytes: float, free: Sequence[Mapping[str, float]]
) -> tuple[str, ...]:
    gpus = f"{figure(offer.gpus)}x {offer.gpu_types[0]}" if offer.gpu_types else figure(offer.gpus)
    unused = [
        f"{figure(sum(each.get(name, 0.0) for each in free))} {name}"
        for name in ("GPU", "CPU")
        if free and (name == "CPU" or offer.gpus)
    ]
    return (
        offer.name,
        nodes,
        gpus,
        "-" if offer.vram_mb is None or not offer.gpus else figure(offer.vram_mb / 1000),
        figure(offer.cpus),
        str(int(memory_bytes / 2**20)),
        "-" if offer.cost_per_hour_usd is None else figure(offer.cost_per_hour_usd),
        offer.country or offer.region or "-",
        ", ".join(unused) or "-",
    )


def _plan(view: ClusterView, wanted: Placeable) -> Plan:
    return plan(
        wanted.constraints,
        cpu=wanted.cpu,
        memory_mb=wanted.memory_mb,
        nodes=view.nodes,
        available=view.available,
        registered=view.registered,
    )
