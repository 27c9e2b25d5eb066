"""From the matching offers to what is asked of Ray: `plan` gives the demands in order of choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apothic.constraints import PlacementConstraints
from apothic.errors import NoMatchingOfferError, PlacementTimeoutError
from apothic.gpus import ANY_GPU
from ray_backend.placement.criterion import Slice, figure
from ray_backend.placement.matcher import Match, Survey, survey
from ray_backend.placement.offers import OFFER_PREFIX, Offer
from ray_backend.placement.table import cost_text, no_match_text, rejected_table, table, wants_text

__all__ = ["MAX_SELECTED_NODES", "NODE_ID_LABEL", "Choice", "Demand", "Plan", "plan"]

NODE_ID_LABEL = "ray.io/node-id"
OFFER_AMOUNT = 0.001
"""Nodes advertise whole offers; this little never runs out before the real resources do."""

MAX_SELECTED_NODES = 64
"""Node ids in one label selector: it travels with every creation, at 57 bytes a node."""


@dataclass(frozen=True)
class Demand:
    """What one container asks of Ray's scheduler.

    Attributes:
        num_cpus: CPU cores.
        memory_bytes: memory.
        num_gpus: GPUs.
        accelerator_type: the GPU's name, where that is part of what is asked.
        resources: custom resources.
        label_selector: labels that the node must have.
    """

    num_cpus: int
    memory_bytes: int
    num_gpus: int = 0
    accelerator_type: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def ray_options(self) -> dict[str, Any]:
        """Give the keyword arguments for an actor's ``.options``; what is not asked is absent."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "memory": self.memory_bytes}
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        if self.resources:
            options["resources"] = dict(self.resources)
        if self.label_selector:
            options["label_selector"] = dict(self.label_selector)
        return options


@dataclass(frozen=True)
class Choice:
    """One way to run: a demand, and what the table says about it.

    Attributes:
        demand: what to ask of Ray.
        name: the offer.
        nodes: how many nodes; 0 when the autoscaler would have to start one.
        room: how many such containers have room now.
        rank: place in the ``gpu`` list.
        cost_per_hour_usd: price of the slice, the highest of its nodes; None when none is stated.
        room_by_node: the same room, node by node.
    """

    demand: Demand
    name: str
    nodes: int
    room: int
    rank: int
    cost_per_hour_usd: float | None
    room_by_node: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Plan:
    """Where a container can run.

    Attributes:
        choices: every way to run it, the first choice first.
        survey: every kind of node, matching or not.
        wants: what was asked for, in words.
    """

    choices: tuple[Choice, ...]
    survey: Survey
    wants: str

    @property
    def demands(self) -> tuple[Demand, ...]:
        """What to ask of Ray: the choice, then the fallbacks in their order."""
        return tuple(choice.demand for choice in self.choices)

    @property
    def has_room(self) -> bool:
        """Whether the first choice has room now; otherwise it queues, or a node is started."""
        return bool(self.choices) and self.choices[0].room > 0

    def explain(self) -> str:
        """Tell what matches, in the order of choice, and what does not, with the first reason."""
        parts = [f"Asked for: {self.wants}."]
        if self.choices and self.survey.matches:
            rows = [
                (
                    choice.name,
                    str(choice.nodes) if choice.nodes else "not started",
                    cost_text(choice.cost_per_hour_usd),
                    str(choice.room) if choice.room else "no",
                )
                for choice in self.choices
            ]
            head = ("offer", "nodes", "cost", "room now")
            parts.append(f"Matching, in the order of choice:\n{table(head, rows, (1, 3))}")
        elif self.choices:
            parts.append("No node is known yet; Ray places it on the first one with room.")
        if self.survey.rejections:
            parts.append(f"Not matching:\n{rejected_table(self.survey)}")
        return "\n\n".join(parts)

    def timed_out(
        self, waited_s: float, holders: Sequence[str] = (), to_wait: str = "wait longer"
    ) -> PlacementTimeoutError:
        """Make the error for a container that had no room in time.

        Args:
            waited_s: how long it waited.
            holders: who holds the room, in words, for instance names of instances.
            to_wait: what to do to wait longer.
        """
        names = ", ".join(dict.fromkeys(choice.name for choice in self.choices)) or "any node"
        held = ", ".join(holders[:20]) + (f" and {len(holders) - 20} more" * (len(holders) > 20))
        by = f" The room is held by: {held}." if holders else ""
        return PlacementTimeoutError(
            f"nothing with room was found within {figure(waited_s)} s for {self.wants}: {names} "
            f"would do, and had none.{by} Close what is not needed, add nodes, or {to_wait}."
            f"\n\n{self.explain()}"
        )


def plan(
    constraints: PlacementConstraints,
    *,
    cpu: int,
    memory_mb: int,
    nodes: Sequence[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]] | None = None,
    registered: Sequence[Offer] = (),
) -> Plan:
    """Decide where a container can run, best first.

    Matching offers rank by the ``gpu`` list, then by the cost of the slice, then by free room.
    Those with room now come first, in this order; then those that could ever fit, cheapest first.
    A cost that is not stated comes after every cost that is.

    Args:
        constraints: checked constraints.
        cpu: CPU cores of the container.
        memory_mb: its memory, in units of 2**20 bytes.
        nodes: as ``ray.nodes()`` gives them.
        available: free resources by node id, as Ray's state gives them; without it, and for a node
            that it lacks, all of the node's resources count as free.
        registered: node types that the autoscaler could start.

    Raises:
        NoMatchingOfferError: when no node can ever run it; Ray itself would wait for ever.
    """
    part = Slice(cpu, constraints.num_gpus, memory_mb * 2**20)
    found = survey(constraints, part, nodes, available, registered)
    wants = wants_text(constraints, cpu, memory_mb)
    bare = Demand(part.cpus, part.memory_bytes, part.gpus)
    if not found.matches:
        if constraints.is_empty and found.is_vacant:
            return Plan((Choice(bare, "any node", 0, 0, 0, None),), found, wants)
        raise NoMatchingOfferError(no_match_text(found, wants))
    choices = _choices(constraints, bare, found)
    if set(constraints.given) <= {"gpu_count"}:
        # Nothing tells one node from another: one demand, and the scheduler picks.
        choices = [
            Choice(
                bare,
                "any node with GPUs" if part.gpus else "any node",
                sum(choice.nodes for choice in choices),
                sum(choice.room for choice in choices),
                0,
                None,
                _together(choice.room_by_node for choice in choices),
            )
        ]
    ready = sorted((choice for choice in choices if choice.room), key=_by_preference)
    full = sorted((choice for choice in choices if not choice.room), key=_by_cost)
    return Plan((*ready, *full), found, wants)


def _choices(constraints: PlacementConstraints, bare: Demand, found: Survey) -> list[Choice]:
    """Make one choice of each offer, and of the nodes without one by GPU and cost."""
    costs = {match.cost_per_hour_usd for match in found.matches if match.offer.offer_id is None}
    # What Ray's own resources express needs no list of nodes, and so reaches later ones too. But
    # they cannot tell a cheap node from a dear one.
    by_type = set(constraints.given) <= {"gpu", "gpu_count"} and len(costs) == 1
    groups: dict[tuple[object, ...], list[Match]] = {}
    for match in found.matches:
        key: tuple[object, ...] = (match.offer.offer_id,)
        if match.offer.offer_id is None:
            key = (None, match.rank, match.cost_per_hour_usd, match.gpu_type)
        groups.setdefault(key, []).append(match)
    # Where some nodes of an offer do not qualify, its resource alone would reach them too.
    mixed = {each.offer_id for each in found.rejections if each.nodes and not each.capacity}
    choices = []
    for matches in groups.values():
        offer_id = matches[0].offer.offer_id
        types = {match.gpu_type for match in matches}
        gpu_type = types.pop() if len(types) == 1 else None
        if offer_id is not None:
            select = offer_id in mixed
        else:
            wanted = (constraints.gpu or (ANY_GPU,))[matches[0].rank]
            select = not (by_type and (wanted == ANY_GPU or gpu_type is not None))
        choices.append(_choice(bare, matches, gpu_type, select))
    return choices


def _choice(bare: Demand, matches: Sequence[Match], gpu_type: str | None, select: bool) -> Choice:
    offer_id = matches[0].offer.offer_id
    names = sorted({match.offer.name for match in matches})
    room = _together(match.room for match in matches)
    prices = [match.cost_per_hour_usd for match in matches]
    known = [price for price in prices if price is not None]
    return Choice(
        replace(
            bare,
            accelerator_type=gpu_type,
            resources={} if offer_id is None else {OFFER_PREFIX + offer_id: OFFER_AMOUNT},
            label_selector={NODE_ID_LABEL: _selector(room)} if select and room else {},
        ),
        names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
        len(room),
        sum(room.values()),
        min(match.rank for match in matches),
        max(known) if len(known) == len(prices) else None,
        room,
    )


def _together(rooms: Iterable[Mapping[str, int]]) -> dict[str, int]:
    room: dict[str, int] = {}
    for each in rooms:
        room.update(each)
    return room


def _selector(room: Mapping[str, int]) -> str:
    """Name nodes, the emptiest first where there are too many to name."""
    best = sorted(room.items(), key=lambda each: (-each[1], each[0]))[:MAX_SELECTED_NODES]
    ids = sorted(node_id for node_id, _ in best)
    return ids[0] if len(ids) == 1 else f"in({','.join(ids)})"


def _price(choice: Choice) -> float:
    return math.inf if choice.cost_per_hour_usd is None else choice.cost_per_hour_usd


def _by_preference(choice: Choice) -> tuple[int, float, int, str, str]:
    # The last two only make the order independent of that of the nodes.
    return (choice.rank, _price(choice), -choice.room, choice.name, repr(choice.demand))


def _by_cost(choice: Choice) -> tuple[float, int, bool, str, str]:
    return _price(choice), choice.rank, choice.nodes == 0, choice.name, repr(choice.demand)
