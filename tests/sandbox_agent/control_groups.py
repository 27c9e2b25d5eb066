"""Control groups that bound what a test can do, whoever does it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.sandbox_agent.harness import wait_until
from tests.support import unable

ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def control_group(controller: str, **limits: int) -> Iterator[Path]:
    """Make a control group, of either version, with limits; it must be empty in the end.

    Args:
        controller: ``pids`` or ``memory``.
        limits: by the name of the file, without the controller's, as ``max``; of several names for
            the same limit in the two versions, those that exist are used.
    """
    group = _make(controller, limits)
    if group is None:
        unable(f"no control group for {controller} can be made here (needs root)")
    try:
        for name, limit in limits.items():
            file = group / f"{controller}.{name}"
            if file.exists():
                file.write_text(str(limit))
        yield group
        wait_until(lambda: not members(group), "the control group is empty")
    finally:
        group.rmdir()


def members(group: Path) -> list[str]:
    return (group / "cgroup.procs").read_text().split()


def enter(group: Path) -> None:
    """Move this process, between fork and exec."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _make(controller: str, limits: dict[str, int]) -> Path | None:
    for parent in (ROOT / controller, ROOT):
        group = parent / f"apothic-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if any((group / f"{controller}.{name}").exists() for name in limits):
                return group
            group.rmdir()
    return None
