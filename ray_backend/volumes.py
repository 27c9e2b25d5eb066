"""Volumes on the cluster: their records in the registry, their directories on the nodes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apothic.errors import BackendError, VolumeNotFoundError
from apothic.volume import HOST_LOCAL, StorageMount, check_same_volume
from ray_backend.actors.failure import RemoteFailure
from ray_backend.directories import SHARED_ROOT_VARIABLE, shared_root, volume_directory
from ray_backend.ray_api import live_nodes
from ray_backend.registry import Registry

__all__ = ["NO_ROOT", "Nodes", "delete", "ensure", "list_all"]


def ensure(registry: Registry, volume: StorageMount) -> None:
    """Record a volume, or check that the recorded one is the same.

    Raises:
        ConflictError: when it exists with another backend or size.
        VolumeNotFoundError: when it is missing and not to be created.
    """
    found = registry.get_volume(volume.name)
    if found is None:
        if not volume.create_if_missing:
            raise VolumeNotFoundError(
                f"volume {volume.name!r} does not exist on this cluster. Make it with Volume.create, "
                f"or name it with create_if_missing=True."
            )
        record: dict[str, Any] = {"backend": volume.backend, "size_gb": volume.size_gb}
        if registry.put_volume(volume.name, record):
            return
        found = registry.get_volume(volume.name) or record
    check_same_volume(StorageMount(volume.name, found["backend"], found["size_gb"]), volume)


def list_all(registry: Registry) -> list[StorageMount]:
    """List the recorded volumes."""
    found = []
    for name in registry.list_volumes():
        record = registry.get_volume(name)
        if record is not None:
            found.append(StorageMount(name, record["backend"], record["size_gb"]))
    return found


def delete(registry: Registry, name: str, nodes: Nodes | None = None) -> bool:
    """Remove a volume: its files on a node that has them, then its record.

    Args:
        registry: the cluster's.
        name: the volume's.
        nodes: the cluster's; those of Ray by default.

    Raises:
        BackendError: when the files cannot be removed; the record stays.
    """
    record = registry.get_volume(name)
    if record is None:
        return False
    nodes = nodes or RayNodes()
    problem: str | None = None
    if record["backend"] != HOST_LOCAL:
        problem = _remove_portable(name, record["backend"], nodes)
    else:
        node = registry.volume_node(name)
        if node is not None:  # else nobody has used it yet
            problem = nodes.remove(name, record["backend"], node)
    if problem is not None:
        raise BackendError(f"volume {name!r} was not removed: {problem}")
    return registry.delete_volume(name)


class Nodes(Protocol):
    """The nodes of a cluster, as removing a volume needs them."""

    def live(self) -> list[str]:
        """Name the nodes that live."""

    def have_shared_root(self, nodes: list[str]) -> Mapping[str, bool | str]:
        """Tell of each whether it has a shared root, or why it cannot be asked."""

    def remove(self, name: str, backend: str, node: str | None) -> str | None:
        """Remove a volume's files on a node, any for None; give `NO_ROOT`, or what went wrong."""


NO_ROOT: Final = "its node has no shared root"


def _remove_portable(name: str, backend: str, nodes: Nodes) -> str | None:
    """Remove a portable volume's files on whichever node reaches them."""
    problem = nodes.remove(name, backend, None)  # as a rule every node has the root, or none
    if problem != NO_ROOT:
        return problem
    answers = nodes.have_shared_root(nodes.live())
    for node, answer in answers.items():
        if answer is True:
            return nodes.remove(name, backend, node)
    for node, answer in answers.items():
        if answer is not False:
            return f"no other node has a shared root, and node {node} cannot be asked: {answer}"
    print(
        f"apothic: no node of the cluster has {SHARED_ROOT_VARIABLE}, so that volume {name!r} can have "
        f"no files there: its record alone was removed",
        file=sys.stderr,
    )
    return None


class RayNodes:
    """The nodes of the cluster that this process is connected to."""

    def live(self) -> list[str]:
        """Name the nodes that live."""
        return [str(node["NodeID"]) for node in live_nodes() if node["Alive"]]

    def have_shared_root(self, nodes: list[str]) -> Mapping[str, bool | str]:
        """Ask them all at once."""
        ask = _task(_has_shared_root)
        asked = {node: ask.options(**_on(node)).remote() for node in nodes}
        return {node: _answer(ref) for node, ref in asked.items()}

    def remove(self, name: str, backend: str, node: str | None) -> str | None:
        """Remove a volume's files on a node."""
        options = {} if node is None else _on(node)
        problem = _answer(_task(_remove).options(**options).remote(name, backend))
        return None if problem is None else str(problem)


def _task(function: Callable[..., Any]) -> Any:
    return ray.remote(num_cpus=0, max_retries=1)(function)


def _on(node: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:  # the node has gone
        return f"{type(error).__name__}: {error}"


def _has_shared_root() -> bool:
    return shared_root() is not None


def _remove(name: str, backend: str) -> str | None:
    if backend != HOST_LOCAL and not _has_shared_root():
        return NO_ROOT
    try:
        shutil.rmtree(volume_directory(name, backend))
    except FileNotFoundError:
        return None
    except (OSError, RemoteFailure) as error:
        return str(error)
    return None
