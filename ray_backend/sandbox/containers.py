"""From a session's plan to a container whose agent answers, and to its end.

Everything here may be called on an event loop: what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from apothic.errors import (
    SandboxEngineError,
    SandboxError,
    SandboxLostError,
    SandboxStartError,
)
from apothic.volume import HOST_LOCAL, StorageMount
from ray_backend.sandbox.agent.binaries import agent_binary
from ray_backend.sandbox.agent_links import AgentLink, DirectLink
from ray_backend.sandbox.engine.agent_volume import AGENT_FILE, ensure_agent
from ray_backend.sandbox.engine.attach import AttachedStream
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.container import (
    AGENT_DIRECTORY,
    LINK_DIRECTORY,
    BindMount,
    ContainerSpec,
)
from ray_backend.sandbox.engine.faults import FaultPoint, no_fault
from ray_backend.sandbox.engine.images import ImageDefaults, ensure_image, image_defaults
from ray_backend.sandbox.engine.labels import GPUS, SESSION, OwnerLabels
from ray_backend.sandbox.engine.launch import Launched, launch
from ray_backend.sandbox.engine.link import LinkOffer, LinkStream
from ray_backend.sandbox.engine.network import (
    internet_network,
    public_nodes,
    refresh_internet,
    release_internet,
)
from ray_backend.sandbox.engine.outcome import ask_outcome
from ray_backend.sandbox.engine.volumes import bind_volumes
from ray_backend.sandbox.plan import SandboxPlan
from ray_backend.sandbox.protocol import ProtocolError

if TYPE_CHECKING:
    from ray_backend.sandbox.agent_workspace import AgentWorkspace
    from ray_backend.sandbox.channel import ChannelClosedError

__all__ = [
    "DISK_LOOK_S",
    "NODES_LOOK_S",
    "NodeSurroundings",
    "SessionContainer",
    "find_container",
    "gpu_ids_of",
    "open_container",
    "remove_leftover",
    "secret_variables",
]

T = TypeVar("T")

AGENT_COMMAND = f"{AGENT_DIRECTORY}/{AGENT_FILE}"
LINK = "--link"
OWNER = "--owner"
"""Before the image's user, to whom new files belong as well."""

DIE_ON_EOF = "--die-on-eof"
"""Has the agent of an unnamed session end with its client, and the container with it."""

DISK_LOOK_S = 5.0
"""Seconds between two looks at what a container has written, where the engine cannot limit it."""

NODES_LOOK_S = 30.0
"""Seconds between two looks at the addresses of the cluster's nodes, for the packet filter."""

_SPEAKER = "ray_backend.sandbox.agent_workspace"


@dataclass(frozen=True)
class NodeSurroundings:
    """What a session's container needs of the node and the cluster.

    Attributes:
        owner: labels of what belongs to the session.
        node_id: this node.
        gpu_ids: the GPUs that the session may use.
        node_addresses: gives the addresses of the cluster's nodes, as they are now.
        fetch: gives a packed file by digest.
        secret: gives a secret's variables, None when it is not stored.
        pin_volume: ties a host-local volume to this node; gives the node it is tied to.
        arrive: called in a thread before anything of the session is made on the node.
    """

    owner: OwnerLabels
    node_id: str
    gpu_ids: tuple[str, ...]
    fetch: Callable[[str], bytes]
    secret: Callable[[str], Mapping[str, str] | None]
    pin_volume: Callable[[str], str]
    node_addresses: Callable[[], Sequence[str]] = tuple
    arrive: Callable[[], None] = lambda: None


def gpu_ids_of(assigned: Sequence[object]) -> tuple[str, ...]:
    """Give an engine's names for the GPUs that Ray assigned: indices or UUIDs, exactly these."""
    return tuple(str(one) for one in assigned)


@dataclass(frozen=True)
class SessionContainer:
    """A running container of a session, its agent at the other end of the stream.

    Attributes:
        engine: where it runs.
        id: the engine's id.
        name: readable.
        stream: attached.
        direct: the agent's own connection, or None.
        image: what the image says about running in it.
        owner: its labels.
        disk_gb: how much it may write while nobody but us looks, or None.
        internet: whether it uses the cluster's network.
        memory_mb: its limit.
        public_nodes: the cluster's nodes that its packet filter was set for, see there; None where
            that is not known.
    """

    engine: Engine
    id: str
    name: str
    stream: AttachedStream
    direct: LinkStream | None
    image: ImageDefaults
    owner: OwnerLabels
    disk_gb: float | None
    internet: bool
    memory_mb: int
    public_nodes: frozenset[str] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know of its limits."""
        if self.disk_gb is None:
            return ()
        return (
            f"the node's Docker engine cannot limit disks: what the container writes is measured "
            f"every {DISK_LOOK_S:g} s, and above disk_gb={self.disk_gb:g} the session ends.",
        )

    def let_go(self) -> None:
        """Leave it as it is, for the next who finds it; only one of a named session outlives this."""
        self.stream.abort()
        if self.direct is not None:
            self.direct.abort()

    async def remove(self) -> None:
        """Remove it with all that runs in it; idempotent.

        Raises:
            SandboxEngineError: when the engine fails; what is left is for a sweep.
        """
        self.let_go()
        await asyncio.to_thread(self.engine.remove, self.id)
        if self.internet:
            await asyncio.to_thread(release_internet, self.engine, self.owner)

    async def workspace(self, label: str, *, resync: bool) -> AgentWorkspace:
        """Greet the agent; give the inside as a workspace, which removes the container at its end.

        Args:
            label: names the session in messages.
            resync: whether another process has spoken to this agent before.

        Raises:
            SandboxStartError: when no agent answers.
        """
        from ray_backend.sandbox.agent_workspace import AgentWorkspace
        from ray_backend.sandbox.channel import AgentChannel, ChannelClosedError

        link = AgentLink(self.stream)
        if self.direct is not None:
            link = DirectLink(self.stream, self.direct)
        try:
            channel = await AgentChannel.open(link, resync=resync)
        except ChannelClosedError as error:
            said = link.complaints.decode("utf-8", "replace").strip()
            raise SandboxStartError(
                f"{label}: the agent in the container {self.name!r} does not answer: {error}."
                f"{f' It said: {said!r}.' if said else ''} The image may be for another "
                f"architecture than the node."
            ) from error

        async def why_lost(error: ChannelClosedError) -> SandboxLostError:
            return await self.why_lost(label, error)

        return AgentWorkspace(
            channel,
            label=label,
            user=self.image.user.encode(),
            has_home="HOME" in self.image.environment,
            why_lost=why_lost,
            remove=self.remove,
        )

    async def why_lost(self, label: str, error: ChannelClosedError) -> SandboxLostError:
        """Find out what became of it, once its stream has ended."""
        if isinstance(error.__cause__, ProtocolError | TimeoutError):
            # It runs on, and is not to be trusted.
            return SandboxLostError(f"{label} was lost: {error}. Open another session.")
        try:
            outcome = await asyncio.to_thread(ask_outcome, self.engine, self.id)
        except SandboxEngineError as problem:
            return SandboxLostError(
                f"{label} was lost: the node's Docker engine is gone or does not answer ({problem}). "
                f"Open another session when it is back."
            )
        if outcome.running:
            return SandboxLostError(f"{label} was lost: {error}. Open another session.")
        if outcome.oom_killed:  # perhaps long before: the engine does not say of which process
            return SandboxLostError(
                f"{label} was lost: its memory (memory_mb={self.memory_mb}) was used up, and its "
                f"container was killed, for that or from outside. Open another session, with more if "
                f"its programs need it."
            )
        status = "" if outcome.exit_code is None else f" (exit status {outcome.exit_code})"
        return SandboxLostError(
            f"{label} was lost: its container was killed or removed from outside{status}. Open "
            f"another session."
        )

    async def disk_is_full(self) -> bool:
        """Tell whether it has written more than it may."""
        if self.disk_gb is None:
            return False
        written = await asyncio.to_thread(self.engine.disk_bytes, self.id)
        return written is not None and written > self.disk_gb * 1000**3

    async def block_nodes(
        self, addresses: Callable[[], Sequence[str]], known: frozenset[str] | None
    ) -> frozenset[str]:
        """Set the packet filter again where others than the known nodes are to be kept out of reach.

        Args:
            addresses: as `NodeSurroundings.node_addresses`.
            known: what this, or `public_nodes`, gave before.

        Raises:
            SandboxEngineError: when the rules are not in force, or a node's name is unknown.
        """

        def look() -> frozenset[str]:
            # Nodes at private addresses come and go at no cost: those are closed in any case.
            if known is not None and public_nodes(addresses()) == known:
                return known
            return refresh_internet(self.engine, self.owner, addresses)

        looking = asyncio.ensure_future(asyncio.to_thread(look))
        try:
            return await asyncio.shield(looking)
        except asyncio.CancelledError:
            await asyncio.wait({looking})  # what helped to set the rules is gone then
            raise


async def find_container(plan: SandboxPlan, around: NodeSurroundings) -> SessionContainer | None:
    """Attach again to the container that an earlier process of this actor left, if it runs.

    One of the same name that another actor left is removed.

    Raises:
        SandboxEngineError: when the engine fails.
        SandboxLostError: when it has other GPUs than this process; it is removed.
    """
    engine = await asyncio.to_thread(Engine.connect)
    found = await asyncio.to_thread(engine.inspect, plan.container_name)
    if found is None:
        return None
    owner = OwnerLabels.from_labels(found.labels)
    ours = owner is not None and owner.owner == around.owner.owner
    if not ours or not found.running:
        if found.labels.get(SESSION) == plan.actor_name:
            await asyncio.to_thread(engine.remove, found.id)
        return None
    held = found.labels.get(GPUS, "")
    if held != _joined(around.gpu_ids):
        await asyncio.to_thread(engine.remove, found.id)
        raise SandboxLostError(
            f"{plan.label} was lost: its process was replaced and now holds GPU "
            f"{_joined(around.gpu_ids) or 'none'}, but its container has GPU {held or 'none'}, which "
            f"Ray may have given to somebody else meanwhile. Close it, and open it again under the "
            f"same name."
        )
    config = await asyncio.to_thread(engine.api.inspect_container, found.id)
    image = await asyncio.to_thread(image_defaults, engine, config["Image"])
    limited = bool((config["HostConfig"].get("StorageOpt") or {}).get("size"))
    disk_gb = plan.options.disk_gb
    return SessionContainer(
        engine=engine,
        id=found.id,
        name=found.name,
        stream=await AttachedStream.open(engine, found.id),
        direct=None,  # the agent went back to the engine's streams when its client died
        image=image,
        owner=around.owner,
        disk_gb=None if limited else disk_gb,
        internet=plan.network == "internet",
        memory_mb=plan.options.memory_mb,
    )


async def remove_leftover(plan: SandboxPlan, around: NodeSurroundings) -> None:
    """Remove the container that an earlier process of this actor left, if there is one.

    Raises:
        SandboxEngineError: when the engine fails.
    """

    def remove() -> None:
        engine = Engine.connect()
        found = engine.inspect(plan.container_name)
        if found is not None and found.labels.get(SESSION) == plan.actor_name:
            engine.remove(found.id)
        if plan.network == "internet":
            release_internet(engine, around.owner)

    await asyncio.to_thread(remove)


async def open_container(
    plan: SandboxPlan,
    around: NodeSurroundings,
    *,
    tell: Callable[[str], None],
    at: FaultPoint = no_fault,
) -> SessionContainer:
    """Make and start the session's container; when that fails, nothing of it is left.

    Args:
        plan: the session.
        around: the node.
        tell: takes lines of what a pull or a build says.
        at: see `launch`, `ensure_agent` and `internet_network`.

    Raises:
        SandboxError: the engine is missing or refuses, the image cannot be had, or a volume is on
            another node.
    """
    engine = await asyncio.to_thread(Engine.connect)
    options, owner = plan.options, around.owner

    unwanted = threading.Event()

    def progress(line: str) -> None:
        if unwanted.is_set():
            raise SandboxStartError(f"{plan.label} was closed while its image was made.")
        tell(line)

    def prepare() -> tuple[str, ImageDefaults, str, tuple[BindMount, ...]]:
        image = ensure_image(engine, plan.image, around.fetch, progress=progress)
        binary = agent_binary(engine.architecture).read_bytes()
        volume = ensure_agent(engine, binary, owner, at=at)
        return image, image_defaults(engine, image), volume, _mounts(engine, plan, around)

    try:
        image, defaults, agent_volume, mounts = await asyncio.to_thread(prepare)
    except asyncio.CancelledError:
        unwanted.set()
        raise
    spec = ContainerSpec(
        name=plan.container_name,
        image=image,
        command=(
            AGENT_COMMAND,
            *(() if plan.named else (DIE_ON_EOF,)),
            *((OWNER, defaults.user) if defaults.user else ()),
        ),
        labels={**owner.as_labels(), GPUS: _joined(around.gpu_ids)},
        agent_volume=agent_volume,
        memory_mb=options.memory_mb,
        cpu=options.cpu,
        disk_gb=options.disk_gb,
        gpu_ids=around.gpu_ids,
        mounts=mounts,
        keep=plan.named,
    )
    # What speaks to agents takes 25 ms to import, which the engine needs anyway.
    threading.Thread(target=import_module, args=(_SPEAKER,), daemon=True).start()
    internet = plan.network == "internet"
    nodes: frozenset[str] | None = None
    launched: Launched | None = None
    direct: LinkStream | None = None
    try:
        async with contextlib.AsyncExitStack() as held:
            if internet:
                joining = internet_network(engine, owner, blocked=around.node_addresses, at=at)
                network = await held.enter_async_context(_in_threads(joining))
                spec = replace(spec, network=network.id, dns=network.dns)
                nodes = network.public_nodes
            launched, direct = await _launch_linked(engine, spec, at)
    except BaseException:
        if launched is not None:  # cancelled while it left the network's lock
            launched.stream.abort()
            if direct is not None:
                direct.abort()
            await asyncio.to_thread(engine.remove, launched.id)
        if internet:
            await asyncio.to_thread(release_internet, engine, owner)
        raise
    return SessionContainer(
        engine=engine,
        id=launched.id,
        name=spec.name,
        stream=launched.stream,
        direct=direct,
        image=defaults,
        owner=owner,
        disk_gb=options.disk_gb if launched.disk_limit == "watch" else None,
        internet=internet,
        memory_mb=options.memory_mb,
        public_nodes=nodes,
    )


async def _launch_linked(
    engine: Engine, spec: ContainerSpec, at: FaultPoint
) -> tuple[Launched, LinkStream | None]:
    """Launch it with a link to its agent where that can be, else without."""
    offer = LinkOffer.make(engine)
    if offer is None:
        return await launch(engine, spec, at=at), None
    socket_path = f"{LINK_DIRECTORY}/{offer.file_name}"
    linked = replace(
        spec, link_directory=offer.directory, command=(*spec.command, LINK, socket_path)
    )
    links: list[LinkStream] = []

    async def accept(stream: AttachedStream) -> bool:
        link = await offer.accept(stream)
        if link is not None:
            links.append(link)
        return link is not None

    try:
        launched = await launch(engine, linked, runs=accept, at=at)
    except BaseException as error:
        for link in links:
            link.abort()
        if isinstance(error, SandboxEngineError) and offer.directory in str(error):
            # The engine is on another machine, or this process in a container.
            return await launch(engine, spec, at=at), None
        raise
    finally:
        offer.close()
    return launched, links[0] if links else None


def secret_variables(plan: SandboxPlan, around: NodeSurroundings) -> dict[bytes, bytes]:
    """Give the variables of the session's secrets, for its execs alone.

    Raises:
        SandboxStartError: when one is not stored.
    """
    variables: dict[bytes, bytes] = {}
    for name in plan.options.secrets:
        found = around.secret(name)
        if found is None:
            raise SandboxStartError(
                f"{plan.label}: secret {name!r} is not stored on this cluster. Store it with "
                f"Secret.create({name!r}, …)."
            )
        variables.update(
            (key.encode(), value.encode("utf-8", "surrogateescape")) for key, value in found.items()
        )
    return variables


@contextlib.asynccontextmanager
async def _in_threads(manager: contextlib.AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave what blocks; when cancelled on the way in, leave it as well."""
    entering = asyncio.ensure_future(asyncio.to_thread(manager.__enter__))
    try:
        entered = await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait({entering})
        if entering.exception() is None:
            await asyncio.to_thread(manager.__exit__, None, None, None)
        raise
    try:
        yield entered
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


def _mounts(engine: Engine, plan: SandboxPlan, around: NodeSurroundings) -> tuple[BindMount, ...]:
    volumes: dict[str, StorageMount] = {}
    for mount in plan.options.mounts:
        if mount.backend == HOST_LOCAL:
            node = around.pin_volume(mount.name)
            if node != around.node_id:
                raise SandboxError(
                    f"{plan.label}: volume {mount.name!r} is on node {node} and not on "
                    f"{around.node_id}, where the session is. Open it again, or use Volume.cloud."
                )
        assert mount.mount_path is not None  # the definition has it
        volumes[mount.mount_path] = mount
    return bind_volumes(engine, volumes, around.owner)


def _joined(gpu_ids: Sequence[str]) -> str:
    return ",".join(sorted(gpu_ids))
