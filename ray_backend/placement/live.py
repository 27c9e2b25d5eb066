"""Placement on the connected cluster: live nodes in, options for an actor out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apothic.errors import NoMatchingOfferError
from apothic.options import ClassOptions
from ray_backend.placement.demand import plan
from ray_backend.ray_api import live_nodes

__all__ = ["explain_on_cluster", "place_on_cluster"]


def place_on_cluster(options: ClassOptions, tied_to: Sequence[str] = ()) -> dict[str, Any]:
    """Give the actor options by which Ray places an instance.

    Args:
        options: of the class.
        tied_to: the nodes that its host-local volumes are on.

    Raises:
        NoMatchingOfferError: when no node can ever run it; Ray itself would wait for ever.
    """
    nodes = [node for node in live_nodes() if not tied_to or node["NodeID"] in tied_to]
    if len(tied_to) > 1:
        raise NoMatchingOfferError(
            f"its host-local volumes lie on {len(tied_to)} different nodes ({', '.join(tied_to)}): no "
            f"node has them all. Use Volume.cloud for all but one."
        )
    found = plan(options.constraints, cpu=options.cpu, memory_mb=options.memory_mb, nodes=nodes)
    ray_options = found.demands[0].ray_options()
    if tied_to:
        ray_options.pop("label_selector", None)
        ray_options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(tied_to[0], soft=False)
    return ray_options


def explain_on_cluster(options: ClassOptions) -> str:
    """Tell which nodes qualify and why others do not, starting nothing."""
    try:
        found = plan(
            options.constraints, cpu=options.cpu, memory_mb=options.memory_mb, nodes=live_nodes()
        )
    except NoMatchingOfferError as error:
        return str(error)
    return found.explain()
