"""What a node says about itself: `Offer` is one kind of node.

A node states its figures in labels under ``apothic.io/``; Ray states CPUs, memory, GPUs and the
accelerator type; what neither states and follows from the GPU's name comes from `apothic.gpus`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import itemgetter
from typing import Any, TypeAlias

from apothic.errors import InvalidOptionError
from apothic.gpus import GpuSpec, spec_of_node

__all__ = ["LABEL_PREFIX", "OFFER_PREFIX", "Kind", "Node", "Offer", "group_nodes"]

LABEL_PREFIX = "apothic.io/"
OFFER_PREFIX = "offer:"
_TYPE_PREFIX = "accelerator_type:"
_TYPE_LABEL = "ray.io/accelerator-type"
# Ray 2.60 writes the second; its documentation also knows the first.
_REGION_LABELS = ("ray.io/region", "ray.io/availability-region")
# A placement group advertises the resources that it holds a second time, under such names.
_OF_PLACEMENT_GROUP = re.compile(r"_group_(?:\d+_)?[0-9a-f]{8,}$")


@dataclass(frozen=True, slots=True)
class Offer:
    """The facts that the nodes of one kind share; a fact that nobody states is None.

    Attributes:
        name: how tables call it: the offer's id, or what kind of node it is.
        offer_id: the id in the ``offer:<id>`` resource; None where no such resource exists.
        cpus: CPU cores.
        gpus: GPUs, as Ray counts them.
        gpu_types: every name that the node gives its GPUs.
        gpu_resources: those of them that exist as ``accelerator_type:<name>`` resource.
        gpu: the card that the names and the labelled memory amount to.
        vram_mb: memory per GPU.
        gpu_bandwidth_gb_s: memory bandwidth per GPU.
        total_tflops: FP32 TFLOPS of all GPUs.
        cost_per_hour_usd: price of the whole node.
        cpu_ghz: CPU clock.
        disk_bandwidth_mb_s: disk bandwidth.
        internet_upload_mbps: upload bandwidth in Mbit/s.
        internet_download_mbps: download bandwidth in Mbit/s.
        secure_cloud: whether it stands in a secure data centre.
        verified: whether its provider verified it.
        reliability: share of the time that it is up.
        country: country code.
        region: region.
        disk_gb: disk.
        by_name: the facts that no label states and that follow from the GPU's name.
        malformed: labels that cannot be read, by the fact that they should have stated.
        resources: all of a node's resources; only for a kind that is registered, since the memory
            of live nodes differs from node to node.
    """

    name: str
    offer_id: str | None
    cpus: float
    gpus: float
    gpu_types: tuple[str, ...] = ()
    gpu_resources: tuple[str, ...] = ()
    gpu: GpuSpec | None = None
    vram_mb: float | None = None
    gpu_bandwidth_gb_s: float | None = None
    total_tflops: float | None = None
    cost_per_hour_usd: float | None = None
    cpu_ghz: float | None = None
    disk_bandwidth_mb_s: float | None = None
    internet_upload_mbps: float | None = None
    internet_download_mbps: float | None = None
    secure_cloud: bool | None = None
    verified: bool | None = None
    reliability: float | None = None
    country: str | None = None
    region: str | None = None
    disk_gb: float | None = None
    by_name: frozenset[str] = frozenset()
    malformed: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_node_type(
        cls, name: str, resources: Mapping[str, float], labels: Mapping[str, str] | None = None
    ) -> Offer:
        """Describe a node type that the autoscaler could start, as registered.

        Args:
            name: the node type's name, for errors.
            resources: what its nodes will advertise, ``offer:<id>`` among them.
            labels: the labels that they will have.

        Raises:
            InvalidOptionError: without exactly one ``offer:<id>`` resource, which is what tells
                the autoscaler which type to start.
        """
        special = sorted(filter(_is_special, resources))
        ids = [each for each in special if each.startswith(OFFER_PREFIX)]
        if len(ids) != 1:
            raise InvalidOptionError(
                f"node type {name!r} advertises {', '.join(ids) or 'no offer resource'}: a "
                f"registered type takes exactly one. Add 'offer:{name}': 1 to its resources."
            )
        return _offer(
            float(resources.get("CPU", 0.0)),
            float(resources.get("GPU", 0.0)),
            special,
            labels or {},
            resources,
        )


Node: TypeAlias = Mapping[str, Any]
"""One live node as ``ray.nodes()`` gives it; nothing is made of each, since there are thousands."""


@dataclass(slots=True)
class Kind:
    """Nodes of one kind; what is a list has an entry for each, in the same order.

    Attributes:
        offer: the facts that they share.
        ids: their ids.
        resources: what each has.
        memory_bytes: what each has for containers.
        store_bytes: what each gives Ray's object store.
    """

    offer: Offer
    ids: list[str]
    resources: list[Mapping[str, float]]
    memory_bytes: list[float]
    store_bytes: list[float]

    @classmethod
    def of_type(cls, offer: Offer) -> Kind:
        """Describe a node of a registered kind, as if there were one."""
        memory = offer.resources.get("memory", 0.0)
        store = offer.resources.get("object_store_memory", 0.0)
        return cls(offer, [""], [offer.resources], [memory], [store])

    def memory_mb(self) -> list[float]:
        """Give what each has for containers, in units of 2**20 bytes."""
        return [each / 2**20 for each in self.memory_bytes]

    def ram_mb(self) -> list[float]:
        """Give the memory of each machine, in the marketplace's units of 10**6 bytes."""
        both = zip(self.memory_bytes, self.store_bytes, strict=True)
        return [(memory + store) / 1_000_000 for memory, store in both]

    def only(self, wanted: Sequence[bool]) -> Kind:
        """Give some of them."""
        return Kind(
            self.offer,
            list(compress(self.ids, wanted)),
            list(compress(self.resources, wanted)),
            list(compress(self.memory_bytes, wanted)),
            list(compress(self.store_bytes, wanted)),
        )


def group_nodes(nodes: Sequence[Node]) -> list[Kind]:
    """Sort the live nodes of ``ray.nodes()`` by kind, so that each kind is looked at once.

    Memory is no part of a kind: it differs from node to node by a few bytes.
    """
    # There may be thousands, so that what is done for each counts, and most of that is to fetch it from
    # memory: each is touched once, and its names are compared by the hashes that its tables hold.
    kinds: dict[object, Kind] = {}
    known: dict[object, Kind] = {}
    readers: dict[frozenset[str], tuple[object, Callable[[Mapping[str, str]], object]]] = {}
    for node in nodes:
        if not node["Alive"]:
            continue
        resources: Mapping[str, float] = node["Resources"]
        labels: Mapping[str, str] = node.get("Labels") or {}
        reader = readers.get(stated := frozenset(labels))
        if reader is None:
            reader = readers[stated] = _reader(stated)
        names = set(resources)
        names.discard("node:" + node.get("NodeManagerAddress", ""))
        told = resources.get("CPU", 0.0), resources.get("GPU", 0.0), reader[0], reader[1](labels)
        kind = known.get(key := (told, frozenset(names)))
        if kind is None:
            # Not every name tells kinds apart: placement groups have theirs on each of their nodes.
            special = sorted(filter(_is_special, names))
            kind = kinds.get(of := (told, tuple(special)))
            if kind is None:
                offer = _offer(float(told[0]), float(told[1]), special, labels)
                kind = kinds[of] = Kind(offer, [], [], [], [])
            known[key] = kind
        kind.ids.append(node["NodeID"])
        kind.resources.append(resources)
        kind.memory_bytes.append(resources.get("memory", 0.0))
        kind.store_bytes.append(resources.get("object_store_memory", 0.0))
    return list(kinds.values())


def _reader(labels: frozenset[str]) -> tuple[object, Callable[[Mapping[str, str]], object]]:
    """Give which of these labels tell kinds apart, and what reads their values."""
    ours = tuple(sorted(labels & _LABELS))
    return ours, itemgetter(*ours) if ours else _nothing


def _nothing(labels: Mapping[str, str]) -> None:
    return None


def _is_special(name: str) -> bool:
    return name.startswith((OFFER_PREFIX, _TYPE_PREFIX)) and not _OF_PLACEMENT_GROUP.search(name)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


def _share(text: str) -> float:
    value = _number(text)
    if value > 1:
        raise ValueError(text)
    return value


def _flag(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
        text.casefold()
    ]


# fact -> label without the prefix, reader
_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "vram_mb": ("vram-gb", lambda text: round(_number(text) * 1000, 6)),
    "gpu_bandwidth_gb_s": ("gpu-mem-bandwidth-gbps", _number),
    "total_tflops": ("total-tflops", _number),
    "cost_per_hour_usd": ("cost-per-hour-usd", _number),
    "cpu_ghz": ("cpu-ghz", _number),
    "disk_bandwidth_mb_s": ("disk-bandwidth-mb-s", _number),
    "internet_upload_mbps": ("internet-upload-mbps", _number),
    "internet_download_mbps": ("internet-download-mbps", _number),
    "secure_cloud": ("secure-cloud", _flag),
    "verified": ("verified", _flag),
    "reliability": ("reliability", _share),
    "country": ("country", str),
    "disk_gb": ("disk-gb", _number),
}
_OFFER_LABEL = LABEL_PREFIX + "offer"
_LABELS = frozenset(
    {
        _OFFER_LABEL,
        _TYPE_LABEL,
        *_REGION_LABELS,
        *(LABEL_PREFIX + label for label, _ in _READERS.values()),
    }
)


def _offer(
    cpus: float,
    gpus: float,
    special: Sequence[str],
    labels: Mapping[str, str],
    resources: Mapping[str, float] | None = None,
) -> Offer:
    facts: dict[str, Any] = {}
    malformed: dict[str, str] = {}
    for fact, (label, read) in _READERS.items():
        text = labels.get(LABEL_PREFIX + label, "").strip()
        if not text:
            continue
        try:
            facts[fact] = read(text)
        except (ValueError, KeyError):
            malformed[fact] = f"{label}={text!r}"
    offer_ids = [each[len(OFFER_PREFIX) :] for each in special if each.startswith(OFFER_PREFIX)]
    gpu_resources = tuple(
        each[len(_TYPE_PREFIX) :] for each in special if each.startswith(_TYPE_PREFIX)
    )
    labelled_type = labels.get(_TYPE_LABEL, "").strip()
    gpu_types = tuple(sorted({*gpu_resources, *([labelled_type] if labelled_type else [])}))
    spec = None
    by_name: dict[str, float] = {}
    if gpus:
        labelled_mb: float | None = facts.get("vram_mb")
        spec = spec_of_node(gpu_types, None if labelled_mb is None else labelled_mb / 1000)
        by_name = {fact: value for fact, value in _by_name(spec, gpus).items() if fact not in facts}
    else:
        # Without GPUs, labels about them describe nothing that could be had.
        facts.pop("vram_mb", None)
    offer_id = offer_ids[0] if offer_ids else None
    kind = f"{gpus:g}x {gpu_types[0] if gpu_types else 'unnamed GPU'}" if gpus else "no GPU"
    return Offer(
        name=offer_id or f"({labels.get(_OFFER_LABEL) or 'no offer'}) {kind}",
        offer_id=offer_id,
        cpus=cpus,
        gpus=gpus,
        gpu_types=gpu_types if gpus else (),
        gpu_resources=gpu_resources if gpus else (),
        gpu=spec,
        region=next((labels[each] for each in _REGION_LABELS if labels.get(each)), None),
        by_name=frozenset(by_name),
        malformed=malformed,
        resources=dict(resources or {}),
        **{**by_name, **facts},
    )


def _by_name(spec: GpuSpec | None, gpus: float) -> dict[str, float]:
    """Give the facts that follow from the name of the GPU."""
    if spec is None:
        return {}
    facts = {
        "vram_mb": spec.memory_gb and spec.memory_gb * 1000,
        "gpu_bandwidth_gb_s": spec.bandwidth_gb_s,
        "total_tflops": spec.fp32_tflops and spec.fp32_tflops * gpus,
    }
    return {fact: value for fact, value in facts.items() if value is not None}
