"""Volumes in a sandbox: the same directories that classes see on the node."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import docker.errors

from apothic.errors import SandboxEngineError
from apothic.volume import HOST_LOCAL, StorageMount
from ray_backend.actors.failure import RemoteFailure
from ray_backend.directories import volume_directory
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.container import BindMount
from ray_backend.sandbox.engine.helper import helper_container
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.translate import translated

__all__ = ["bind_volumes", "check_same_directories"]


def bind_volumes(
    engine: Engine, volumes: Mapping[str, StorageMount], owner: OwnerLabels
) -> tuple[BindMount, ...]:
    """Make the volumes' directories and give the mounts; checked to be the engine's as well.

    Takes about 60 ms where there are any. That a host-local volume belongs to this node is for the
    caller to see to (`Registry.pin_volume`). Files that a sandbox writes belong to its root, which
    is the node's root.

    Args:
        engine: where the containers run.
        volumes: by the path where they appear.
        owner: for whom.

    Raises:
        SandboxEngineError: when the node has no shared root, a directory cannot be made, or the
            engine sees another directory under its path.
    """
    mounts: list[BindMount] = []
    for path, volume in volumes.items():
        try:
            directory = volume_directory(volume.name, volume.backend)
            directory.mkdir(parents=True, exist_ok=True)
            if volume.backend == HOST_LOCAL:
                # Root of a sandbox may leave programs with the set-user-id bit: not for others.
                directory.parent.chmod(0o700)
        except RemoteFailure as failure:
            raise SandboxEngineError(str(failure)) from None
        except OSError as error:
            raise SandboxEngineError(
                f"the directory of volume {volume.name!r} cannot be made on this node: {error}."
            ) from None
        mounts.append(BindMount(str(directory), path))
    if mounts:
        check_same_directories(engine, mounts, owner)
    return tuple(mounts)


def check_same_directories(engine: Engine, mounts: Sequence[BindMount], owner: OwnerLabels) -> None:
    """See that a file made here appears there: the engine may be on another machine's disk."""
    binds = [
        {"Type": "bind", "Source": mount.source, "Target": f"/{number}"}
        for number, mount in enumerate(mounts)
    ]
    try:
        with helper_container(engine, owner, {"HostConfig": {"Mounts": binds}}) as helper:
            for number, mount in enumerate(mounts):
                with _marker(Path(mount.source)) as name, translated("look into a volume"):
                    try:
                        stream, _ = engine.api.get_archive(helper, f"/{number}/{name}")
                        for _ in stream:  # read to the end: half-read archives block the next
                            pass
                    except docker.errors.NotFound:
                        raise _elsewhere(mount) from None
    except SandboxEngineError as error:
        if "bind source path does not exist" in str(error):
            raise _elsewhere(mounts[0]) from error
        raise


@contextlib.contextmanager
def _marker(directory: Path) -> Iterator[str]:
    path = directory / f".apothic-{secrets.token_hex(8)}"
    path.touch(mode=0o600)
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _elsewhere(mount: BindMount) -> SandboxEngineError:
    return SandboxEngineError(
        f"the Docker engine sees another {mount.source!r} than this process: it runs on another "
        f"machine, or Ray runs in a container. Mount the directory at the same path in both (docker "
        f"run -v {mount.source}:{mount.source} …), or set APOTHIC_VOLUME_ROOT and "
        f"APOTHIC_SHARED_ROOT to one that both have."
    )
