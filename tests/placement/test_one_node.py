"""What must stay on the node where it began: which one is picked, and when it had better leave it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from apothic.constraints import PlacementConstraints
from apothic.options import ClassOptions
from ray_backend.placement.live import ClusterView, Placement
from ray_backend.placement.live import place as place_on
from tests.placement.nodes import GIB, node, node_id

NODES = [
    node("a", gpus=4, gpu="T4", offer="eu-t4", cost_per_hour_usd=1),
    node("b", gpus=4, gpu="T4", offer="eu-t4", cost_per_hour_usd=1),
    node("c", gpus=1, gpu="T4", offer="us-t4", cost_per_hour_usd=2),
]


def place(a: int, b: int, c: int, tied_to: str | None = None, **constraints: Any) -> Placement:
    """Place one GPU where so many are free."""
    free = {
        node_id(name): {"CPU": 8.0, "memory": 32.0 * GIB, "GPU": float(gpus)}
        for name, gpus in (("a", a), ("b", b), ("c", c))
    }
    options = ClassOptions(constraints=PlacementConstraints.check(**constraints or {"gpu": "T4"}))
    return place_on(ClusterView(NODES, free), options, [tied_to] if tied_to else [])


def test_a_node_is_picked_by_chance_as_far_as_it_has_room():
    found = place(3, 1, 1)
    picked = Counter(found.with_a_node().chosen for _ in range(400))
    assert picked.keys() == {node_id("a"), node_id("b")}  # the dearer offer is no part of it
    assert picked[node_id("a")] > picked[node_id("b")]


def test_it_is_the_only_one_that_ray_may_take():
    found = place(1, 0, 0).with_a_node()
    options = found.ray_options()
    assert options["scheduling_strategy"].node_id == node_id("a")
    assert not options["scheduling_strategy"].soft
    assert options["resources"] == {"offer:eu-t4": 0.001}
    assert "label_selector" not in found.on_node(node_id("a")).ray_options()
    assert not found.is_free
    assert found.with_a_node() is found


def test_any_node_is_one_of_all():
    found = place(1, 1, 1, gpu_count=1)
    assert found.is_free
    picked = {found.with_a_node().chosen for _ in range(200)}
    assert picked == {node_id(name) for name in "abc"}


def test_without_room_none_is_picked():
    found = place(0, 0, 0)
    assert found.with_a_node() is found
    assert found.node_id is None


def test_a_volume_decides_alone():
    found = place(4, 4, 1, tied_to=node_id("b"))
    assert found.with_a_node() is found
    assert found.node_id == node_id("b")


def test_staying_where_room_was_found_asks_for_what_that_node_offers():
    found = place(0, 0, 0).on_node(node_id("c"))
    assert found.node_id == node_id("c")
    assert found.ray_options()["resources"] == {"offer:us-t4": 0.001}
    assert {choice.name for choice in found.plan.choices} == {"eu-t4", "us-t4"}
    gone = place(0, 0, 0).on_node(node_id("elsewhere"))
    assert gone.node_id is None


def test_what_queues_leaves_for_room_alone():
    on_a = place(1, 0, 0).with_a_node()
    assert not on_a.is_worth_leaving_for(place(1, 4, 1))  # it is about to start
    assert on_a.is_worth_leaving_for(place(0, 4, 1))
    assert on_a.is_worth_leaving_for(place(0, 0, 0))  # to wait for whichever comes first
    anywhere = place(0, 0, 0)
    assert not anywhere.is_worth_leaving_for(place(0, 0, 0))
    assert not anywhere.is_worth_leaving_for(place(0, 1, 0))  # the offer that it asks for
    assert anywhere.is_worth_leaving_for(place(0, 0, 1))
