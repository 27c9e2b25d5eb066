"""What a criterion is: a reading of an offer's facts, a test of it, and how to show it.

Matching and explaining are the same walk, because every criterion knows the parameter that the user
wrote, what it wants and how to write down what an offer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apothic.gpus import resolve_gpu, same_gpu_name
from ray_backend.placement.offers import Kind, Offer

__all__ = [
    "Criterion",
    "Slice",
    "figure",
    "is_gpu",
    "offer_fact",
    "places_of",
    "show_gpu",
]


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a node that one container takes."""

    cpus: int
    gpus: int
    memory_bytes: int

    def share(self, offer: Offer) -> float | None:
        """Give the part of the node's price that falls to it: by GPUs, else by CPU cores."""
        taken, whole = (self.gpus, offer.gpus) if self.gpus else (self.cpus, offer.cpus)
        return taken / whole if whole else None

    def cost_per_hour_usd(self, offer: Offer) -> float | None:
        """Give its price; None where the node states none."""
        share = self.share(offer)
        if share is None or offer.cost_per_hour_usd is None:
            return None
        return offer.cost_per_hour_usd * share

    def tflops(self, offer: Offer) -> float | None:
        """Give the FP32 TFLOPS of its GPUs; None where nothing states them."""
        if not offer.gpus or offer.total_tflops is None:
            return None
        return offer.total_tflops * self.gpus / offer.gpus

    def cost_per_tflop_hour_usd(self, offer: Offer) -> float | None:
        """Give its price per FP32 TFLOPS."""
        cost, tflops = self.cost_per_hour_usd(offer), self.tflops(offer)
        return cost / tflops if cost is not None and tflops else None


@dataclass(frozen=True, slots=True)
class Criterion:
    """One test.

    Attributes:
        parameter: what the user wrote, ``offer_filters.gpu_ram.gte`` for a filter.
        wanted: what it wants, for the table.
        read: gives the fact of an `Offer`; None when nobody states it. Where ``per_node`` it takes
            a `Kind`, and gives a list of what each of its nodes has.
        test: whether a stated fact will do.
        show: gives the fact as text.
        fact: the attribute of `Offer` that a malformed label would have stated.
        per_node: whether the nodes of one kind may differ in it.
        capacity: whether Ray enforces it by itself, from the resources that are asked for.
    """

    parameter: str
    wanted: str
    read: Callable[[Any], Any]
    test: Callable[[Any], bool]
    show: Callable[[Any], str]
    fact: str = ""
    per_node: bool = False
    capacity: bool = False

    def failure(self, offer: Offer) -> str | None:
        """Give what the offer has in place of what is wanted; None when it will do."""
        value = self.read(offer)
        if value is None:
            return self._unstated(offer)
        if self.test(value):
            return None
        notes = []
        if self.fact in offer.by_name:
            notes.append("by name")
        if self.fact in offer.malformed:
            notes.append(f"{offer.malformed[self.fact]} cannot be read")
        return self.show(value) + (f" ({'; '.join(notes)})" if notes else "")

    def node_failure(self, kind: Kind) -> str | None:
        """Do the same for what differs by node, of one node."""
        (value,) = self.read(kind)
        return None if self.test(value) else self.show(value)

    def _unstated(self, offer: Offer) -> str:
        malformed = offer.malformed.get(self.fact)
        if malformed is not None:
            return f"not stated ({malformed} cannot be read)"
        return "no GPU" if self.fact in _GPU_FACTS and not offer.gpus else "not stated"


_GPU_FACTS = frozenset({"gpu", "vram_mb", "gpu_bandwidth_gb_s", "total_tflops"})


def figure(value: float, unit: str = "") -> str:
    """Write a number for a person: at most six digits, no exponent."""
    text = f"{value:.6g}"
    if "e" in text:
        text = f"{value:.0f}" if abs(value) >= 1 else f"{value:.9f}".rstrip("0")
    return f"{text} {unit}".rstrip()


def offer_fact(offer: Offer, fact: str) -> Any:
    """Read one attribute; a figure of GPUs is not stated where there are none."""
    return None if fact in _GPU_FACTS and not offer.gpus else getattr(offer, fact)


def places_of(offer: Offer) -> tuple[str, ...] | None:
    """Give country and region, as far as they are stated."""
    return tuple(each for each in (offer.country, offer.region) if each) or None


def is_gpu(offer: Offer, name: str) -> bool:
    """Tell whether a name means the GPU of an offer; one that is not known must be as written."""
    wanted, card = resolve_gpu(name), offer.gpu
    if wanted is None:
        return any(same_gpu_name(reported, name) for reported in offer.gpu_types)
    if card is None:
        return False
    if wanted.name in (card.name, card.family):
        return True
    # A node that reports the family alone counts as its smallest card: `A100` as `A100-40G`.
    return (
        wanted.family == card.name and wanted.told_by_memory and wanted.memory_gb == card.memory_gb
    )


def show_gpu(offer: Offer) -> str:
    """Write the names that an offer gives its GPU, and the memory that picks the card."""
    text = ", ".join(offer.gpu_types)
    if offer.vram_mb is None:
        return text
    return f"{text} with {figure(offer.vram_mb / 1000, 'GB')}" + (
        " (by name)" if "vram_mb" in offer.by_name else ""
    )
