"""`Engine`: one connection to a node's Docker engine, and the verbs on containers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import docker.errors
import requests.exceptions
from docker.api.client import APIClient
from typing_extensions import Self

from apothic.errors import ImageNotFoundError, SandboxEngineError
from ray_backend.sandbox.engine.address import EngineAddress, NoEngineError
from ray_backend.sandbox.engine.container import ContainerSpec, container_config
from ray_backend.sandbox.engine.info import EngineInfo
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.translate import START_COMMAND, is_conflict, translated

__all__ = [
    "ContainerState",
    "CreatedContainer",
    "Engine",
    "FoundContainer",
    "MemoryUse",
]

OLDEST_API = (1, 41)  # Docker 20.10, of December 2020
NEWEST_API = (1, 51)  # later engines speak it as well, until they say otherwise
PROBE_TIMEOUT_S = 10.0

DiskLimit = Literal["none", "enforced", "watch"]


@dataclass(frozen=True)
class CreatedContainer:
    """A container that exists and was not started.

    Attributes:
        id: the engine's id.
        disk_limit: ``enforced`` by the engine; ``watch``: the engine cannot, look at
            `Engine.disk_bytes` now and then; ``none`` was asked for.
    """

    id: str
    disk_limit: DiskLimit


@dataclass(frozen=True)
class ContainerState:
    """What an engine knows of a container.

    Attributes:
        id: the engine's id.
        name: without the leading slash.
        labels: all of them.
        status: ``created``, ``running``, ``paused``, ``restarting``, ``removing``, ``exited``, ``dead``.
        exit_code: of PID 1; None while it runs or was not started.
        oom_killed: whether a process in it was killed for memory; some engines say it only at its end.
        pid: of PID 1 on the engine's host; None when it does not run.
        error: why it could not be started, or empty.
    """

    id: str
    name: str
    labels: Mapping[str, str]
    status: str
    exit_code: int | None
    oom_killed: bool
    pid: int | None
    error: str

    @property
    def running(self) -> bool:
        """Whether PID 1 lives."""
        return self.status in ("running", "paused")


@dataclass(frozen=True)
class FoundContainer:
    """A container in a listing.

    Attributes:
        id: the engine's id.
        name: without the leading slash.
        labels: all of them.
        status: as in `ContainerState`.
        owner: whose it is, or None when the labels are not all ours.
    """

    id: str
    name: str
    labels: Mapping[str, str]
    status: str

    @property
    def owner(self) -> OwnerLabels | None:
        """Whose it is; None when it lacks one of our labels."""
        return OwnerLabels.from_labels(self.labels)


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a container.

    Attributes:
        used_bytes: what its processes hold, page cache that can be dropped at once not counted.
        limit_bytes: the most they may.
    """

    used_bytes: int
    limit_bytes: int


class Engine:
    """A connection to a Docker engine. Every method blocks; threads may share it.

    Every method raises `SandboxEngineError` when the engine refuses, is gone or does not answer.
    """

    def __init__(self, address: EngineAddress, api: APIClient, version: Mapping[str, Any]) -> None:
        """Use an open client; `connect` makes one."""
        self.address = address
        self.api = api
        self.api_version = _version(api.api_version)
        self.architecture = str(version.get("Arch", ""))

    @classmethod
    def connect(cls, docker_host: str | None = None, *, timeout_s: float = 120.0) -> Self:
        """Connect to the given engine, else that of ``DOCKER_HOST``, else that of the default socket.

        Args:
            docker_host: ``unix:///path`` or ``tcp://host:port``.
            timeout_s: how long one request may take without a byte of an answer.

        Raises:
            NoEngineError: no socket, refused, or no answer; each says what helps.
            SandboxEngineError: too old, which says so.
        """
        address = EngineAddress.find(docker_host)
        address.check(timeout_s=PROBE_TIMEOUT_S)
        probe = _client(address, OLDEST_API, timeout_s=PROBE_TIMEOUT_S)
        with contextlib.closing(probe), translated("say its version"):
            try:
                version = probe.version(api_version=False)
            except (requests.exceptions.Timeout, requests.exceptions.ConnectionError) as error:
                raise NoEngineError(
                    f"what listens at {address.url} does not answer as a Docker engine: {error}. "
                    f"Look at its log (journalctl -u docker), or restart it: {START_COMMAND}."
                ) from error
        newest = _version(version.get("ApiVersion", "0.0"))
        oldest = _version(version.get("MinAPIVersion", "1.12"))
        if newest < OLDEST_API or oldest > NEWEST_API:
            raise SandboxEngineError(
                f"the Docker engine at {address.url} is version {version.get('Version')} with API "
                f"{_text(oldest)} to {_text(newest)}; sandboxes need one of API {_text(OLDEST_API)} "
                f"(Docker 20.10) to {_text(NEWEST_API)}. Install another docker.io or docker-ce."
            )
        chosen = min(newest, NEWEST_API)
        return cls(address, _client(address, chosen, timeout_s), version)

    def close(self) -> None:
        """Close the connection; containers stay."""
        self.api.close()

    @cached_property
    def info(self) -> EngineInfo:
        """What the engine can do; asked once (about 10 ms)."""
        with translated("say what it can do"):
            return EngineInfo.parse(self.api.info())

    def create_container(self, spec: ContainerSpec) -> CreatedContainer:
        """Create a container; it is not started.

        Raises:
            ImageNotFoundError: when the image is not present.
            SandboxEngineError: when the engine cannot give what is asked, a limit for instance.
        """
        self.info.check_isolation(spec)
        if spec.runtime is None and not spec.gpu_ids:
            spec = replace(spec, runtime=self.info.plain_runtime)
        limit_disk = spec.disk_gb is not None and self.info.may_limit_disk
        try:
            with translated(f"create the container {spec.name!r}"):
                container_id = self._create(spec, limit_disk=limit_disk)
        except SandboxEngineError as error:
            # Whether overlay2 on xfs has quotas depends on mount options that no engine tells.
            if not limit_disk or "storage-opt" not in str(error).lower():
                raise
            limit_disk = False
            with translated(f"create the container {spec.name!r}"):
                container_id = self._create(spec, limit_disk=False)
        if spec.disk_gb is None:
            return CreatedContainer(container_id, "none")
        return CreatedContainer(container_id, "enforced" if limit_disk else "watch")

    def _create(self, spec: ContainerSpec, *, limit_disk: bool) -> str:
        config = container_config(spec, api_version=self.api_version, limit_disk=limit_disk)
        try:
            made: dict[str, Any] = self.api.create_container_from_config(  # type: ignore[no-untyped-call]
                config, name=spec.name
            )
        except docker.errors.ImageNotFound as error:
            raise ImageNotFoundError(
                f"image {spec.image!r} is not on this node. Pull it there: docker pull {spec.image}"
            ) from error
        # The engine does not refuse a limit that its kernel lacks: it warns and drops it.
        dropped = [text for text in made.get("Warnings") or () if _drops_a_limit(text)]
        if dropped:
            self.remove(made["Id"])
            raise SandboxEngineError(
                f"the Docker engine cannot limit the container {spec.name!r}: {'; '.join(dropped)}. "
                f"Turn the limit on in the node's kernel (for memory on old Debian: boot with "
                f"cgroup_enable=memory)."
            )
        return str(made["Id"])

    def start(self, container: str) -> None:
        """Start a created container: about 130 ms."""
        with translated(f"start the container {container[:12]!r}"):
            self.api.start(container)

    def inspect(self, container: str) -> ContainerState | None:
        """Give what the engine knows; None when there is no such container."""
        with translated(f"inspect the container {container[:12]!r}"):
            try:
                found = self.api.inspect_container(container)
            except docker.errors.NotFound:
                return None
        state = found["State"]
        over = state["Status"] in ("exited", "dead", "removing") and not state.get("Running")
        return ContainerState(
            id=found["Id"],
            name=found["Name"].lstrip("/"),
            labels=found["Config"].get("Labels") or {},
            status=state["Status"],
            exit_code=state["ExitCode"] if over else None,
            oom_killed=bool(state.get("OOMKilled")),
            pid=state.get("Pid") or None,
            error=state.get("Error") or "",
        )

    def inspect_image(self, reference: str) -> dict[str, Any] | None:
        """Give the engine's own record of a present image, or None."""
        with translated(f"inspect the image {reference!r}"):
            try:
                return cast(dict[str, Any], self.api.inspect_image(reference))  # type: ignore[no-untyped-call]
            except docker.errors.ImageNotFound:
                return None

    def wait(self, container: str, timeout_s: float) -> int | None:
        """Wait until a container does not run; give PID 1's exit status, None when it is gone.

        Raises:
            TimeoutError: when it still runs after ``timeout_s``.
        """
        with translated(f"wait for the container {container[:12]!r}"):
            try:
                status: int = self.api.wait(container, timeout=timeout_s)["StatusCode"]  # type: ignore[arg-type]
            except docker.errors.NotFound:
                return None
            except (requests.exceptions.ReadTimeout, requests.exceptions.ConnectionError) as error:
                if not _is_timeout(error):
                    raise
                raise TimeoutError(
                    f"container {container[:12]!r} still runs after {timeout_s} s."
                ) from None
        return status

    def kill(self, container: str) -> bool:
        """Kill all its processes; False when none ran."""
        with translated(f"kill the container {container[:12]!r}"):
            try:
                self.api.kill(container)
            except docker.errors.NotFound:
                return False
            except docker.errors.APIError as error:
                if is_conflict(error):  # it does not run
                    return False
                raise
        return True

    def remove(self, container: str, *, timeout_s: float = 60.0) -> bool:
        """Kill and remove a container with its anonymous volumes; return when it is gone.

        Idempotent, also while the engine removes it by itself. False when there was none.

        Raises:
            SandboxEngineError: when it is still there after ``timeout_s``.
        """
        deadline, met = time.monotonic() + timeout_s, False
        with translated(f"remove the container {container[:12]!r}"):
            while True:
                try:
                    self.api.remove_container(container, v=True, force=True)
                    return True
                except docker.errors.NotFound:
                    return met
                except docker.errors.APIError as error:
                    met = True
                    if is_conflict(error) and "already in progress" in str(error):
                        with contextlib.suppress(docker.errors.NotFound):
                            self.api.wait(container, timeout=timeout_s, condition="removed")  # type: ignore[arg-type]
                        return True
                    # It ended just before it was to be killed for that: then the engine leaves it,
                    # and does not remove it by itself either, as that was already in progress.
                    if "is not running" not in str(error) or time.monotonic() > deadline:
                        raise

    def list_containers(self, labels: Mapping[str, str | None]) -> list[FoundContainer]:
        """List the containers, running or not, that carry all the labels.

        Args:
            labels: names and values; a None stands for any value.
        """
        wanted = [name if value is None else f"{name}={value}" for name, value in labels.items()]
        with translated("list containers"):
            found = self.api.containers(all=True, filters={"label": wanted})
        return [
            FoundContainer(
                id=one["Id"],
                name=(one.get("Names") or ["/"])[0].lstrip("/"),
                labels=one.get("Labels") or {},
                status=one.get("State", ""),
            )
            for one in found
        ]

    def memory(self, container: str) -> MemoryUse | None:
        """Give the memory that a running container uses; None when it does not run."""
        with translated(f"measure the container {container[:12]!r}"):
            try:
                found = self.api.stats(container, stream=False, one_shot=True)["memory_stats"]
            except docker.errors.NotFound:
                return None
        if "usage" not in found:
            return None
        details = found.get("stats", {})
        # The names of cgroup v1, then of v2.
        cache = details.get("total_inactive_file", details.get("inactive_file", 0))
        return MemoryUse(max(0, found["usage"] - cache), found["limit"])

    def disk_bytes(self, container: str) -> int | None:
        """Give what a container has written to its own file system; None when it is gone.

        The engine adds up file by file: milliseconds to seconds, by their number.
        """
        with translated(f"measure the disk of the container {container[:12]!r}"):
            found = self.api.containers(all=True, size=True, filters={"id": container})
        return int(found[0].get("SizeRw") or 0) if found else None


def _client(address: EngineAddress, version: tuple[int, int], timeout_s: float) -> APIClient:
    with translated("be connected to"):
        return APIClient(
            base_url=address.url,
            version=_text(version),
            timeout=timeout_s,  # type: ignore[arg-type]
            tls=address.tls_config(),
            user_agent="apothic",
        )


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _drops_a_limit(warning: str) -> bool:
    # Without swap accounting memory stays limited, which the engine's host without swap makes whole.
    return "discarded" in warning.lower() and "swap" not in warning.lower()


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, requests.exceptions.Timeout) or "timed out" in str(error).lower()
