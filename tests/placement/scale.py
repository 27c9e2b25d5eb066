"""Large clusters and how long placing on them may take: for tests, and for `benchmarks.placement`."""

from __future__ import annotations

from typing import Any

from apothic.constraints import PlacementConstraints
from apothic.options import ClassOptions
from ray_backend.placement.live import ClusterView
from ray_backend.placement.offers import Offer
from tests.placement.nodes import node

PLAN_S = 0.05
"""What a plan over ten thousand nodes of two hundred offers may take."""

PLACING_S = 0.005
"""What placing may add to a creation on a hundred nodes, beyond asking Ray."""

ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"gpu_count": 2},
    {"gpu": ["H100", "A100"], "min_vram_gb": 40, "max_cost_per_hour_usd": 2},
    {"min_cpu_ram_gb": 100, "offer_filters": {"cpu_ram": {"gte": 1000}}},
    {"geolocation": "US", "offer_filters": {"dph_total": {"lte": 10}}},
)
"""Constraints that are tested by kind, by node, or not at all."""


def title(constraints: dict[str, Any]) -> str:
    return ",".join(constraints) or "none"


def cluster(count: int, offers: int) -> list[dict[str, Any]]:
    """Make nodes of several offers, no two with the same memory."""
    types = ["A100", "H100", "T4", "L4"]
    return [
        node(
            str(index),
            cpus=64,
            memory_gib=128 + index / 2**20,
            gpus=8,
            gpu=types[index % offers % 4],
            offer=f"offer-{index % offers}",
            cost_per_hour_usd=1 + index % offers / 10,
            country="US",
        )
        for index in range(count)
    ]


def unlabelled(count: int) -> list[dict[str, Any]]:
    """Make nodes that say nothing but what Ray knows."""
    return [
        node(str(index), cpus=8 + index % 8, memory_gib=32 + index / 2**20, gpus=1, gpu="A100")
        for index in range(count)
    ]


def partly_free(nodes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Leave a little room on every node."""
    return {each["NodeID"]: {"CPU": 9.0, "memory": 2.0**34, "GPU": 3.0} for each in nodes}


def view_of_a_hundred_nodes() -> ClusterView:
    """Give what a creation looks at: nodes of twenty offers, one of them full, and twenty more types."""
    nodes = cluster(100, 20)
    free = partly_free(nodes)
    free[nodes[0]["NodeID"]] = {}
    registered = [
        Offer.from_node_type(
            f"spot-{index}",
            {
                "CPU": 64,
                "GPU": 8,
                "memory": 2.0**37,
                "accelerator_type:A100": 1,
                f"offer:s{index}": 1,
            },
            {"apothic.io/cost-per-hour-usd": "3"},
        )
        for index in range(20)
    ]
    return ClusterView(nodes, free, registered)


CHOOSY = ClassOptions(
    constraints=PlacementConstraints.check(gpu=["H100", "A100"], max_cost_per_hour_usd=2)
)
"""Options of a class that not every node will do for."""
