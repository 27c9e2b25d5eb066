"""`PlacementConstraints`: what a class or sandbox asks of the node that it runs on."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from apothic.errors import InvalidOptionError
from apothic.gpus import (
    ANY_GPU,
    GpuSpec,
    largest_memory_gb,
    nearest_gpus,
    other_accelerator,
    resolve_gpu,
)
from apothic.offers import OfferFiltersModel

__all__ = ["PlacementConstraints"]

# What each number is measured in and tested against, for the texts of errors.
_MINIMA: Mapping[str, str] = {
    "min_vram_gb": "GB of memory per GPU",
    "min_total_flops": "FP32 TFLOPS of the GPUs that are taken",
    "min_gpu_ram_bandwidth_gbps": "GB/s of memory bandwidth per GPU",
    "min_cpu_cores": "CPU cores of the node",
    "min_cpu_ram_gb": "GB of memory of the node",
    "min_cpu_ghz": "GHz",
    "min_disk_bandwidth_mb_s": "MB/s",
    "min_internet_upload_mbps": "Mbit/s",
    "min_internet_download_mbps": "Mbit/s",
    "disk_gb": "GB of disk",
}
_MAXIMA: Mapping[str, str] = {
    "max_cost_per_hour_usd": "USD per hour for the part of the node that is taken",
    "max_cost_per_tflop_hour_usd": "USD per hour and FP32 TFLOPS",
}
_GPU_PARAMETERS = (
    "gpu",
    "gpu_count",
    "min_vram_gb",
    "max_cost_per_tflop_hour_usd",
    "min_total_flops",
    "min_gpu_ram_bandwidth_gbps",
)
_GPU_FIELDS = frozenset({"gpu_name", "gpu_ram", "gpu_mem_bw", "total_flops"})
# A card sold as 24 GB reports up to 24 × 1024 MB, which is 24.576 in our units of 1000 MB.
_REPORTED_OVER_NOMINAL = 1.024


class PlacementConstraints(BaseModel):
    """Checked placement constraints, JSON-able; what is None constrains nothing.

    `check` raises `InvalidOptionError`; the constructor raises pydantic's ``ValidationError`` with
    the same text.

    Attributes:
        gpu: GPUs that will do, in order of preference, under Ray's names; ``any`` is every GPU.
        gpu_count: GPUs of the container.
        min_vram_gb: memory per GPU, in units of 1000 MB.
        geolocation: country codes or regions, any of which will do.
        offer_filters: further conditions on the node.
        max_cost_per_hour_usd: price of the part of the node that the container takes.
        max_cost_per_tflop_hour_usd: the same per FP32 TFLOPS of that part.
        min_total_flops: FP32 TFLOPS of the GPUs that the container takes.
        min_gpu_ram_bandwidth_gbps: memory bandwidth per GPU in GB/s.
        min_cpu_cores: CPU cores of the node.
        min_cpu_ram_gb: memory of the node, in units of 1000 MB.
        min_cpu_ghz: CPU clock of the node.
        min_disk_bandwidth_mb_s: disk bandwidth of the node in MB/s.
        min_internet_upload_mbps: in Mbit/s.
        min_internet_download_mbps: in Mbit/s.
        secure_cloud_only: True takes only nodes that state to be in a secure data centre.
        disk_gb: disk of the node, and the storage limit of a sandbox.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    gpu: tuple[str, ...] | None = None
    gpu_count: int | None = None
    min_vram_gb: float | None = None
    geolocation: tuple[str, ...] | None = None
    offer_filters: OfferFiltersModel | None = None
    max_cost_per_hour_usd: float | None = None
    max_cost_per_tflop_hour_usd: float | None = None
    min_total_flops: float | None = None
    min_gpu_ram_bandwidth_gbps: float | None = None
    min_cpu_cores: float | None = None
    min_cpu_ram_gb: float | None = None
    min_cpu_ghz: float | None = None
    min_disk_bandwidth_mb_s: float | None = None
    min_internet_upload_mbps: float | None = None
    min_internet_download_mbps: float | None = None
    secure_cloud_only: bool | None = None
    disk_gb: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: object) -> object:
        return _checked(value) if isinstance(value, Mapping) else value

    @classmethod
    def check(cls, **values: Any) -> PlacementConstraints:
        """Check the parameters as they were written.

        Raises:
            InvalidOptionError: naming the parameter, its value, the rule and the remedy.
        """
        return cls.model_validate(_checked(values))

    @property
    def is_empty(self) -> bool:
        """Whether any node will do."""
        return not self.given

    @property
    def given(self) -> tuple[str, ...]:
        """The parameters that constrain something, in the order of the reference."""
        return tuple(
            name
            for name in type(self).model_fields
            if (value := getattr(self, name)) is not None
            and value is not False
            and not (isinstance(value, OfferFiltersModel) and value.is_empty)
        )

    @property
    def num_gpus(self) -> int:
        """GPUs that the container takes: ``gpu_count``, else 1 with any GPU constraint, else 0.

        A filter on a figure of the GPU (name, memory, bandwidth, TFLOPS) is one; on the number of
        GPUs of the node it is not, since ``{"num_gpus": {"eq": 0}}`` asks for a node without.
        """
        if self.gpu_count is not None:
            return self.gpu_count
        conditions = () if self.offer_filters is None else self.offer_filters.conditions()
        filtered = any(field in _GPU_FIELDS for field, _, _ in conditions)
        return int(filtered or any(name in _GPU_PARAMETERS for name in self.given))


def _refuse(name: str, value: object, rule: str, remedy: str) -> InvalidOptionError:
    return InvalidOptionError(f"{name}={value!r} is not valid: {rule}. {remedy}")


def _checked(values: Mapping[str, object]) -> dict[str, object]:
    """Check every parameter by itself, then against the others."""
    known = list(PlacementConstraints.model_fields)
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known
            raise InvalidOptionError(
                f"there is no placement constraint {name!r}. Did you mean {', '.join(close)}?"
            )
    result: dict[str, object] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name == "gpu":
            result[name] = _checked_gpus(value)
        elif name == "geolocation":
            result[name] = _checked_places(value)
        elif name == "offer_filters":
            result[name] = OfferFiltersModel.parse(value)
        elif name == "gpu_count":
            result[name] = _checked_count(value)
        elif name == "secure_cloud_only":
            if not isinstance(value, bool):
                raise _refuse(name, value, "it takes True or False", "Leave it out for any node.")
            result[name] = value
        else:
            result[name] = _checked_number(name, value)
    _check_together(result)
    return result


def _checked_number(name: str, value: object) -> float:
    maximum = name in _MAXIMA
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not math.isfinite(value)
        or value < 0
        or (value == 0 and not maximum)
    ):
        if maximum:
            rule = f"it takes a finite number of at least 0, {_MAXIMA[name]}"
            remedy = "Leave it out to pay any price; 0 takes what is free."
        else:
            rule = f"it takes a finite number above 0, {_MINIMA[name]}"
            remedy = "Leave it out where nothing is required."
        raise _refuse(name, value, rule, remedy)
    return float(value)


def _checked_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise _refuse(
            "gpu_count",
            value,
            "it takes a whole number of at least 1",
            "Leave it out, together with every other GPU constraint, to run without a GPU.",
        )
    return int(value)


def _texts(name: str, value: object, example: str) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if isinstance(items, (bytes, Mapping)) or not isinstance(items, Sequence):
        raise _refuse(
            name, value, "it takes a string or a list of strings", f"Write {name}={example}."
        )
    if not items:
        raise _refuse(
            name,
            value,
            "an empty list names nothing that would do",
            f"Name at least one, as in {name}={example}, or leave it out.",
        )
    for item in items:
        if not isinstance(item, str) or not item.strip():
            raise _refuse(
                name, value, "it takes strings that are not empty", f"Write {name}={example}."
            )
    return [str(item).strip() for item in items]


def _checked_places(value: object) -> tuple[str, ...]:
    places: dict[str, str] = {}
    for place in _texts("geolocation", value, "['US', 'DE']"):
        places.setdefault(place.casefold(), place)
    return tuple(places.values())


def _checked_gpus(value: object) -> tuple[str, ...]:
    names: list[str] = []
    for text in _texts("gpu", value, "'A100' or ['H100', 'A100']"):
        spec = resolve_gpu(text)
        if text.casefold() == ANY_GPU:
            names.append(ANY_GPU)
        elif spec is not None:
            names.append(spec.name)
        elif (resource := other_accelerator(text)) is not None:
            raise _refuse(
                "gpu",
                value,
                f"Ray counts {text} as its resource {resource!r}, not as a GPU",
                "Name a GPU, or 'any' for whatever there is.",
            )
        else:
            near = nearest_gpus(text)
            raise _refuse(
                "gpu",
                value,
                f"no GPU named {text!r} is known",
                (f"Did you mean {', '.join(near)}? " if near else "")
                + "'any' takes every GPU; offer_filters={'gpu_name': {'eq': …}} takes a name as a "
                "node states it.",
            )
    return tuple(dict.fromkeys(names))


def _check_together(values: Mapping[str, object]) -> None:
    """Refuse what no machine could satisfy, because the parts contradict one another."""
    gpus, min_vram_gb = values.get("gpu"), values.get("min_vram_gb")
    if not isinstance(gpus, tuple) or not isinstance(min_vram_gb, float) or ANY_GPU in gpus:
        return
    specs: list[GpuSpec] = [spec for name in gpus if (spec := resolve_gpu(name)) is not None]
    sizes = {spec.name: largest_memory_gb(spec) for spec in specs}
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(known) == len(gpus) and all(
        size * _REPORTED_OVER_NOMINAL < min_vram_gb for size in known.values()
    ):
        listed = ", ".join(f"{name} has {size:g}" for name, size in known.items())
        raise InvalidOptionError(
            f"min_vram_gb={min_vram_gb:g} contradicts gpu={list(gpus)!r}: it is above the memory "
            f"of every GPU named (GB: {listed}). It counts per GPU: lower it to at most "
            f"{max(known.values()):g}, or name a larger GPU."
        )
