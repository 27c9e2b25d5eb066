"""Volumes on the cluster: their records in the registry, their directories on the nodes."""

from __future__ import annotations

import shutil
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apothic.errors import BackendError, VolumeNotFoundError
from apothic.volume import HOST_LOCAL, StorageMount, check_same_volume
from ray_backend.actors.failure import RemoteFailure
from ray_backend.directories import volume_directory
from ray_backend.registry import Registry

__all__ = ["delete", "ensure", "list_all"]


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


def delete(registry: Registry, name: str) -> bool:
    """Remove a volume: its files on the node that has them, then its record.

    Raises:
        BackendError: when the files cannot be removed; the record stays.
    """
    record = registry.get_volume(name)
    if record is None:
        return False
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 1}
    node = registry.volume_node(name)
    if record["backend"] != HOST_LOCAL or node is not None:
        if node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        problem = ray.get(ray.remote(**options)(_remove).remote(name, record["backend"]))
        if problem is not None:
            raise BackendError(f"volume {name!r} was not removed: {problem}")
    return registry.delete_volume(name)


def _remove(name: str, backend: str) -> str | None:
    try:
        shutil.rmtree(volume_directory(name, backend))
    except FileNotFoundError:
        return None
    except (OSError, RemoteFailure) as error:
        return str(error)
    return None
