"""Where this package keeps files on a node: volumes, links to them, locks."""

from __future__ import annotations

import os
from pathlib import Path

from ray_backend.actors.failure import RemoteFailure

__all__ = [
    "SHARED_ROOT_VARIABLE",
    "VOLUME_ROOT_VARIABLE",
    "is_volume",
    "local_root",
    "shared_root",
    "volume_directory",
]

VOLUME_ROOT_VARIABLE = "APOTHIC_VOLUME_ROOT"
SHARED_ROOT_VARIABLE = "APOTHIC_SHARED_ROOT"


def local_root() -> Path:
    """Give the directory of host-local volumes on this node."""
    given = os.environ.get(VOLUME_ROOT_VARIABLE)
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/apothic")
    return Path.home() / ".local" / "share" / "apothic"


def shared_root() -> Path | None:
    """Give the directory of portable volumes on this node, where it has one."""
    given = os.environ.get(SHARED_ROOT_VARIABLE)
    return Path(given) if given else None


def is_volume(directory: Path) -> bool:
    """Tell whether a directory is that of a volume, or within one, whether it exists or not."""
    roots = (local_root(), shared_root())
    return any(root is not None and root / "volumes" in directory.parents for root in roots)


def volume_directory(name: str, backend: str) -> Path:
    """Give a volume's directory on this node; it may not exist yet.

    Raises:
        RemoteFailure: when a portable volume is asked for and the node has no shared root.
    """
    if backend == "vast_local":
        return local_root() / "volumes" / name
    shared = shared_root()
    if shared is None:
        raise RemoteFailure(
            "start",
            f"volume {name!r} is portable, but this node has no shared root: set "
            f"{SHARED_ROOT_VARIABLE} to a directory that all nodes share before Ray starts there, "
            f"or use Volume.vast_local for a directory of one node.",
        )
    return shared / "volumes" / name
