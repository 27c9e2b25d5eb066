"""The labels on everything of ours on an engine: whose it is, and how long it has a reason to live."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "AGENT",
    "AGENT_VOLUME",
    "BASE",
    "BRIDGE",
    "BUILD",
    "BUILD_UNFINISHED",
    "CLUSTER",
    "GPUS",
    "NAMESPACE",
    "NETWORK",
    "SESSION",
    "OwnerLabels",
    "RayletId",
]

CLUSTER = "apothic.cluster"
NAMESPACE = "apothic.namespace"
SESSION = "apothic.session"
OWNER = "apothic.owner"
RAYLET = "apothic.raylet"

AGENT = "apothic.agent"
"""On volumes: the digest of the agent that one holds, or is to hold."""
AGENT_VOLUME = "apothic.agent.volume"
"""On the empty volume that says which one was filled first: its name."""
GPUS = "apothic.gpus"
"""On the container of a session: the GPUs that it was given, joined by commas."""
NETWORK = "apothic.network"
BRIDGE = "apothic.bridge"
"""On networks: the name of the bridge interface, which the firewall's rules name."""
BUILD = "apothic.build"
"""On what a build makes on the way: `BUILD_UNFINISHED`. Empty on finished images."""
BUILD_UNFINISHED = "unfinished"
BASE = "apothic.base"
"""On finished images: the id of the image that the recipe's base was when it was built."""

_RAYLET = re.compile(r"([1-9][0-9]*):([0-9]+):([0-9]+)")


@dataclass(frozen=True)
class RayletId:
    """One raylet process, told apart from any other that gets its process id later.

    Attributes:
        pid: its process id in its own process-id namespace.
        start_ticks: when it started, in clock ticks since boot (proc(5), field 22 of ``stat``).
        namespace: the inode of its process-id namespace.
    """

    pid: int
    start_ticks: int
    namespace: int

    @classmethod
    def of_process(cls, pid: int) -> RayletId:
        """Read the identity of a live process.

        Raises:
            ProcessLookupError: when there is none of this id.
        """
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, start_ticks, _own_namespace())

    @classmethod
    def parse(cls, text: str) -> RayletId | None:
        """Read what `__str__` wrote; None for anything else."""
        found = _RAYLET.fullmatch(text)
        return None if found is None else cls(*map(int, found.groups()))

    def __str__(self) -> str:
        """Give ``pid:start:namespace``, the value of the label."""
        return f"{self.pid}:{self.start_ticks}:{self.namespace}"

    def is_alive(self) -> bool:
        """Tell whether it runs; True when this process cannot see its namespace, for safety."""
        if self.namespace != _own_namespace():
            return True
        return _start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True)
class OwnerLabels:
    """Whose something is. Only what carries all of these labels, well-formed, is ever swept.

    Attributes:
        cluster: id of the Ray cluster.
        namespace: the Ray namespace.
        raylet: the raylet of the node.
        session: the session, or empty for what the node's sessions share.
        owner: id of the session's actor, or empty likewise.
    """

    cluster: str
    namespace: str
    raylet: RayletId
    session: str = ""
    owner: str = ""

    def as_labels(self) -> dict[str, str]:
        """Give them as an engine takes labels."""
        return {
            CLUSTER: self.cluster,
            NAMESPACE: self.namespace,
            RAYLET: str(self.raylet),
            SESSION: self.session,
            OWNER: self.owner,
        }

    @classmethod
    def from_labels(cls, labels: Mapping[str, str]) -> OwnerLabels | None:
        """Read them back; None when one is missing or malformed: it is then not ours."""
        raylet = RayletId.parse(labels.get(RAYLET, ""))
        cluster, namespace = labels.get(CLUSTER), labels.get(NAMESPACE)
        session, owner = labels.get(SESSION), labels.get(OWNER)
        if raylet is None or not cluster or not namespace or session is None or owner is None:
            return None
        return cls(cluster, namespace, raylet, session, owner)


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _own_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
