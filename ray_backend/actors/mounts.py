"""Volumes of an instance: a link at the mount path to the volume's directory on this node."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO, Any

from apothic.volume import HOST_LOCAL
from ray_backend.actors.failure import RemoteFailure
from ray_backend.directories import is_volume, local_root, volume_directory
from ray_backend.registry import Registry

__all__ = ["Mounts"]


class Mounts:
    """The links that one process made; other processes of the node may share them."""

    def __init__(self, registry: Registry, node_id: str) -> None:
        """Make nothing yet."""
        self._registry = registry
        self._node_id = node_id
        self._held: list[tuple[Path, IO[str]]] = []

    def mount(self, mount: dict[str, Any]) -> None:
        """Make the volume's directory if need be, and the link to it at the mount path.

        Raises:
            RemoteFailure: when the volume is on another node, or the path is taken.
        """
        name, backend, path = mount["volume"], mount["backend"], Path(mount["path"])
        directory = volume_directory(name, backend)
        if backend == HOST_LOCAL:
            home = self._registry.pin_volume(name, self._node_id)
            if home != self._node_id:
                raise RemoteFailure(
                    "start",
                    f"volume {name!r} is host-local and lies on node {home}, this is node "
                    f"{self._node_id}. Run on that node, or use Volume.cloud.",
                )
        directory.mkdir(parents=True, exist_ok=True)
        self._link(path, directory, name)

    def _link(self, path: Path, directory: Path, name: str) -> None:
        # Everyone who uses the link holds a shared lock on its lock file, so that the last one to
        # leave knows it and can remove the link; a killed process loses its lock by itself.
        locks = local_root() / "mounts"
        locks.mkdir(parents=True, exist_ok=True)
        lock = (locks / hashlib.sha256(str(path).encode()).hexdigest()[:32]).open("w")
        alone = _try_lock(lock, fcntl.LOCK_EX)
        try:
            if path.is_symlink():
                if Path(os.readlink(path)) == directory:
                    return
                if not alone:
                    raise RemoteFailure(
                        "start",
                        f"mount path {str(path)!r} of volume {name!r} is in use on this node for "
                        f"{os.readlink(path)!r}. Give one of the classes another mount path.",
                    )
                if is_volume(Path(os.readlink(path))):
                    path.unlink()  # left by a process that was killed
            if path.exists() or path.is_symlink():
                raise RemoteFailure(
                    "start",
                    f"mount path {str(path)!r} of volume {name!r} exists on this node and is not "
                    f"ours. Choose a path that does not exist there.",
                )
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(directory)
            except OSError as error:
                raise RemoteFailure(
                    "start",
                    f"mount path {str(path)!r} of volume {name!r} cannot be made on this node: "
                    f"{error.strerror}. Choose a path that the user of Ray may write, for instance "
                    f"under /tmp or its home directory.",
                ) from None
        finally:
            fcntl.flock(lock, fcntl.LOCK_SH)
            self._held.append((path, lock))

    def release(self) -> None:
        """Give the links up; those that nobody else uses are removed."""
        while self._held:
            path, lock = self._held.pop()
            with lock:
                if _try_lock(lock, fcntl.LOCK_EX) and path.is_symlink():
                    path.unlink()


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
