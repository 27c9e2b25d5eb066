"""Opening a container for a session: image, agent, start, and the workspace inside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ray_backend.sandbox.agent.binaries import agent_binary
from ray_backend.sandbox.agent_workspace import AgentWorkspace
from ray_backend.sandbox.channel import AgentChannel
from ray_backend.sandbox.engine.agent_volume import AGENT_FILE, ensure_agent
from ray_backend.sandbox.engine.attach import STDOUT, AttachedStream
from ray_backend.sandbox.engine.connection import DiskLimit, Engine
from ray_backend.sandbox.engine.container import AGENT_DIRECTORY, BindMount, ContainerSpec
from ray_backend.sandbox.engine.faults import FaultPoint, no_fault
from ray_backend.sandbox.engine.images import image_defaults
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.launch import launch
from ray_backend.sandbox.engine.outcome import ask_outcome

__all__ = ["ContainerPlan", "EngineLink", "OpenedContainer", "open_container"]

_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class EngineLink:
    """A channel's `ByteLink` over a container's attached stream."""

    def __init__(self, stream: AttachedStream) -> None:
        """Use a stream from now on."""
        self._stream = stream

    async def read(self) -> bytes:
        """Give the next bytes of the agent; what comes on its standard error is dropped."""
        while (piece := await self._stream.read()) is not None:
            if piece[0] == STDOUT and piece[1]:
                return piece[1]
        return b""

    def write(self, data: bytes) -> None:
        """Send bytes to the agent."""
        self._stream.write(data)

    async def drain(self) -> None:
        """Wait until more can be sent."""
        await self._stream.drain()

    def abort(self) -> None:
        """Drop the connection."""
        self._stream.abort()


@dataclass(frozen=True, kw_only=True)
class ContainerPlan:
    """A container that a session wants; see `ContainerSpec` for the fields of the same names.

    Attributes:
        label: names the session in messages.
        keep: the session is named: its container stays when its client goes.
    """

    name: str
    label: str
    image: str
    owner: OwnerLabels
    memory_mb: int
    cpu: float = 1
    disk_gb: float | None = None
    gpu_ids: tuple[str, ...] = ()
    mounts: tuple[BindMount, ...] = ()
    network: str = "none"
    dns: tuple[str, ...] = ()
    keep: bool = False


@dataclass(frozen=True)
class OpenedContainer:
    """A container with its workspace; ``disk_limit`` says whether somebody has to watch its disk."""

    id: str
    workspace: AgentWorkspace
    disk_limit: DiskLimit


async def open_container(
    engine: Engine, plan: ContainerPlan, *, at: FaultPoint = no_fault
) -> OpenedContainer:
    """Start a container and greet its agent. When it fails or is cancelled, nothing is left.

    Args:
        engine: where; the image is present.
        plan: what.
        at: called at each step, for tests that interrupt there.

    Raises:
        ImageNotFoundError: when the image is not present.
        SandboxEngineError: when the engine refuses or fails.
        ChannelClosedError: when no agent answers in the container.
    """
    binary = await asyncio.to_thread(agent_binary(engine.architecture).read_bytes)
    volume = await asyncio.to_thread(ensure_agent, engine, binary, plan.owner, at=at)
    defaults = await asyncio.to_thread(image_defaults, engine, plan.image)
    agent = f"{AGENT_DIRECTORY}/{AGENT_FILE}"
    launched = await launch(
        engine,
        ContainerSpec(
            name=plan.name,
            image=plan.image,
            command=(agent,) if plan.keep else (agent, "--die-on-eof"),
            labels=plan.owner.as_labels(),
            agent_volume=volume,
            cpu=plan.cpu,
            memory_mb=plan.memory_mb,
            disk_gb=plan.disk_gb,
            gpu_ids=plan.gpu_ids,
            mounts=plan.mounts,
            network=plan.network,
            dns=plan.dns,
            keep=plan.keep,
        ),
        at=at,
    )
    remove = _remover(engine, launched.id)
    try:
        channel = await AgentChannel.open(EngineLink(launched.stream))
        at("greeted")
    except BaseException:
        launched.stream.abort()
        await asyncio.shield(remove())
        raise
    environment = {
        b"PATH": _PATH,
        **{name.encode(): value.encode() for name, value in defaults.environment.items()},
    }
    workspace = AgentWorkspace(
        channel,
        label=plan.label,
        environment=environment,
        user=defaults.user.encode(),
        why_lost=_outcome(engine, launched.id, plan.memory_mb),
        remove=remove,
    )
    return OpenedContainer(launched.id, workspace, launched.disk_limit)


def _remover(engine: Engine, container_id: str) -> Callable[[], Awaitable[None]]:
    async def remove() -> None:
        await asyncio.to_thread(engine.remove, container_id)

    return remove


def _outcome(engine: Engine, container_id: str, memory_mb: int) -> Callable[[], Awaitable[str]]:
    async def why() -> str:
        try:
            found = await asyncio.to_thread(ask_outcome, engine, container_id)
        except Exception as error:
            return f"its Docker engine does not answer ({error})."
        if found.oom_killed:
            return f"its container ran out of memory (memory_mb={memory_mb})."
        if found.running:
            return "the connection to its container broke."
        status = "" if found.exit_code is None else f", exit status {found.exit_code}"
        return f"its container was ended from outside{status}."

    return why
