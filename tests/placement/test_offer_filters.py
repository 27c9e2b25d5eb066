from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from apothic.errors import InvalidOptionError, NoMatchingOfferError
from apothic.gpus import resolve_gpu
from apothic.offers import FILTER_FIELDS, OfferFiltersModel
from tests.placement.nodes import full_node, node, place

# What `full_node` has, and a value below and above (another one for text and flags).
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "num_gpus": (8, 7, 9),
    "gpu_ram": (80_000, 79_999, 80_001),
    "gpu_mem_bw": (2000, 1999, 2001),
    "total_flops": (156, 155.9, 156.1),
    "cpu_cores_effective": (64, 63, 65),
    "cpu_ram": (256 * 2**30 / 1e6, 200_000, 300_000),
    "cpu_ghz": (3.0, 2.9, 3.1),
    "disk_space": (1000, 999, 1001),
    "disk_bw": (1000, 999, 1001),
    "inet_up": (500, 499, 501),
    "inet_down": (900, 899, 901),
    "dph_total": (16, 15.99, 16.01),
    "reliability": (0.99, 0.98, 1.0),
    "gpu_name": ("a100", "H100", "T4"),
    "geolocation": ("us", "DE", "FR"),
    "verified": (True, False, False),
    "datacenter": (True, False, False),
}


def outcomes(has: Any, low: Any, high: Any, ordered: bool) -> list[tuple[str, Any, bool]]:
    cases = [
        ("eq", has, True),
        ("eq", low, False),
        ("neq", has, False),
        ("neq", high, True),
        ("in", [low, has], True),
        ("in", [low, high], False),
        ("notin", [low, high], True),
        ("notin", [has, high], False),
    ]
    if ordered:
        cases += [
            ("gt", low, True),
            ("gt", has, False),
            ("gte", has, True),
            ("gte", high, False),
            ("lt", high, True),
            ("lt", has, False),
            ("lte", has, True),
            ("lte", low, False),
        ]
    return cases


def test_every_field_is_covered():
    assert set(VALUES) == set(FILTER_FIELDS) == set(OfferFiltersModel.model_fields)


@pytest.mark.parametrize(
    ("field", "operator", "value", "matches"),
    [
        (field, *case)
        for field, (has, low, high) in VALUES.items()
        for case in outcomes(has, low, high, FILTER_FIELDS[field].kind == "number")
    ],
)
def test_every_operator_on_every_field(field: str, operator: str, value: Any, matches: bool):
    filters = {field: {operator: value}}
    if matches:
        assert place([full_node()], offer_filters=filters).choices[0].name == "full"
        return
    with pytest.raises(NoMatchingOfferError, match=f"offer_filters.{field}.{operator}"):
        place([full_node()], offer_filters=filters)


CARDS: dict[str, dict[str, Any]] = {
    "labelled A100 of 80 GB": {"gpu": "A100", "vram_gb": 80},
    "labelled A100 of 40 GB": {"gpu": "A100", "vram_gb": 40},
    "A100 that says no more": {"gpu": "A100"},
    "A100-80G by Ray's name": {"gpu": "A100-80G"},
    "RTX 6000 that is an Ada": {"gpu": "RTX-6000", "vram_gb": 49.14},
    "MI300X of Hugging Face": {"gpu": "AMD-Instinct-MI300X-HF"},
    "MI300X": {"gpu": "AMD-Instinct-MI300X-OAM"},
    "T4": {"gpu": "T4"},
    "one that nobody knows": {"gpu": "X-900", "vram_gb": 80},
}
NAMES = [
    *("A100", "nvidia a100", "A100-80GB", "A100-80G", "a100 40gb", "RTX-6000", "RTX 6000 Ada"),
    *("MI300X", "AMD-Instinct-MI300X-HF", "T4", "X-900", "x900", "X-901"),
]


def matches(constraints: dict[str, Any], **card: Any) -> bool:
    try:
        return bool(place([node("one", gpus=1, offer="one", **card)], **constraints).choices)
    except NoMatchingOfferError:
        return False


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("card", CARDS)
def test_gpu_names_mean_what_they_mean_for_gpu(card: str, name: str):
    def filtered(operator: str, value: Any) -> bool:
        return matches({"offer_filters": {"gpu_name": {operator: value}}}, **CARDS[card])

    if resolve_gpu(name) is not None:
        same = matches({"gpu": name}, **CARDS[card])
    else:
        # `gpu` refuses a name that it does not know; here it is compared as it is written.
        same = card == "one that nobody knows" and name in ("X-900", "x900")
    assert filtered("eq", name) is same
    assert filtered("neq", name) is not same
    assert filtered("in", ["H100", name]) is same
    assert filtered("notin", ["H100", name]) is not same


def test_a_card_is_what_name_and_memory_amount_to():
    asked = {"offer_filters": {"gpu_name": {"eq": "A100-80GB"}}}
    assert matches(asked, gpu="A100", vram_gb=80)
    assert not matches(asked, gpu="A100", vram_gb=40)
    with pytest.raises(
        NoMatchingOfferError, match=r"gpu_name\.neq +A100 with 80 GB +not A100-80GB"
    ):
        place(
            [node("one", gpus=1, gpu="A100", vram_gb=80)],
            offer_filters={"gpu_name": {"neq": "A100-80GB"}},
        )


@pytest.mark.parametrize("operator", ["eq", "neq", "in", "notin"])
@pytest.mark.parametrize("field", ["dph_total", "verified", "geolocation", "gpu_ram"])
def test_what_nobody_states_matches_no_operator(field: str, operator: str):
    unlabelled = node("plain", gpus=1)
    value = VALUES[field][0]
    filters = {field: {operator: [value] if operator in ("in", "notin") else value}}
    with pytest.raises(NoMatchingOfferError, match="not stated"):
        place([unlabelled], offer_filters=filters)


@pytest.mark.parametrize("operator", ["gt", "gte", "lt", "lte"])
@pytest.mark.parametrize("field", ["gpu_name", "geolocation", "verified", "datacenter"])
def test_what_has_no_order_refuses_order(field: str, operator: str):
    with pytest.raises(InvalidOptionError, match=f"{field}.{operator}.*has no order"):
        OfferFiltersModel.parse({field: {operator: VALUES[field][0]}})


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"gpu_rma": {"gte": 1}}, ["gpu_rma", "Did you mean 'gpu_ram'"]),
        ({"zzz": {"gte": 1}}, ["zzz", "Known are: gpu_name"]),
        ({"gpu_ram": {"ge": 1}}, ["'ge'", "'gte'"]),
        ({"gpu_ram": {">=": 1}}, ["'>='", "Known are: eq"]),
        ({"gpu_ram": 24_000}, ["gpu_ram=24000", "{operator: value}", "'eq': 24000"]),
        ({"gpu_ram": {}}, ["gpu_ram={}", "at least one operator"]),
        ({"gpu_ram": {"gte": "24"}}, ["gpu_ram.gte='24'", "finite number", "Give it in MB"]),
        ({"gpu_ram": {"gte": True}}, ["gpu_ram.gte=True", "finite number"]),
        ({"gpu_ram": {"gte": -1}}, ["gpu_ram.gte=-1", "at least 0"]),
        ({"gpu_ram": {"gte": float("nan")}}, ["gpu_ram.gte=nan", "finite"]),
        ({"gpu_ram": {"lte": float("inf")}}, ["gpu_ram.lte=inf", "finite"]),
        ({"gpu_ram": {"gte": None}}, ["gpu_ram.gte=None", "finite"]),
        ({"gpu_ram": {"in": 24_000}}, ["gpu_ram.in=24000", "takes a list", "[24000]"]),
        ({"gpu_ram": {"in": []}}, ["gpu_ram.in=[]", "empty list"]),
        ({"gpu_ram": {"gt": 8, "lt": 4}}, ["gpu_ram=", "no number is in this range"]),
        ({"gpu_ram": {"gt": 8, "lte": 8}}, ["no number is in this range"]),
        ({"reliability": {"gte": 99}}, ["reliability.gte=99", "up to 1", "0.95"]),
        ({"verified": {"eq": "true"}}, ["verified.eq='true'", "True or False"]),
        ({"verified": {"eq": 1}}, ["verified.eq=1", "True or False"]),
        ({"geolocation": {"in": "US"}}, ["geolocation.in='US'", "['US']"]),
        ({"geolocation": {"eq": 3}}, ["geolocation.eq=3", "text"]),
        ({"gpu_name": {"eq": ""}}, ["gpu_name.eq=''", "not empty"]),
        ([("gpu_ram", {"gte": 1})], ["offer_filters=", "dict of"]),
        ("gpu_ram>=24", ["offer_filters='gpu_ram>=24'", "dict of"]),
    ],
)
def test_bad_filters_are_refused_with_value_rule_and_remedy(filters: Any, words: list[str]):
    with pytest.raises(InvalidOptionError) as caught:
        OfferFiltersModel.parse(filters)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValidationError):
        OfferFiltersModel.model_validate(filters)


def test_construction_checks_as_parse_does():
    assert OfferFiltersModel(gpu_ram={"gte": 24_000}) == OfferFiltersModel.parse(
        {"gpu_ram": {"gte": 24_000.0}}
    )
    with pytest.raises(ValidationError, match="finite number of at least 0"):
        OfferFiltersModel(gpu_ram={"gte": -1})
    with pytest.raises(ValidationError, match="Did you mean 'gpu_ram'"):
        OfferFiltersModel(gpu_rma={"gte": 1})  # type: ignore[call-arg]


def test_it_travels():
    filters = OfferFiltersModel.parse(
        {"gpu_ram": {"lte": 90_000, "gte": 24_000}, "geolocation": {"in": ["US", "DE"]}}
    )
    assert OfferFiltersModel.model_validate_json(filters.model_dump_json()) == filters
    plain = json.loads(json.dumps(filters.model_dump(mode="json")))
    assert OfferFiltersModel.model_validate(plain) == filters
    copy = pickle.loads(pickle.dumps(filters))
    assert copy == filters
    assert hash(copy) == hash(filters)
    with pytest.raises(ValidationError, match="frozen"):
        filters.gpu_ram = None  # type: ignore[misc]


def test_equal_filters_are_equal_however_written():
    one = OfferFiltersModel.parse({"gpu_ram": {"in": [2, 1, 1], "gte": 1}, "num_gpus": {"eq": 1}})
    other = OfferFiltersModel.parse({"num_gpus": {"eq": 1.0}, "gpu_ram": {"gte": 1, "in": {1, 2}}})
    assert one == other
    assert one.model_dump_json() == other.model_dump_json()
    assert OfferFiltersModel.parse(one) is one
    assert OfferFiltersModel.parse({}).is_empty
