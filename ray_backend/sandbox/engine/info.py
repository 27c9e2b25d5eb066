"""What an engine can do, and whether it isolates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.container import RUNTIME_VARIABLE, ContainerSpec

__all__ = ["EngineInfo"]

_DISK_DRIVERS = ("btrfs", "devicemapper", "zfs")


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself.

    Attributes:
        id: of the engine, the same for all who use it.
        storage_driver: how it stores layers.
        backing_filesystem: on what, where the driver says so.
        cgroup_version: 1 or 2.
        runtimes: the OCI runtimes it knows.
        default_runtime: the one that it takes where none is named.
        rootless: whether it runs without root.
        seccomp: whether it filters system calls by default.
        firewall: what it filters packets with, ``iptables`` or ``nftables``, perhaps with
            ``+firewalld``; empty where it does not say: Docker before 28.1 knows only iptables.
        missing_limits: those of ``memory``, ``pids`` and ``cpu`` that it cannot enforce.
    """

    id: str
    storage_driver: str
    backing_filesystem: str
    cgroup_version: int
    runtimes: frozenset[str]
    default_runtime: str
    rootless: bool
    seccomp: bool
    firewall: str
    missing_limits: tuple[str, ...]

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> EngineInfo:
        """Read the answer to ``GET /info``."""
        security = [str(option) for option in found.get("SecurityOptions") or ()]
        limits = {"memory": "MemoryLimit", "pids": "PidsLimit", "cpu": "CpuCfsQuota"}
        return cls(
            id=str(found.get("ID", "")),
            storage_driver=str(found.get("Driver", "")),
            backing_filesystem=str(
                dict(found.get("DriverStatus") or ()).get("Backing Filesystem", "")
            ),
            cgroup_version=int(found.get("CgroupVersion") or 1),
            runtimes=frozenset(found.get("Runtimes") or ()),
            default_runtime=str(found.get("DefaultRuntime") or ""),
            rootless=any("name=rootless" in option for option in security),
            seccomp=any(
                "name=seccomp" in option and "profile=unconfined" not in option
                for option in security
            ),
            firewall=str((found.get("FirewallBackend") or {}).get("Driver", "")),
            missing_limits=tuple(name for name, key in limits.items() if found.get(key) is False),
        )

    @property
    def may_limit_disk(self) -> bool:
        """Whether ``disk_gb`` may be enforced: with overlay2, by the xfs project quotas beneath."""
        if self.storage_driver == "overlay2":
            return self.backing_filesystem == "xfs"
        return self.storage_driver in _DISK_DRIVERS

    @property
    def plain_runtime(self) -> str | None:
        """The runtime to name for a container without GPUs; None where the default one does.

        NVIDIA's gives each container the devices that a variable of its image names, and images made
        for GPUs name all.
        """
        return "runc" if "nvidia" in self.default_runtime and "runc" in self.runtimes else None

    def check_isolation(self, spec: ContainerSpec) -> None:
        """Refuse where the engine cannot hold a container in.

        Raises:
            SandboxEngineError: no seccomp, a missing limit, or a runtime it does not know.
        """
        if spec.runtime is not None and spec.runtime not in self.runtimes:
            raise SandboxEngineError(
                f"{RUNTIME_VARIABLE}={spec.runtime!r}, but the Docker engine of this node knows "
                f"only {', '.join(sorted(self.runtimes))}. Install it and register it in "
                f"/etc/docker/daemon.json, or unset the variable."
            )
        if not self.seccomp and spec.runtime is None:
            raise SandboxEngineError(
                f"the Docker engine of this node filters no system calls (seccomp is off), so code "
                f"in a sandbox could attack the kernel. Start it with its default seccomp profile, "
                f"or set {RUNTIME_VARIABLE}=runsc for gVisor."
            )
        wanted = {"memory", "pids", *(["cpu"] if spec.cpu > 0 else ())}
        lacking = sorted(wanted.intersection(self.missing_limits))
        if lacking:
            raise SandboxEngineError(
                f"the Docker engine of this node cannot limit {' and '.join(lacking)}: its kernel or "
                f"cgroup settings lack that. Turn it on ('docker info' on the node warns of what is "
                f"missing)."
            )
