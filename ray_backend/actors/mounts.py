"""Volumes of an instance: a link at the mount path to the volume's directory on this node."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        self._held: list[tuple[Path, int]] = []

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
        with _turn(path):
            lock = _open_lock(path)
            try:
                _make_link(path, directory, name, alone=_try_lock(lock))
                fcntl.flock(lock, fcntl.LOCK_SH)
            except BaseException:
                os.close(lock)
                raise
            self._held.append((path, lock))

    def release(self) -> None:
        """Give the links up; those that nobody else uses are removed."""
        while self._held:
            path, lock = self._held.pop()
            try:
                with _turn(path):
                    if _try_lock(lock) and path.is_symlink():
                        with contextlib.suppress(PermissionError):  # another user made it
                            path.unlink()
            finally:
                os.close(lock)


def _make_link(path: Path, directory: Path, name: str, *, alone: bool) -> None:
    """Make the link unless it is there; ``alone`` says that no process uses one at this path."""
    taken = path.is_symlink()
    if taken:
        if Path(os.readlink(path)) == directory:
            return
        if not alone:
            raise RemoteFailure(
                "start",
                f"mount path {str(path)!r} of volume {name!r} is in use on this node for "
                f"{os.readlink(path)!r}. Give one of the classes another mount path.",
            )
    is_left = taken and is_volume(Path(os.readlink(path)))  # by a process that was killed
    if (taken or path.exists()) and not is_left:
        raise RemoteFailure(
            "start",
            f"mount path {str(path)!r} of volume {name!r} exists on this node and is not "
            f"ours. Choose a path that does not exist there.",
        )
    try:
        if is_left:
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(directory)
    except OSError as error:
        raise RemoteFailure(
            "start",
            f"mount path {str(path)!r} of volume {name!r} cannot be made on this node: "
            f"{error.strerror}. Choose a path that the user of Ray may write, for instance "
            f"under /tmp or its home directory.",
        ) from None


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Be the only one on this node who looks at the link at a path, makes it or removes it.

    A lock of its own: the one that users share cannot be turned from shared to exclusive and back
    without a moment in which another takes it.
    """
    lock = _open_lock(path, ".turn")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _open_lock(path: Path, suffix: str = "") -> int:
    locks = local_root() / "mounts"
    locks.mkdir(parents=True, exist_ok=True)
    file = locks / (hashlib.sha256(str(path).encode()).hexdigest()[:32] + suffix)
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # another user's; a lock needs no more


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
