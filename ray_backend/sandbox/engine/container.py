"""What a sandbox's container is: a checked value, and its translation to the engine's words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from apothic.errors import InvalidOptionError

__all__ = [
    "AGENT_DIRECTORY",
    "CAPABILITIES",
    "DEFAULT_PIDS",
    "LINK_DIRECTORY",
    "RUNTIME_VARIABLE",
    "BindMount",
    "ContainerSpec",
    "container_config",
    "runtime_from_environment",
]

AGENT_DIRECTORY = "/.apothic"
LINK_DIRECTORY = "/.apothic-link"
RUNTIME_VARIABLE = "APOTHIC_SANDBOX_RUNTIME"
DEFAULT_PIDS = 1024
OPEN_FILES = 16_384
_CPU_PERIOD_US = 100_000

# What images need to run as root inside: package managers change owners and switch users, servers
# take low ports. Without the rest of Docker's default set: NET_RAW (forged packets), MKNOD, SETFCAP
# (files that give capabilities), SETPCAP, SYS_CHROOT and AUDIT_WRITE; apt, dpkg, pip, su, runuser
# and useradd were seen to work so.
CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETUID",
)


@dataclass(frozen=True)
class BindMount:
    """A directory of the engine's host in a container.

    Attributes:
        source: the directory, absolute; it must exist.
        target: where it appears, absolute.
    """

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class ContainerSpec:
    """A container to create. It holds no secret: those go to execs, which leave no trace.

    Attributes:
        name: unique on the engine.
        image: a reference that is present.
        command: PID 1 and its arguments; the image's own entrypoint is not run.
        labels: of `OwnerLabels`.
        agent_volume: the volume at ``/.apothic``, read-only.
        link_directory: a directory of the engine's host at ``/.apothic-link``, read-only, or None.
        cpu: cores; 0 sets no quota.
        memory_mb: in MiB, swap included.
        pids: the most processes and threads at once.
        disk_gb: the most that the container may write, in GB (10⁹ bytes), or None.
        gpu_ids: exactly the GPUs it sees: indices or UUIDs.
        mounts: directories.
        network: ``none``, or the name of a network.
        dns: addresses of name servers, or empty for the engine's own choice.
        keep: stay when its client goes, so that another can attach; else stdin closes with the
            client, and the engine removes the container when PID 1 has ended.
        runtime: the OCI runtime, or None for the engine's default.
        hostname: as seen inside.
    """

    name: str
    image: str
    command: tuple[str, ...]
    labels: Mapping[str, str]
    agent_volume: str
    memory_mb: int
    cpu: float = 1
    pids: int = DEFAULT_PIDS
    link_directory: str | None = None
    disk_gb: float | None = None
    gpu_ids: tuple[str, ...] = ()
    mounts: tuple[BindMount, ...] = ()
    network: str | Literal["none"] = "none"
    dns: tuple[str, ...] = ()
    keep: bool = False
    runtime: str | None = field(default_factory=lambda: runtime_from_environment())
    hostname: str = "sandbox"

    def __post_init__(self) -> None:
        """Refuse what an engine would take for "no limit" or "the default"."""
        for name, value, least in (
            ("memory_mb", self.memory_mb, 6),  # the engine's own least
            ("pids", self.pids, 1),
            ("cpu", self.cpu, 0),
        ):
            if isinstance(value, bool) or not value >= least:
                raise InvalidOptionError(
                    f"{name}={value!r} is not valid: it takes {least} or more."
                )
        if self.disk_gb is not None and not self.disk_gb > 0:
            raise InvalidOptionError(
                f"disk_gb={self.disk_gb!r} is not valid: it takes more than 0."
            )
        if self.network in ("", "host", "bridge", "default") or ":" in self.network:
            raise InvalidOptionError(
                f"network {self.network!r} is not isolated. Use 'none' or a network of ours."
            )
        if not self.command:
            raise InvalidOptionError("a container needs a command.")


def runtime_from_environment() -> str | None:
    """Give the runtime that this node's environment asks for, or None."""
    return os.environ.get(RUNTIME_VARIABLE) or None


def container_config(
    spec: ContainerSpec, *, api_version: tuple[int, int], limit_disk: bool
) -> dict[str, Any]:
    """Translate to the body of ``POST /containers/create``.

    Args:
        spec: what to create.
        api_version: of the engine.
        limit_disk: whether the engine can limit what the container writes.
    """
    memory_bytes = spec.memory_mb * 1024**2
    host: dict[str, Any] = {
        "AutoRemove": not spec.keep,
        "RestartPolicy": {"Name": "no"},
        # The default driver would write all that the agent says to a file of the host.
        "LogConfig": {"Type": "none"},
        "NetworkMode": spec.network,
        "Mounts": [*_mounts(spec)],
        "Init": False,
        # Limits.
        "Memory": memory_bytes,
        "MemorySwap": memory_bytes,
        "PidsLimit": spec.pids,
        "ShmSize": memory_bytes // 2,  # as Linux does; counted against `Memory`
        "Ulimits": [
            {"Name": "nofile", "Soft": OPEN_FILES, "Hard": OPEN_FILES},
            {"Name": "core", "Soft": 0, "Hard": 0},
        ],
        # Isolation. The engine's default seccomp profile holds where none is named.
        "CapDrop": ["ALL"],
        "CapAdd": list(CAPABILITIES),
        "SecurityOpt": ["no-new-privileges:true"],
        "Privileged": False,
        "IpcMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "PublishAllPorts": False,
    }
    if spec.cpu > 0:
        # Not NanoCpus, which the engine refuses above its own number of cores.
        host["CpuPeriod"] = _CPU_PERIOD_US
        host["CpuQuota"] = max(1000, round(spec.cpu * _CPU_PERIOD_US))
    if api_version >= (1, 41):
        host["CgroupnsMode"] = "private"
    if spec.dns:
        host["Dns"] = list(spec.dns)
    if spec.runtime is not None:
        host["Runtime"] = spec.runtime
    if limit_disk and spec.disk_gb is not None:
        host["StorageOpt"] = {"size": str(round(spec.disk_gb * 1000**3))}
    if spec.gpu_ids:
        host["DeviceRequests"] = [
            {"Driver": "", "DeviceIDs": list(spec.gpu_ids), "Capabilities": [["gpu"]]}
        ]
    return {
        "Image": spec.image,
        "Entrypoint": [spec.command[0]],
        "Cmd": list(spec.command[1:]),
        "Labels": dict(spec.labels),
        "Hostname": spec.hostname,
        "User": "0:0",  # the agent switches to the image's user itself
        "WorkingDir": "/",
        "Tty": False,
        "OpenStdin": True,
        "StdinOnce": not spec.keep,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        # The engine would start a program of its own to join what "none" does not have: half of the
        # time that a start takes. The runtime makes a namespace with a loopback all the same.
        "NetworkDisabled": spec.network == "none",
        "StopSignal": "SIGKILL",
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": host,
    }


def _mounts(spec: ContainerSpec) -> list[dict[str, Any]]:
    agent = {
        "Type": "volume",
        "Source": spec.agent_volume,
        "Target": AGENT_DIRECTORY,
        "ReadOnly": True,
        "VolumeOptions": {"NoCopy": True},  # nothing of the image comes into it
    }
    link = {
        "Type": "bind",
        "Source": spec.link_directory,
        "Target": LINK_DIRECTORY,
        "ReadOnly": True,
        "BindOptions": {"Propagation": "rprivate"},
    }
    return [
        agent,
        *([] if spec.link_directory is None else [link]),
        *(
            {
                "Type": "bind",
                "Source": mount.source,
                "Target": mount.target,
                "BindOptions": {"Propagation": "rprivate"},
            }
            for mount in spec.mounts
        ),
    ]
