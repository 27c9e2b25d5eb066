"""What is asked of Ray for each kind of cluster."""

from __future__ import annotations

import re
from typing import Any

import pytest

from apothic.constraints import PlacementConstraints
from apothic.errors import InvalidOptionError, NoMatchingOfferError, PlacementTimeoutError
from ray_backend.placement.demand import Demand, plan
from ray_backend.placement.offers import Offer
from tests.placement.nodes import GIB, first_names, full_node, node, node_id, place

MIB = 2**20


def test_no_constraint_asks_for_cpus_and_memory_alone():
    found = place([node("a", offer="x"), node("b")], cpu=2, memory_mb=2048)
    assert found.demands == (Demand(2, 2048 * MIB),)
    assert found.demands[0].ray_options() == {"num_cpus": 2, "memory": 2048 * MIB}


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        ({"cpu": 9}, r"cpu +8 cores +at least 9 cores"),
        ({"memory_mb": 40_000}, r"memory_mb +32768 MB +at least 40000 MB"),
    ],
)
def test_what_no_node_can_ever_hold_is_refused_at_once(asked: dict[str, Any], row: str):
    with pytest.raises(NoMatchingOfferError) as caught:
        place([node("a"), node("dead", cpus=99, memory_gib=99, alive=False)], **asked)
    assert re.search(row, str(caught.value))


def test_no_known_node_is_no_reason_to_refuse_what_constrains_nothing():
    assert place([]).demands == (Demand(1, 1024 * MIB),)
    with pytest.raises(NoMatchingOfferError, match="no live node"):
        place([], gpu_count=1)


def test_gpu_count_alone_asks_for_gpus_alone():
    nodes = [node("plain", gpus=4), full_node(), node("cpu")]
    found = place(nodes, gpu_count=2)
    assert [each.ray_options() for each in found.demands] == [
        {"num_cpus": 1, "memory": GIB, "num_gpus": 2}
    ]
    with pytest.raises(NoMatchingOfferError, match=r"gpu_count +8 GPUs +at least 9 GPUs"):
        place(nodes, gpu_count=9)


def test_a_gpu_by_name_without_offers_asks_for_its_accelerator_type():
    found = place([node("a", gpus=1, gpu="A100"), node("t", gpus=1, gpu="T4")], gpu="a100")
    assert found.demands == (Demand(1, GIB, 1, "A100"),)


def test_any_gpu_without_offers_asks_for_gpus_alone():
    found = place([node("a", gpus=1, gpu="A100"), node("u", gpus=1), node("c")], gpu="any")
    assert {(each.num_gpus, each.accelerator_type) for each in found.demands} == {(1, None)}
    assert found.demands == (Demand(1, GIB, 1),)


def test_a_preference_list_gives_one_demand_each_in_its_order():
    nodes = [
        node("a", gpus=1, gpu="A100"),
        node("t", gpus=1, gpu="T4"),
        node("h", gpus=1, gpu="H100"),
    ]
    found = place(nodes, gpu=["H100", "A100"])
    assert [each.accelerator_type for each in found.demands] == ["H100", "A100"]


def test_an_accelerator_type_that_is_a_label_only_is_reached_by_node_id():
    labelled = node("a", gpus=1, ray_labels={"ray.io/accelerator-type": "A100"})
    (demand,) = place([labelled], gpu="A100").demands
    assert demand.accelerator_type is None
    assert demand.label_selector == {"ray.io/node-id": node_id("a")}


def test_an_offer_is_asked_for_by_its_resource():
    found = place([full_node()], gpu="A100", min_vram_gb=80)
    assert found.demands[0].ray_options() == {
        "num_cpus": 1,
        "memory": GIB,
        "num_gpus": 1,
        "accelerator_type": "A100",
        "resources": {"offer:full": 0.001},
    }


def test_nodes_without_an_offer_are_asked_for_by_their_ids():
    nodes = [node(name, cpus=8) for name in "abc"] + [node("small", cpus=4)]
    (demand,) = place(nodes, min_cpu_cores=8).demands
    ids = ",".join(sorted(node_id(name) for name in "abc"))
    assert demand.ray_options()["label_selector"] == {"ray.io/node-id": f"in({ids})"}


def test_nodes_of_one_offer_that_differ_are_told_apart_by_id():
    nodes = [node("a", offer="x", cpus=8), node("b", offer="x", cpus=4)]
    (demand,) = place(nodes, min_cpu_cores=8).demands
    assert demand.resources == {"offer:x": 0.001}
    assert demand.label_selector == {"ray.io/node-id": node_id("a")}
    # What Ray counts itself needs no list of nodes, so that nodes added later are used.
    (demand,) = place(nodes, cpu=8, min_cpu_cores=1).demands
    assert demand.label_selector == {}


def test_a_selector_names_the_emptiest_nodes_when_there_are_many():
    nodes = [node(str(index)) for index in range(200)]
    full = {each["NodeID"]: {"memory": 0.0} for each in nodes[:150]}
    (demand,) = place(nodes, available=full, min_cpu_cores=1).demands
    ids = demand.label_selector["ray.io/node-id"][3:-1].split(",")
    assert len(ids) == 64
    assert {each["NodeID"] for each in nodes[150:]} <= set(ids)


def test_cheapest_first_then_the_next_when_it_is_full():
    nodes = [
        node("d", offer="dear", gpus=1, cost_per_hour_usd=3),
        node("c", offer="cheap", gpus=1, cost_per_hour_usd=1),
        node("m", offer="middle", gpus=2, cost_per_hour_usd=4),
        node("n", offer="unpriced", gpus=1),
    ]
    assert first_names(place(nodes, gpu="any")) == ["cheap", "middle", "dear", "unpriced"]
    full = {node_id("c"): {"CPU": 8.0, "memory": 32.0 * GIB}}
    found = place(nodes, full, gpu="any")
    assert first_names(found) == ["middle", "dear", "unpriced", "cheap"]
    assert found.has_room


def test_the_gpu_list_counts_before_the_price():
    nodes = [
        node("t", offer="t4", gpus=1, gpu="T4", cost_per_hour_usd=0.3),
        node("h", offer="h100", gpus=1, gpu="H100", cost_per_hour_usd=3),
    ]
    assert first_names(place(nodes, gpu=["H100", "T4"])) == ["h100", "t4"]
    assert first_names(place(nodes, gpu=["T4", "H100"])) == ["t4", "h100"]


def test_when_all_are_full_the_cheapest_is_waited_for():
    nodes = [
        node("t", offer="t4", gpus=1, gpu="T4", cost_per_hour_usd=0.3),
        node("h", offer="h100", gpus=1, gpu="H100", cost_per_hour_usd=3),
    ]
    none_free: dict[str, dict[str, float]] = {each["NodeID"]: {} for each in nodes}
    found = place(nodes, none_free, gpu=["H100", "T4"])
    assert first_names(found) == ["t4", "h100"]
    assert not found.has_room


def test_equal_price_goes_to_the_emptier_offer():
    nodes = [
        node("a", offer="a", cost_per_hour_usd=1),
        node("b", offer="b", cost_per_hour_usd=1),
    ]
    free = {node_id("a"): {"CPU": 2.0, "memory": 32.0 * GIB}}
    assert first_names(place(nodes, free, max_cost_per_hour_usd=1)) == ["b", "a"]


def test_the_price_is_that_of_the_slice():
    node_of_8 = full_node()  # 16 USD/h, 8 GPUs, 64 cores
    for gpus, cost in ((1, 2.0), (4, 8.0), (8, 16.0)):
        found = place([node_of_8], gpu_count=gpus, max_cost_per_hour_usd=cost)
        assert found.choices[0].cost_per_hour_usd == cost
    found = place([node_of_8], cpu=16, max_cost_per_hour_usd=4)
    assert found.choices[0].cost_per_hour_usd == 4
    with pytest.raises(NoMatchingOfferError, match=r"4 USD/h +at most 3\.9 USD/h"):
        place([node_of_8], cpu=16, max_cost_per_hour_usd=3.9)


def test_a_third_of_a_price_is_not_above_itself():
    nodes = [node("a", gpus=3, offer="a", cost_per_hour_usd=2.1)]
    assert place(nodes, gpu_count=1, max_cost_per_hour_usd=0.7).choices


def test_tflops_are_those_of_the_slice_and_memory_is_per_gpu():
    assert place([full_node()], gpu_count=2, min_total_flops=39).choices
    with pytest.raises(NoMatchingOfferError, match=r"min_total_flops +39 TFLOPS"):
        place([full_node()], gpu_count=2, min_total_flops=39.1)
    with pytest.raises(NoMatchingOfferError, match=r"min_vram_gb +80 GB"):
        place([full_node()], gpu_count=8, min_vram_gb=81)


@pytest.mark.parametrize(
    ("stated", "wanted", "matches"),
    [("24.564", 24, True), ("24", 24, True), ("23.9", 24, False), ("24.564", 24.6, False)],
)
def test_memory_counts_in_units_of_1000_mb(stated: str, wanted: float, matches: bool):
    nodes = [node("a", gpus=1, gpu="GeForce-RTX-4090", vram_gb=stated)]
    if matches:
        assert place(nodes, min_vram_gb=wanted).choices
        assert place(nodes, offer_filters={"gpu_ram": {"gte": float(stated) * 1000}}).choices
    else:
        with pytest.raises(NoMatchingOfferError):
            place(nodes, min_vram_gb=wanted)


@pytest.mark.parametrize(
    ("labels", "gpu", "matches"),
    [
        ({}, "A100", True),
        ({}, "A100-40GB", True),
        ({}, "A100-80GB", False),
        ({"vram_gb": 80}, "A100", True),
        ({"vram_gb": 80}, "A100-80GB", True),
        ({"vram_gb": 80}, "A100-40GB", False),
        ({"vram_gb": "81.92"}, "A100-80GB", True),
        ({"vram_gb": 40}, "A100-40GB", True),
        ({"vram_gb": 40}, "A100-80GB", False),
    ],
)
def test_an_a100_without_a_label_counts_as_the_smaller(
    labels: dict[str, Any], gpu: str, matches: bool
):
    nodes = [node("a", gpus=1, gpu="A100", **labels)]
    if not matches:
        with pytest.raises(NoMatchingOfferError, match=r"gpu +A100 with"):
            place(nodes, gpu=gpu)
        return
    (demand,) = place(nodes, gpu=gpu).demands
    # The type says all about an A100 and nothing about its memory.
    assert (demand.accelerator_type == "A100") is (gpu == "A100")
    assert bool(demand.label_selector) is (gpu != "A100")


def test_a_resource_for_the_larger_a100_is_enough():
    nodes = [node("a", gpus=1, gpu="A100", resources={"accelerator_type:A100-80G": 1.0})]
    (demand,) = place(nodes, gpu="A100-80GB").demands
    assert demand == Demand(1, GIB, 1, "A100-80G")
    assert place(nodes, min_vram_gb=80).choices


def test_the_name_gives_the_smaller_figures():
    for name, low, high in (("A100", 40, 41), ("V100", 16, 17), ("H100", 80, 81)):
        nodes = [node("a", gpus=1, gpu=name)]
        assert place(nodes, min_vram_gb=low).choices
        with pytest.raises(NoMatchingOfferError, match="min_vram_gb"):
            place(nodes, min_vram_gb=high)


def test_geolocation_is_a_country_or_a_region():
    for places in ("us", "US-EAST-1", ["DE", "us-east-1"]):
        assert place([full_node()], geolocation=places).choices
    with pytest.raises(NoMatchingOfferError, match=r"geolocation +US, us-east-1 +DE or FR"):
        place([full_node()], geolocation=["DE", "FR"])
    older = node("a", ray_labels={"ray.io/region": "eu-1"})
    assert place([older], geolocation="eu-1").choices


def test_a_label_that_cannot_be_read_states_nothing():
    for text in ("abc", "-1", "nan", "inf"):
        with pytest.raises(NoMatchingOfferError) as caught:
            place([node("a", cpu_ghz=text)], min_cpu_ghz=1)
        assert f"not stated (cpu-ghz='{text}' cannot be read)" in str(caught.value)


def test_memory_of_the_machine_counts_its_object_store():
    nodes = [node("a", memory_gib=28, resources={"object_store_memory": 12.0 * GIB})]
    assert place(nodes, min_cpu_ram_gb=42).choices
    with pytest.raises(NoMatchingOfferError, match=r"min_cpu_ram_gb +42\.9497 GB"):
        place(nodes, min_cpu_ram_gb=43)


def test_resources_of_placement_groups_are_no_offers():
    held = {"offer:x_group_0_0123456789abcdef": 1.0, "CPU_group_0123456789abcdef": 1.0}
    (demand,) = place([node("a", resources=held)], min_cpu_cores=1).demands
    assert demand.resources == {}


def registered(**changes: float) -> Offer:
    resources = {"CPU": 16.0, "GPU": 1.0, "memory": 64.0 * GIB, "offer:spot": 1.0, **changes}
    labels = {"apothic.io/vram-gb": "24", "apothic.io/cost-per-hour-usd": "0.5"}
    return Offer.from_node_type("spot", resources, labels)


def test_what_the_autoscaler_could_start_comes_after_what_has_room():
    asked = PlacementConstraints.check(min_vram_gb=24)
    nodes = [full_node()]
    found = plan(asked, cpu=1, memory_mb=1024, nodes=nodes, registered=[registered()])
    assert first_names(found) == ["full", "spot"]
    none_free: dict[str, dict[str, float]] = {nodes[0]["NodeID"]: {}}
    found = plan(
        asked, cpu=1, memory_mb=1024, nodes=nodes, available=none_free, registered=[registered()]
    )
    assert first_names(found) == ["spot", "full"]
    assert found.demands[0].resources == {"offer:spot": 0.001}
    assert found.demands[0].label_selector == {}
    found = plan(asked, cpu=1, memory_mb=1024, nodes=[], registered=[registered()])
    assert first_names(found) == ["spot"]


def test_a_registered_type_that_is_too_small_is_named():
    asked = PlacementConstraints.check(gpu_count=1)
    with pytest.raises(NoMatchingOfferError, match=r"spot +not started +memory_mb +1024 MB"):
        plan(asked, cpu=1, memory_mb=2048, nodes=[], registered=[registered(memory=1.0 * GIB)])


def test_a_registered_type_needs_its_offer_resource():
    with pytest.raises(InvalidOptionError, match="'offer:gpu': 1"):
        Offer.from_node_type("gpu", {"CPU": 1.0})


def test_a_timeout_names_the_holders():
    found = place([full_node()], gpu="A100")
    error = found.timed_out(30, ["demo:Model:prod"])
    assert isinstance(error, PlacementTimeoutError)
    assert "within 30 s" in str(error)
    assert "held by: demo:Model:prod." in str(error)
    assert "full would do" in str(error)


def test_ray_accepts_what_is_asked():
    label_utils = pytest.importorskip("ray._private.label_utils")
    options = pytest.importorskip("ray._common.ray_option_utils")
    nodes = [node(str(index), gpus=1, gpu="A100", offer="x", cpus=index) for index in range(9)]
    for constraints in ({}, {"gpu_count": 1}, {"gpu": "A100"}, {"gpu": "A100", "min_cpu_cores": 3}):
        for demand in place(nodes, **constraints).demands:
            asked = demand.ray_options()
            options.validate_actor_options(asked, in_options=True)
            assert label_utils.validate_label_selector(asked.get("label_selector")) is None
