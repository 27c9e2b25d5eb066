"""Nodes as `ray.nodes()` of Ray 2.60 lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from apothic.constraints import PlacementConstraints
from ray_backend.placement.demand import Plan, plan

GIB = 2**30


def node(
    name: str,
    *,
    cpus: float = 8,
    memory_gib: float = 32,
    gpus: float = 0,
    gpu: str | None = None,
    offer: str | None = None,
    alive: bool = True,
    resources: Mapping[str, float] | None = None,
    ray_labels: Mapping[str, str] | None = None,
    **labels: object,
) -> dict[str, Any]:
    """Make a node; keyword ``cost_per_hour_usd`` is label ``apothic.io/cost-per-hour-usd``."""
    node_id = hashlib.sha256(name.encode()).hexdigest()[:56]
    held: dict[str, float] = {
        "CPU": float(cpus),
        "memory": memory_gib * GIB,
        f"node:10.0.0.{name}": 1.0,
        **(resources or {}),
    }
    described = {"ray.io/node-id": node_id, **(ray_labels or {})}
    if gpus:
        held["GPU"] = float(gpus)
    if gpu is not None:
        held[f"accelerator_type:{gpu}"] = 1.0
        described["ray.io/accelerator-type"] = gpu
    if offer is not None:
        held[f"offer:{offer}"] = 1.0
        labels = {"offer": offer, **labels}
    for key, value in labels.items():
        described[f"apothic.io/{key.replace('_', '-')}"] = str(value)
    return {
        "NodeID": node_id,
        "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{name}",
        "NodeManagerHostname": f"host-{name}",
        "Resources": held if alive else {},
        "Labels": described,
    }


def node_id(name: str) -> str:
    return str(node(name)["NodeID"])


def place(
    nodes: list[dict[str, Any]],
    available: Mapping[str, Mapping[str, float]] | None = None,
    cpu: int = 1,
    memory_mb: int = 1024,
    **constraints: Any,
) -> Plan:
    return plan(
        PlacementConstraints.check(**constraints),
        cpu=cpu,
        memory_mb=memory_mb,
        nodes=nodes,
        available=available,
    )


def first_names(found: Plan) -> list[str]:
    return [choice.name for choice in found.choices]


FULL: dict[str, object] = {
    "vram_gb": 80,
    "cost_per_hour_usd": 16,
    "total_tflops": 156,
    "gpu_mem_bandwidth_gbps": 2000,
    "cpu_ghz": 3.0,
    "disk_bandwidth_mb_s": 1000,
    "internet_upload_mbps": 500,
    "internet_download_mbps": 900,
    "secure_cloud": "true",
    "verified": "true",
    "reliability": 0.99,
    "country": "US",
    "disk_gb": 1000,
}
"""Labels that state every fact."""


def full_node(name: str = "full", offer: str | None = "full", **changes: Any) -> dict[str, Any]:
    """Give a node with 8 A100 of 80 GB that states everything; None takes a label away."""
    labels = {key: value for key, value in {**FULL, **changes}.items() if value is not None}
    return node(
        name,
        cpus=64,
        memory_gib=256,
        gpus=8,
        gpu="A100",
        offer=offer,
        ray_labels={"ray.io/availability-region": "us-east-1"},
        **labels,
    )
