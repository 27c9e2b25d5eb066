"""Locks between the processes of a node, given up by the kernel when their holder dies."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray_backend.directories import local_root

__all__ = ["held", "held_if_free"]


@contextmanager
def held(*name: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a name; wait for it."""
    descriptor = _open(name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_if_free(*name: str) -> Iterator[bool]:
    """Hold the lock of a name alone, if nobody else holds it; give whether it is held."""
    descriptor = _open(name)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _open(name: tuple[str, ...]) -> int:
    directory = local_root() / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\0".join(name).encode()).hexdigest()[:32]
    return os.open(directory / digest, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
