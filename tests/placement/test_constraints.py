from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from apothic.constraints import PlacementConstraints
from apothic.errors import InvalidOptionError

MINIMA = [name for name in PlacementConstraints.model_fields if name.startswith("min_")]
MAXIMA = [name for name in PlacementConstraints.model_fields if name.startswith("max_")]


@pytest.mark.parametrize("name", [*MINIMA, *MAXIMA, "disk_gb"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, "8", [8], object()])
def test_numbers_that_are_none_are_refused(name: str, value: object):
    with pytest.raises(InvalidOptionError) as caught:
        PlacementConstraints.check(**{name: value})
    text = str(caught.value)
    assert f"{name}={value!r}" in text
    assert "finite number" in text
    assert "Leave it out" in text


@pytest.mark.parametrize("name", [*MINIMA, "disk_gb"])
def test_a_minimum_of_zero_is_refused(name: str):
    with pytest.raises(InvalidOptionError, match=rf"{name}=0 .* above 0"):
        PlacementConstraints.check(**{name: 0})


@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_of_zero_takes_what_is_free(name: str):
    assert getattr(PlacementConstraints.check(**{name: 0}), name) == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpu": "H1000"}, ["gpu='H1000'", "no GPU named 'H1000'", "H100", "'any'"]),
        ({"gpu": ["A100", "rtx4900"]}, ["'rtx4900'", "GeForce-RTX-4090"]),
        ({"gpu": []}, ["gpu=[]", "empty list", "leave it out"]),
        ({"gpu": ""}, ["gpu=''", "not empty"]),
        ({"gpu": 1}, ["gpu=1", "a string or a list of strings"]),
        ({"gpu": ["A100", 1]}, ["gpu=['A100', 1]", "strings"]),
        ({"gpu": "TPU-V4"}, ["gpu='TPU-V4'", "resource 'TPU'", "'any'"]),
        ({"gpu_count": 0}, ["gpu_count=0", "at least 1", "Leave it out"]),
        ({"gpu_count": -1}, ["gpu_count=-1", "at least 1"]),
        ({"gpu_count": 1.5}, ["gpu_count=1.5", "whole number"]),
        ({"gpu_count": True}, ["gpu_count=True", "whole number"]),
        ({"geolocation": []}, ["geolocation=[]", "empty list"]),
        ({"geolocation": b"US"}, ["geolocation=b'US'", "string"]),
        ({"secure_cloud_only": "yes"}, ["secure_cloud_only='yes'", "True or False"]),
        ({"secure_cloud_only": 1}, ["secure_cloud_only=1", "True or False"]),
        ({"offer_filters": {"gpu_rma": {"eq": 1}}}, ["'gpu_rma'", "'gpu_ram'"]),
        ({"min_vram": 8}, ["'min_vram'", "min_vram_gb"]),
        (
            {"gpu": ["T4", "A100"], "min_vram_gb": 96},
            ["min_vram_gb=96", "gpu=['T4', 'A100']", "T4 has 16, A100 has 80", "at most 80"],
        ),
    ],
)
def test_bad_values_are_refused_with_value_rule_and_remedy(
    values: dict[str, Any], words: list[str]
):
    with pytest.raises(InvalidOptionError) as caught:
        PlacementConstraints.check(**values)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValidationError):
        PlacementConstraints.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"gpu": "RTX4090", "min_vram_gb": 24.5},
        {"gpu": ["T4", "A100"], "min_vram_gb": 80},
        {"gpu": ["T4", "any"], "min_vram_gb": 96},
        {"gpu": ["T4", "MXC500"], "min_vram_gb": 60},
    ],
)
def test_what_some_machine_could_satisfy_is_no_contradiction(values: dict[str, Any]):
    PlacementConstraints.check(**values)


def test_values_are_brought_into_one_form():
    checked = PlacementConstraints.check(
        gpu=["h100", "NVIDIA H100", "A100-80GB"], geolocation="US", min_vram_gb=80, gpu_count=2
    )
    assert checked.gpu == ("H100", "A100-80G")
    assert checked.geolocation == ("US",)
    assert checked.given == ("gpu", "gpu_count", "min_vram_gb", "geolocation")
    assert PlacementConstraints.check(gpu="ANY").gpu == ("any",)
    assert PlacementConstraints.check(geolocation=["US", "us"]).geolocation == ("US",)


def test_it_travels():
    checked = PlacementConstraints.check(
        gpu=["h100", "a100"], min_cpu_ghz=2, offer_filters={"gpu_ram": {"in": [1, 2]}}, disk_gb=3
    )
    plain = json.loads(json.dumps(checked.model_dump(mode="json")))
    assert PlacementConstraints.model_validate(plain) == checked
    copy = pickle.loads(pickle.dumps(checked))
    assert copy == checked
    assert hash(copy) == hash(checked)
    with pytest.raises(ValidationError, match="frozen"):
        checked.disk_gb = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "empty"),
    [
        ({}, True),
        ({"secure_cloud_only": False}, True),
        ({"offer_filters": {}}, True),
        ({"gpu": None, "min_vram_gb": None}, True),
        ({"max_cost_per_hour_usd": 0}, False),
        ({"secure_cloud_only": True}, False),
        ({"gpu": "any"}, False),
    ],
)
def test_is_empty(values: dict[str, Any], empty: bool):
    assert PlacementConstraints.check(**values).is_empty is empty


@pytest.mark.parametrize(
    ("values", "num_gpus"),
    [
        ({}, 0),
        ({"min_cpu_cores": 8}, 0),
        ({"max_cost_per_hour_usd": 1}, 0),
        ({"gpu": "any"}, 1),
        ({"gpu_count": 4}, 4),
        ({"gpu": "A100", "gpu_count": 2}, 2),
        ({"min_vram_gb": 8}, 1),
        ({"min_total_flops": 8}, 1),
        ({"min_gpu_ram_bandwidth_gbps": 8}, 1),
        ({"max_cost_per_tflop_hour_usd": 8}, 1),
        ({"offer_filters": {"gpu_ram": {"gte": 1}}}, 1),
        ({"offer_filters": {"num_gpus": {"eq": 0}}}, 0),
        ({"offer_filters": {"dph_total": {"lte": 1}}}, 0),
    ],
)
def test_how_many_gpus_a_container_takes(values: dict[str, Any], num_gpus: int):
    assert PlacementConstraints.check(**values).num_gpus == num_gpus


def test_the_modules_import_without_ray():
    code = (
        "import sys, apothic.constraints, ray_backend.placement.demand\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
