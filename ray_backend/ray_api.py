"""The parts of Ray that are not public API, each behind one function with a contract test."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private import state as _state
from ray._private import worker as _worker
from ray.core.generated import gcs_pb2 as _gcs_pb2
from ray.util import client as _ray_client
from ray.util import serialization_addons as _addons

__all__ = [
    "ActorSeat",
    "actor_is_alive",
    "actor_record",
    "actor_seat",
    "actor_seats",
    "are_done",
    "connection_id",
    "current_actor_name",
    "free_resources",
    "is_client_mode",
    "is_known_dead",
    "is_own_cluster",
    "leave_out_serializers",
    "live_jobs",
    "live_nodes",
    "ping_client_server",
    "restart_count",
    "session_directory",
]


_messages: Any = _gcs_pb2  # its names are made when it is imported
_client: Any = _ray_client.ray  # without annotations


def current_actor_name() -> str:
    """Name the actor that this process is; empty in one that is none, or has no name."""
    if _worker.global_worker.mode != ray.WORKER_MODE:
        return ""
    return ray.get_runtime_context().get_actor_name() or ""


def leave_out_serializers() -> None:
    """Have Ray register no serializers for the types of pydantic, starlette and pyarrow here.

    It imports these packages for that, where they are installed, before an actor's first argument is
    read: 0.07 s of an actor's start, and 10 MiB. To be called where its class is imported.
    """
    addons: Any = _addons
    addons.apply = lambda context: None


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


def free_resources() -> dict[str, dict[str, float]]:
    """Give what is free on each live node, by node id; some 20 ms old, used-up resources left out."""
    found: dict[str, dict[str, float]] = _state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return found


class ActorSeat(NamedTuple):
    """Where an actor sits, or waits to.

    Attributes:
        actor_id: in hex.
        name: empty when it has none.
        namespace: of the name.
        class_name: its class.
        state: ``PENDING_CREATION``, ``ALIVE``, ``RESTARTING``, ``DEAD`` or ``DEPENDENCIES_UNREADY``.
        node_id: the node that it is on, was on or queues at, in hex; empty when there is none. Where
            it is unschedulable, any.
        seated: whether that node has granted it a worker.
        resources: what it takes.
        label_selector: the labels that its node must have.
        runtime_env: the runtime environment as Ray keeps it, all its parents' merged in.
        unschedulable: it died because the node that it asked for is gone.
        death: why it died, in Ray's words; empty while it has not.
        end_unix_ms: when it died; 0 while it has not.
    """

    actor_id: str
    name: str
    namespace: str
    class_name: str
    state: str
    node_id: str
    seated: bool
    resources: Mapping[str, float]
    label_selector: Mapping[str, str]
    runtime_env: Mapping[str, Any]
    unschedulable: bool
    death: str
    end_unix_ms: int

    @property
    def waits(self) -> bool:
        """Whether it has no worker yet: it queues, or its worker is being started."""
        return self.state in ("PENDING_CREATION", "RESTARTING") and not self.seated


def actor_seat(actor_id: str) -> ActorSeat | None:
    """Give one actor's seat; None when the GCS knows no such actor."""
    raw = _accessor().get_actor_info(ray.ActorID.from_hex(actor_id))
    return None if raw is None else _seat(raw)


def actor_seats(state: str | None = None) -> list[ActorSeat]:
    """Give the seats of all actors, or of those in one state."""
    return [_seat(raw) for raw in _accessor().get_actor_table(None, state)]


def _accessor() -> Any:
    state: Any = _state.state
    if hasattr(state, "_connect_and_get_accessor"):
        return state._connect_and_get_accessor()
    state._check_connected()  # until Ray 2.5x
    return state.global_state_accessor


def _seat(raw: bytes) -> ActorSeat:
    record: Any = _messages.ActorTableData.FromString(raw)
    environment = json.loads(record.serialized_runtime_env or "{}")
    return ActorSeat(
        record.actor_id.hex(),
        record.name,
        record.ray_namespace,
        record.class_name,
        _messages.ActorTableData.ActorState.Name(record.state),
        record.address.node_id.hex(),
        bool(record.address.worker_id),
        dict(record.required_resources),
        dict(record.label_selector),
        environment,
        record.death_cause.HasField("actor_unschedulable_context"),
        _death(record.death_cause),
        record.end_time,
    )


def _death(cause: Any) -> str:
    died, unschedulable = cause.actor_died_error_context, cause.actor_unschedulable_context
    return str(died.error_message or unschedulable.error_message)


def are_done(refs: Sequence[Any]) -> list[bool]:
    """Tell of each reference whether its value or its error is there, in one request."""
    unique = list(dict.fromkeys(refs))
    ready, _ = ray.wait(unique, num_returns=len(unique), timeout=0, fetch_local=False)
    found = set(ready)
    return [ref in found for ref in refs]


def is_known_dead(actor: Any) -> bool:
    """Tell whether this process has been told that an actor has died for good; asks nobody.

    False where nothing is known: before the first call of a handle, and behind a proxy.
    """
    if not isinstance(actor, ray.actor.ActorHandle):
        return False
    state: int | None = actor._get_local_state()  # type: ignore[no-untyped-call]
    return bool(state == _messages.ActorTableData.DEAD)


def restart_count(actor_id: str | None) -> int:
    """Tell how often an actor's process was replaced."""
    return int(actor_record(actor_id).get("NumRestarts", 0)) if actor_id else 0


def is_client_mode() -> bool:
    """Tell whether this process talks to the cluster through a ``ray://`` proxy."""
    return bool(ray.util.client.ray.is_connected())  # type: ignore[no-untyped-call]


def ping_client_server(address: str, timeout_s: float) -> None:
    """Call a Ray Client server once, as this process is authenticated.

    Ray itself takes half a minute to give up on a server that refuses its token, and says "timeout".

    Raises:
        PermissionError: when it refuses this process's token, or its having none; no other failure.
    """
    try:
        grpc: Any = import_module("grpc")
        utils: Any = import_module("ray._private.grpc_utils")
        messages: Any = import_module("ray.core.generated.ray_client_pb2")
        stubs: Any = import_module("ray.core.generated.ray_client_pb2_grpc")
    except ImportError:
        return  # without grpcio ray.init() says what to install; older Ray has no tokens
    with utils.init_grpc_channel(address) as channel:
        ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
        try:
            stubs.RayletDriverStub(channel).ClusterInfo(ping, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise PermissionError(f"unauthenticated: {error.details()}") from None


def is_own_cluster() -> bool:
    """Tell whether this process started the cluster that it is connected to, so that both end."""
    node = _worker._global_node
    return node is not None and bool(node.is_head())


def connection_id() -> str:
    """Tell this process's connection from every other, also from its next one to another cluster."""
    if is_client_mode():
        return str(_client.get_context().client_worker._client_id)
    node = _worker._global_node
    # A driver's worker id follows from its job's number, which begins anew on each cluster.
    return f"{ray.get_runtime_context().get_worker_id()} {node and node.session_name}"


def session_directory() -> Path:
    """Give the directory of Ray's session on this node."""
    node = _worker._global_node
    assert node is not None  # set in every driver and worker
    return Path(os.fspath(node.get_session_dir_path()))
