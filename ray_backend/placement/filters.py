"""`offer_filters` as criteria: every operator on every field of an offer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import ge, gt, le, lt
from typing import Any

from apothic.offers import FILTER_FIELDS, FilterField, Operator
from ray_backend.placement.criterion import (
    Criterion,
    figure,
    is_gpu,
    offer_fact,
    places_of,
    show_gpu,
)
from ray_backend.placement.offers import Kind

__all__ = ["filter_criterion"]

# Prices and memory are read from decimal texts: equal means equal but for the last bits.
_SLACK = 1e-9

# field -> fact, for the fields that are one attribute of an offer
_FILTERED: dict[str, str] = {
    "num_gpus": "gpus",
    "gpu_ram": "vram_mb",
    "gpu_mem_bw": "gpu_bandwidth_gb_s",
    "total_flops": "total_tflops",
    "cpu_cores_effective": "cpus",
    "cpu_ghz": "cpu_ghz",
    "disk_space": "disk_gb",
    "disk_bw": "disk_bandwidth_mb_s",
    "inet_up": "internet_upload_mbps",
    "inet_down": "internet_download_mbps",
    "dph_total": "cost_per_hour_usd",
    "reliability": "reliability",
    "verified": "verified",
    "datacenter": "secure_cloud",
}
# operator -> the same with the value on the left, where `partial` puts it
_TURNED: dict[Operator, Callable[[Any, Any], bool]] = {"gt": lt, "gte": le, "lt": gt, "lte": ge}
_SIGNS: dict[Operator, str] = {
    "eq": "=",
    "neq": "not",
    "gt": "above",
    "gte": "at least",
    "lt": "below",
    "lte": "at most",
    "in": "one of",
    "notin": "none of",
}


def filter_criterion(field: str, operator: Operator, value: Any) -> Criterion:
    """Make the criterion of one condition; the fields describe the node, not the slice of it."""
    spec = FILTER_FIELDS[field]
    parameter = f"offer_filters.{field}.{operator}"
    items = value if isinstance(value, tuple) else (value,)
    wanted = f"{_SIGNS[operator]} {', '.join(_shown(spec, item) for item in items)}"
    if field == "gpu_name":
        return Criterion(
            parameter,
            wanted,
            lambda o: o if o.gpu_types else None,
            lambda o: _found(operator, any(is_gpu(o, item) for item in items)),
            show_gpu,
            "gpu",
        )
    if field == "geolocation":
        return Criterion(
            parameter,
            wanted,
            places_of,
            lambda places: _found(
                operator,
                any(has.casefold() == item.casefold() for has in places for item in items),
            ),
            ", ".join,
        )

    def show(has: Any) -> str:
        return _shown(spec, has)

    test = _comparison(operator, value)
    if field == "cpu_ram":
        return Criterion(
            parameter,
            wanted,
            Kind.ram_mb,
            test,
            show,
            per_node=True,
        )
    fact = _FILTERED[field]
    return Criterion(parameter, wanted, lambda o: offer_fact(o, fact), test, show, fact)


def _shown(spec: FilterField, value: Any) -> str:
    if spec.kind == "number":
        return figure(value, spec.unit)
    return str(value).lower() if spec.kind == "flag" else str(value)


def _found(operator: Operator, found: bool) -> bool:
    """Turn "one of the values is there" into what the operator says of it."""
    return found if operator in ("eq", "in") else not found


def _comparison(operator: Operator, value: Any) -> Callable[[Any], bool]:
    """Give what an operator says of a fact; of memory it is asked for each of thousands of nodes."""
    if (turned := _TURNED.get(operator)) is not None:
        return partial(turned, value)
    items = value if isinstance(value, tuple) else (value,)

    def is_one(has: Any) -> bool:
        if isinstance(has, bool):
            return _found(operator, has in items)
        return _found(operator, any(math.isclose(has, item, rel_tol=_SLACK) for item in items))

    return is_one
