"""The parts of Ray that are not public API, each behind one function with a contract test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray._private import state as _state
from ray._private import worker as _worker

__all__ = [
    "actor_is_alive",
    "actor_record",
    "is_client_mode",
    "is_own_cluster",
    "live_jobs",
    "live_nodes",
    "restart_count",
    "session_directory",
]


def live_jobs() -> set[str]:
    """Name the jobs whose driver lives, as hex ids; a killed driver is gone within milliseconds."""
    client: Any = _worker.global_worker.gcs_client  # type: ignore[attr-defined]
    records = client.get_all_job_info(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    )
    return {key.hex() for key, record in records.items() if not record.is_dead}


def actor_record(actor_id: str) -> dict[str, Any]:
    """Give what the GCS knows of an actor: ``State``, ``NumRestarts``, ``Address``; empty if nothing."""
    found: dict[str, Any] = _state.actors(actor_id) or {}
    return found


def actor_is_alive(actor_id: str) -> bool:
    """Tell whether an actor lives or is about to, restarting included."""
    return actor_record(actor_id).get("State") in (
        "ALIVE",
        "RESTARTING",
        "PENDING_CREATION",
        "DEPENDENCIES_UNREADY",
    )


def live_nodes() -> list[dict[str, Any]]:
    """Give the nodes of the cluster as ``ray.nodes()`` does."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def restart_count(actor_id: str | None) -> int:
    """Tell how often an actor's process was replaced."""
    return int(actor_record(actor_id).get("NumRestarts", 0)) if actor_id else 0


def is_client_mode() -> bool:
    """Tell whether this process talks to the cluster through a ``ray://`` proxy."""
    return bool(ray.util.client.ray.is_connected())  # type: ignore[no-untyped-call]


def is_own_cluster() -> bool:
    """Tell whether this process started the cluster that it is connected to, so that both end."""
    node = _worker._global_node
    return node is not None and bool(node.is_head())


def session_directory() -> Path:
    """Give the directory of Ray's session on this node."""
    node = _worker._global_node
    assert node is not None  # set in every driver and worker
    return Path(os.fspath(node.get_session_dir_path()))
