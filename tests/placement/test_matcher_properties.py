"""Laws of the matcher: stricter never adds, order never counts, every parameter excludes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apothic.constraints import PlacementConstraints
from apothic.errors import NoMatchingOfferError
from ray_backend.placement.demand import Plan
from tests.placement.nodes import full_node, node, place

# Each parameter with a value that `full_node` (taken with its label at hand) violates, and one
# that it satisfies.
EXCLUDING: dict[str, tuple[Any, Any]] = {
    "gpu": ("T4", "A100"),
    "gpu_count": (9, 8),
    "min_vram_gb": (81, 80),
    "geolocation": (["DE", "eu-west-1"], ["DE", "us"]),
    "offer_filters": ({"dph_total": {"lt": 16}}, {"dph_total": {"lte": 16}}),
    "max_cost_per_hour_usd": (1.9, 2),
    "max_cost_per_tflop_hour_usd": (0.1, 2 / 19.5),
    "min_total_flops": (20, 19.5),
    "min_gpu_ram_bandwidth_gbps": (2001, 2000),
    "min_cpu_cores": (65, 64),
    "min_cpu_ram_gb": (275, 274.8),
    "min_cpu_ghz": (3.1, 3),
    "min_disk_bandwidth_mb_s": (1001, 1000),
    "min_internet_upload_mbps": (501, 500),
    "min_internet_download_mbps": (901, 900),
    "secure_cloud_only": (True, True),
    "disk_gb": (1001, 1000),
}


def gpu_slice(name: str) -> dict[str, Any]:
    """The price is that of a slice by GPU only where the container takes one."""
    return {"gpu_count": 1} if name == "max_cost_per_hour_usd" else {}


def test_every_parameter_is_covered():
    assert set(EXCLUDING) == set(PlacementConstraints.model_fields)


@pytest.mark.parametrize("name", EXCLUDING)
@pytest.mark.parametrize("offer", ["full", None])
def test_every_parameter_alone_excludes_and_is_named(name: str, offer: str | None):
    violated, satisfied = EXCLUDING[name]
    changes: dict[str, Any] = {"secure_cloud": "false"} if name == "secure_cloud_only" else {}
    with pytest.raises(NoMatchingOfferError) as caught:
        place([full_node(offer=offer, **changes)], **{**gpu_slice(name), name: violated})
    row = next(
        line for line in str(caught.value).splitlines() if "8x A100" in line or "  full" in line
    )
    assert name in row
    assert place([full_node(offer=offer)], **{**gpu_slice(name), name: satisfied}).choices


@pytest.mark.parametrize(
    "name",
    sorted(
        set(EXCLUDING)
        - {"gpu_count", "min_cpu_cores", "min_cpu_ram_gb", "secure_cloud_only"}
        # These follow from the GPU's name.
        - {"gpu", "min_vram_gb", "min_total_flops", "min_gpu_ram_bandwidth_gbps"}
    ),
)
def test_what_nobody_states_does_not_match_and_says_so(name: str):
    bare = node("bare", gpus=8, gpu="A100", cpus=64)
    with pytest.raises(NoMatchingOfferError) as caught:
        place([bare], **{**gpu_slice(name), name: EXCLUDING[name][1]})
    row = next(line for line in str(caught.value).splitlines() if "8x A100" in line)
    assert name in row
    assert "not stated" in row


@pytest.mark.parametrize("name", ["min_vram_gb", "min_total_flops", "min_gpu_ram_bandwidth_gbps"])
def test_figures_of_a_gpu_without_a_name_are_not_stated(name: str):
    asked: dict[str, Any] = {name: 1}
    with pytest.raises(NoMatchingOfferError, match=rf"{name} +not stated"):
        place([node("bare", gpus=1)], **asked)
    with pytest.raises(NoMatchingOfferError, match=rf"{name} +no GPU"):
        place([node("bare")], **asked)


TYPES = ["T4", "A100", "H100", "GeForce-RTX-4090", None]


@st.composite
def nodes_strategy(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(1, 8))
    made = []
    for index in range(count):
        labels: dict[str, Any] = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "vram_gb": st.sampled_from([16, 24.564, 40, 80, "junk"]),
                    "cost_per_hour_usd": st.sampled_from([0.5, 1, 2, 8]),
                    "total_tflops": st.sampled_from([10, 100]),
                    "cpu_ghz": st.sampled_from([2, 3]),
                    "country": st.sampled_from(["US", "DE"]),
                    "secure_cloud": st.sampled_from(["true", "false"]),
                    "disk_gb": st.sampled_from([100, 500]),
                    "disk_bandwidth_mb_s": st.sampled_from([100, 1000]),
                    "internet_upload_mbps": st.sampled_from([10, 1000]),
                    "internet_download_mbps": st.sampled_from([10, 1000]),
                },
            )
        )
        gpus = draw(st.sampled_from([0, 1, 8]))
        made.append(
            node(
                str(index),
                cpus=draw(st.sampled_from([2, 8, 64])),
                memory_gib=draw(st.sampled_from([1, 4, 64])),
                gpus=gpus,
                gpu=draw(st.sampled_from(TYPES)) if gpus else None,
                offer=draw(st.sampled_from([None, "a", "b", "c"])),
                alive=draw(st.sampled_from([True, True, True, False])),
                **labels,
            )
        )
    return made


# parameter -> values, each stricter than the one before
LADDERS: dict[str, list[Any]] = {
    "gpu": ["any", ["A100", "H100", "T4"], ["A100", "T4"], "A100", "A100-80GB"],
    "gpu_count": [1, 2, 8, 16],
    "min_vram_gb": [1, 24, 40, 80],
    "geolocation": [["US", "DE"], "DE"],
    "max_cost_per_hour_usd": [8, 1, 0.25, 0],
    "max_cost_per_tflop_hour_usd": [1, 0.1, 0.01],
    "min_total_flops": [1, 19.5, 60],
    "min_gpu_ram_bandwidth_gbps": [100, 1000, 3000],
    "min_cpu_cores": [1, 8, 64],
    "min_cpu_ram_gb": [1, 4, 64],
    "min_cpu_ghz": [1, 3],
    "min_disk_bandwidth_mb_s": [1, 1000],
    "min_internet_upload_mbps": [1, 1000],
    "min_internet_download_mbps": [1, 1000],
    "secure_cloud_only": [False, True],
    "disk_gb": [1, 500],
    "offer_filters": [
        {},
        {"gpu_ram": {"gte": 1}},
        {"gpu_ram": {"gte": 30_000}},
        {"gpu_ram": {"gte": 30_000}, "dph_total": {"in": [1, 2]}},
    ],
}


def test_every_parameter_has_a_ladder():
    assert set(LADDERS) == set(PlacementConstraints.model_fields)


@st.composite
def constraints_strategy(draw: st.DrawFn) -> dict[str, int]:
    names = draw(st.lists(st.sampled_from(sorted(LADDERS)), unique=True, max_size=4))
    return {name: draw(st.integers(0, len(LADDERS[name]) - 1)) for name in names}


def values(rungs: dict[str, int]) -> dict[str, Any]:
    return {name: LADDERS[name][rung] for name, rung in rungs.items()}


def matching(found: Plan) -> set[str]:
    return {node_id for match in found.survey.matches for node_id in match.room}


def outcome(nodes: list[dict[str, Any]], constraints: dict[str, Any], **more: Any) -> Plan | str:
    try:
        return place(nodes, **more, **constraints)
    except NoMatchingOfferError as error:
        return str(error)


def matching_or_none(nodes: list[dict[str, Any]], constraints: dict[str, Any]) -> set[str]:
    found = outcome(nodes, {**constraints})
    return matching(found) if isinstance(found, Plan) else set()


@settings(max_examples=150, deadline=None)
@given(nodes_strategy(), constraints_strategy(), st.sampled_from(sorted(LADDERS)), st.data())
def test_a_stricter_constraint_never_adds_a_node(
    nodes: list[dict[str, Any]], rungs: dict[str, int], name: str, data: st.DataObject
):
    stricter = dict(rungs)
    low = rungs.get(name, -1)
    stricter[name] = data.draw(st.integers(max(low, 0), len(LADDERS[name]) - 1))
    # The price is that of the slice: taking more is another question, not a stricter one.
    for each in (rungs, stricter):
        each.setdefault("gpu_count", 0)
    stricter["gpu_count"] = rungs["gpu_count"] if name != "gpu_count" else stricter["gpu_count"]
    if name == "gpu_count" and {"max_cost_per_hour_usd", "min_total_flops"} & set(rungs):
        return
    assert matching_or_none(nodes, values(stricter)) <= matching_or_none(nodes, values(rungs))


@settings(max_examples=150, deadline=None)
@given(nodes_strategy(), constraints_strategy(), st.randoms(use_true_random=False))
def test_the_order_of_the_nodes_does_not_count(
    nodes: list[dict[str, Any]], rungs: dict[str, int], chance: random.Random
):
    free = {each["NodeID"]: {"CPU": 4.0, "memory": 2.0**31} for each in nodes[::2]}
    shuffled = list(nodes)
    chance.shuffle(shuffled)
    one = outcome(nodes, values(rungs), available=free)
    other = outcome(shuffled, values(rungs), available=free)
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
    else:
        assert one.choices == other.choices
        assert one.explain() == other.explain()


@settings(max_examples=150, deadline=None)
@given(nodes_strategy(), constraints_strategy())
def test_every_live_node_matches_or_has_a_reason(
    nodes: list[dict[str, Any]], rungs: dict[str, int]
):
    found = outcome(nodes, values(rungs))
    if isinstance(found, str):
        assert "fails" in found or "no live node" in found
        return
    live = sum(each["Alive"] for each in nodes)
    rejected = sum(each.nodes for each in found.survey.rejections)
    assert len(matching(found)) + rejected == live
    known = {*PlacementConstraints.model_fields, "cpu", "memory_mb"}
    for each in found.survey.rejections:
        assert each.parameter.split(".")[0] in known


@settings(max_examples=150, deadline=None)
@given(nodes_strategy(), constraints_strategy())
def test_no_demand_can_land_on_a_node_that_does_not_qualify(
    nodes: list[dict[str, Any]], rungs: dict[str, int]
):
    """Plays Ray's scheduler: whatever node satisfies a demand must be one that matches."""
    found = outcome(nodes, values(rungs))
    if isinstance(found, str):
        return
    for demand in found.demands:
        asked: dict[str, float] = {"CPU": demand.num_cpus, "memory": demand.memory_bytes}
        asked |= {"GPU": demand.num_gpus} if demand.num_gpus else {}
        asked |= demand.resources
        if demand.accelerator_type is not None:
            asked[f"accelerator_type:{demand.accelerator_type}"] = 0.001
        selector = demand.label_selector.get("ray.io/node-id", "")
        ids = selector.removeprefix("in(").removesuffix(")").split(",") if selector else None
        feasible = {
            each["NodeID"]
            for each in nodes
            if each["Alive"]
            and all(each["Resources"].get(key, 0.0) >= amount for key, amount in asked.items())
            and (ids is None or each["NodeID"] in ids)
        }
        assert feasible or not matching(found)
        assert feasible <= matching(found)
