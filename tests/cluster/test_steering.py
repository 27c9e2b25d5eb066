"""Every parameter steers a placement, read back from the node that the instance is on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from apothic import Volume
from apothic.errors import NoMatchingOfferError
from tests.cluster.conftest import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Define = Callable[..., Any]

STEERING: list[tuple[dict[str, Any], str]] = [
    ({"gpu": "L4"}, "bare"),
    ({"gpu": "A100"}, "small"),
    ({"gpu": "A100-80GB"}, "large"),
    ({"gpu": ["L4", "T4"]}, "bare"),
    ({"gpu": ["T4", "L4"]}, "t4"),
    ({"gpu": "A100", "gpu_count": 2}, "large"),
    ({"min_vram_gb": 41}, "large"),
    ({"geolocation": "FR"}, "small"),
    ({"geolocation": ["us-east-1", "XX"]}, "large"),
    ({"offer_filters": {"verified": {"eq": True}, "reliability": {"gte": 0.99}}}, "large"),
    ({"offer_filters": {"gpu_name": {"notin": ["A100", "L4"]}}}, "t4"),
    ({"cpu": 1, "max_cost_per_hour_usd": 0.3}, "t4"),
    ({"max_cost_per_tflop_hour_usd": 0.03}, "t4"),
    ({"min_total_flops": 29}, "bare"),
    ({"min_gpu_ram_bandwidth_gbps": 1900}, "large"),
    ({"min_cpu_cores": 9}, "large"),
    ({"min_cpu_cores": 5}, "large"),
    ({"min_cpu_ram_gb": 3}, "large"),
    ({"min_cpu_ghz": 3}, "large"),
    ({"min_disk_bandwidth_mb_s": 1000}, "large"),
    ({"min_internet_upload_mbps": 500}, "large"),
    ({"min_internet_download_mbps": 500}, "large"),
    ({"secure_cloud_only": True}, "large"),
    ({"disk_gb": 60}, "large"),
    ({"cpu": 10}, "large"),
    ({"memory_mb": 2000}, "large"),
]
"""Options, and the node that they lead to."""


def landed(nodes: Nodes, cls: Any) -> str:
    """Start an instance, give the name of its node, and close it."""
    with cls.new() as inst:
        node_id = inst.node.remote()
        assert inst.inspect().node_id == node_id
        assert node_id in {each["NodeID"] for each in ray.nodes() if each["Alive"]}
        return nodes.name(node_id)


@pytest.mark.parametrize(("constraints", "node"), STEERING, ids=str)
def test_each_parameter_steers(
    nodes: Nodes, define: Define, constraints: dict[str, Any], node: str
) -> None:
    assert landed(nodes, define(**constraints)) == node


def test_a_gpu_count_alone_goes_to_any_node_with_gpus(nodes: Nodes, define: Define) -> None:
    assert landed(nodes, define(gpu_count=2)) in ("t4", "large", "bare")


def test_cheapest_first_then_the_next_when_it_is_full(nodes: Nodes, define: Define) -> None:
    cls = define(min_vram_gb=15)  # one GPU each; bare states no price, so it comes last
    with contextlib.ExitStack() as stack:
        found = [nodes.name(stack.enter_context(cls.new()).node.remote()) for _ in range(7)]
    assert found == ["t4", "t4", "small", "large", "large", "bare", "bare"]


def test_the_list_of_gpus_counts_before_the_price_also_when_the_first_is_full(
    nodes: Nodes, define: Define
) -> None:
    cls = define(gpu=["A100", "T4"])
    with contextlib.ExitStack() as stack:
        found = [nodes.name(stack.enter_context(cls.new()).node.remote()) for _ in range(4)]
    assert found == ["small", "large", "large", "t4"]


def test_what_nothing_can_run_is_refused_within_a_second(nodes: Nodes, define: Define) -> None:
    cls = define(gpu="A100", min_vram_gb=80, max_cost_per_hour_usd=1)
    landed(nodes, define())  # connected, and the manager there
    began = time.monotonic()
    with pytest.raises(NoMatchingOfferError) as caught:
        cls.new()
    assert time.monotonic() - began < 1
    text = str(caught.value)
    assert "max_cost_per_hour_usd  4 USD/h" in text
    assert "min_vram_gb            40 GB" in text
    assert text in cls.explain()


def test_nodes_that_are_added_later_are_used(nodes: Nodes, define: Define) -> None:
    cls = define(min_cpu_cores=20)
    with pytest.raises(NoMatchingOfferError):
        cls.new()
    by_offer = define(cpu=1, max_cost_per_hour_usd=0.01)
    nodes.add("late", num_cpus=20)
    nodes.add_offer("late-offer", labels={"apothic.io/cost-per-hour-usd": "0.02"})
    try:
        assert landed(nodes, cls) == "late"
        assert landed(nodes, by_offer) == "late-offer"
    finally:
        nodes.forget("late")
        nodes.forget("late-offer")


def test_a_host_local_volume_ties_to_its_node(nodes: Nodes, define: Define) -> None:
    name = f"tied-{time.monotonic_ns()}"
    volume = {f"/tmp/apothic-{name}": Volume.vast_local(name, size_gb=1)}
    try:
        first = define(geolocation="FR", volumes=volume)
        assert landed(nodes, first) == "small"
        assert landed(nodes, define(volumes=volume)) == "small"
        with pytest.raises(NoMatchingOfferError, match="geolocation"):
            define(geolocation="US", volumes=volume).new()
    finally:
        Volume.from_name(name).delete()


def test_memory_is_that_of_the_demand(nodes: Nodes, define: Define) -> None:
    with define(gpu="T4", memory_mb=1024).new(), define(gpu=["T4", "L4"], memory_mb=600).new() as b:
        assert nodes.name(b.node.remote()) == "bare"
