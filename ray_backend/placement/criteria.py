"""Constraints as a list of criteria, in the order in which the explanation names the first."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import ge, le
from typing import Any

from apothic.constraints import PlacementConstraints
from apothic.gpus import ANY_GPU
from ray_backend.placement.criterion import (
    Criterion,
    Slice,
    figure,
    is_gpu,
    offer_fact,
    places_of,
    show_gpu,
)
from ray_backend.placement.filters import filter_criterion
from ray_backend.placement.offers import Kind, Offer

__all__ = ["compile_criteria", "gpu_rank"]

# Figures come out of products and quotients: 2.1 × 1/3 must not be above 0.7.
_SLACK = 1e-9


def gpu_rank(offer: Offer, wanted: tuple[str, ...]) -> int | None:
    """Give the place of the offer's GPU in a list of preferences; None when it is not there."""
    for rank, name in enumerate(wanted):
        if (name == ANY_GPU and offer.gpus) or is_gpu(offer, name):
            return rank
    return None


def compile_criteria(constraints: PlacementConstraints, part: Slice) -> list[Criterion]:
    """List the tests of every given parameter in the order of the reference, capacity last."""
    criteria: list[Criterion] = []
    gpu_count = _at_least("gpu_count", part.gpus, "GPUs", lambda o: o.gpus, capacity=True)
    for name in constraints.given:
        if name == "gpu":
            criteria.append(_gpu(constraints.gpu or ()))
        elif name == "gpu_count":
            criteria.append(gpu_count)
        elif name == "geolocation":
            criteria.append(_geolocation(constraints.geolocation or ()))
        elif name == "secure_cloud_only":
            criteria.append(_secure())
        elif name == "offer_filters" and constraints.offer_filters is not None:
            criteria.extend(
                filter_criterion(field, operator, value)
                for field, operator, value in constraints.offer_filters.conditions()
            )
        else:
            criteria.append(_bound(name, getattr(constraints, name), part))
    if part.gpus and "gpu_count" not in constraints.given:
        criteria.append(gpu_count)
    criteria.append(_at_least("cpu", part.cpus, "cores", lambda o: o.cpus, capacity=True))
    criteria.append(_memory(part.memory_bytes / 2**20))
    return criteria


def _at_least(
    parameter: str,
    low: float,
    unit: str,
    read: Callable[[Any], Any],
    fact: str = "",
    per_node: bool = False,
    capacity: bool = False,
) -> Criterion:
    bound = low * (1 - _SLACK)
    return Criterion(
        parameter,
        f"at least {figure(low, unit)}",
        read,
        partial(le, bound),
        lambda value: figure(value, unit),
        fact,
        per_node,
        capacity,
    )


def _ram_gb(kind: Kind) -> list[float]:
    return [each / 1000 for each in kind.ram_mb()]


def _memory(low_mb: float) -> Criterion:
    return Criterion(
        "memory_mb",
        f"at least {figure(low_mb, 'MB')}",
        Kind.memory_mb,
        partial(le, low_mb * (1 - _SLACK)),
        # Rounded down, so that what is short of it never reads as enough.
        lambda value: figure(math.floor(value), "MB"),
        per_node=True,
        capacity=True,
    )


def _at_most(
    parameter: str, high: float, unit: str, read: Callable[[Offer], float | None], fact: str
) -> Criterion:
    bound = high * (1 + _SLACK)
    return Criterion(
        parameter,
        f"at most {figure(high, unit)}",
        read,
        partial(ge, bound),
        lambda value: figure(value, unit),
        fact,
    )


# parameter -> unit, fact; units of memory follow the labels, in GB of 1000 MB
_FACTS: dict[str, tuple[str, str]] = {
    "min_gpu_ram_bandwidth_gbps": ("GB/s", "gpu_bandwidth_gb_s"),
    "min_cpu_ghz": ("GHz", "cpu_ghz"),
    "min_disk_bandwidth_mb_s": ("MB/s", "disk_bandwidth_mb_s"),
    "min_internet_upload_mbps": ("Mbit/s", "internet_upload_mbps"),
    "min_internet_download_mbps": ("Mbit/s", "internet_download_mbps"),
    "disk_gb": ("GB", "disk_gb"),
}


def _bound(name: str, value: float, part: Slice) -> Criterion:
    if name == "max_cost_per_hour_usd":
        return _at_most(name, value, "USD/h", part.cost_per_hour_usd, "cost_per_hour_usd")
    if name == "max_cost_per_tflop_hour_usd":
        read = part.cost_per_tflop_hour_usd
        return _at_most(name, value, "USD/h/TFLOPS", read, "total_tflops")
    if name == "min_vram_gb":
        return _at_least(
            name,
            value,
            "GB",
            lambda o: None if o.vram_mb is None else o.vram_mb / 1000,
            "vram_mb",
        )
    if name == "min_total_flops":
        return _at_least(name, value, "TFLOPS", part.tflops, "total_tflops")
    if name == "min_cpu_cores":
        return _at_least(name, value, "cores", lambda o: o.cpus)
    if name == "min_cpu_ram_gb":
        return _at_least(name, value, "GB", _ram_gb, per_node=True)
    unit, fact = _FACTS[name]
    return _at_least(name, value, unit, lambda o: offer_fact(o, fact), fact)


def _gpu(wanted: tuple[str, ...]) -> Criterion:
    return Criterion(
        "gpu",
        " or ".join(wanted),
        lambda offer: offer if offer.gpus and (offer.gpu_types or ANY_GPU in wanted) else None,
        lambda offer: gpu_rank(offer, wanted) is not None,
        show_gpu,
        "gpu",
    )


def _geolocation(wanted: tuple[str, ...]) -> Criterion:
    folded = {place.casefold() for place in wanted}
    return Criterion(
        "geolocation",
        " or ".join(wanted),
        places_of,
        lambda places: any(place.casefold() in folded for place in places),
        ", ".join,
    )


def _secure() -> Criterion:
    return Criterion(
        "secure_cloud_only",
        "secure-cloud=true",
        lambda offer: offer.secure_cloud,
        bool,
        lambda value: f"secure-cloud={str(value).lower()}",
        "secure_cloud",
    )
