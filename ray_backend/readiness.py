"""Waiting until an instance is ready: for room on a node, then for ``enter``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions as rays

from apothic.backend import StartRequest
from apothic.errors import (
    ConflictError,
    InstanceClosedError,
    InstanceLostError,
    PlacementTimeoutError,
)
from ray_backend import ray_api
from ray_backend.translate import failure_inside, translate

if TYPE_CHECKING:
    from ray_backend.client import RayClient
    from ray_backend.instances import RayInstance

__all__ = ["STOPPING_WAIT_S", "wait_ready"]

PLACEMENT_TIMEOUT_VARIABLE = "APOTHIC_PLACEMENT_TIMEOUT_S"
PLACEMENT_TIMEOUT_S = 600.0
"""Seconds that an instance may wait for room before `PlacementTimeoutError`."""

STOPPING_WAIT_S = 60.0
"""Seconds to wait for a name whose instance is being stopped."""


def wait_ready(client: RayClient, instance: RayInstance) -> None:
    """Wait for ``enter``; what cannot become ready is removed before the error is raised.

    An existing instance that was asked for may be found while it stops: then another is made.
    """
    request: StartRequest | None = instance.request
    deadline = time.monotonic() + STOPPING_WAIT_S
    while True:
        try:
            _wait_once(client, instance, request)
            return
        except (InstanceClosedError, InstanceLostError):
            if request is None or not request.reuse or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            instance.take_over(client.start(request))


def _wait_once(client: RayClient, instance: RayInstance, request: StartRequest | None) -> None:
    actor = instance.native
    label = instance.label
    try:
        if request is None or request.reuse:
            status = _get_placed(client, instance, actor.apothic_status.remote())
            if request is not None:
                _check_same_arguments(request, status, label)
            if status["state"] == "ready":
                return
        _get_placed(client, instance, actor.apothic_start.remote())
    except rays.RayError as error:
        found = translate(error, label)
        failure = failure_inside(error)
        started_badly = failure is not None and failure.kind == "start"
        if started_badly or (request is not None and not request.reuse):
            client.close_instance(instance)
        raise found from found.__cause__
    except PlacementTimeoutError:
        client.close_instance(instance)
        raise


def _get_placed(client: RayClient, instance: RayInstance, ref: Any) -> Any:
    """Get a first reply, but do not wait for ever for room."""
    limit_s = float(os.environ.get(PLACEMENT_TIMEOUT_VARIABLE, PLACEMENT_TIMEOUT_S))
    try:
        return ray.get(ref, timeout=limit_s)
    except rays.GetTimeoutError:
        if client.is_proxy:
            raise
        actor_id = instance.native._actor_id.hex()
        if ray_api.actor_record(actor_id).get("State") == "ALIVE":
            return ray.get(ref)  # it has room and takes its time to enter
    holders = ", ".join(
        f"{info.app}.{info.cls} {info.instance_id!r}" for info in client.list_instances()[:10]
    )
    raise PlacementTimeoutError(
        f"{instance.label} found no room within {limit_s:g} s: nodes qualify, but what it needs is "
        f"taken. Of this package, there live: {holders or 'none'}. Close some, add nodes, ask for "
        f"less cpu, memory_mb or gpu_count, or raise {PLACEMENT_TIMEOUT_VARIABLE}."
    )


def _check_same_arguments(request: StartRequest, status: Mapping[str, Any], label: str) -> None:
    if request.match_arguments and status["arguments_digest"] != request.arguments_digest:
        raise ConflictError(
            f"{label} exists already with other constructor arguments. Leave the arguments out "
            f"to use it as it is, close it first, or use another id."
        )
