"""Removing what nobody owns any more: a pure decision, and a thin doing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ray_backend.sandbox.engine.agent_volume import find_unfinished_volumes, remove_volume
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.images import clean_builds
from ray_backend.sandbox.engine.labels import CLUSTER, NAMESPACE, OwnerLabels, RayletId
from ray_backend.sandbox.engine.link import remove_abandoned_links
from ray_backend.sandbox.engine.network import list_networks, remove_network_if_unused

__all__ = ["Swept", "is_doomed", "sweep"]


@dataclass(frozen=True)
class Swept:
    """What a sweep removed.

    Attributes:
        containers: their names.
        volumes: their names.
        networks: their names.
        links: paths of directories that dead processes had made for links to agents.
        builds: how many leftovers of builds.
    """

    containers: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    builds: int = 0


def is_doomed(
    owner: OwnerLabels | None,
    *,
    cluster_id: str,
    namespace: str,
    live_sessions: Collection[str],
    raylet_alive: Callable[[RayletId], bool],
) -> bool:
    """Decide whether something with these labels has no reason to live.

    =============== ================= ================================
    its cluster     its namespace     doomed
    =============== ================= ================================
    ours            ours              when its session has no lease
    ours            another           never: another manager looks after it
    another         ours              when its raylet no longer exists
    another         another           never
    =============== ================= ================================

    What lacks a label is foreign and never doomed. What belongs to no session (a network) is looked at
    by its raylet alone.
    """
    if owner is None or owner.namespace != namespace:
        return False
    if owner.cluster != cluster_id or not owner.session:
        return not raylet_alive(owner.raylet)
    return owner.session not in live_sessions


def sweep(
    engine: Engine,
    live_sessions: Callable[[], Collection[str]],
    cluster_id: str,
    namespace: str,
    raylet_alive: Callable[[RayletId], bool] = RayletId.is_alive,
) -> Swept:
    """Remove containers, volumes and networks of dead owners, and what killed processes left half done.

    The latter are builds on the engine, and directories on this machine that a link was to be made in.

    Args:
        engine: of this node.
        live_sessions: gives the sessions that have a lease; called after the listing and again just
            before each removal, so that a session whose lease came meanwhile stays.
        cluster_id: ours.
        namespace: ours.
        raylet_alive: tells whether a raylet still runs; True where it cannot know.

    Raises:
        SandboxEngineError: when the engine fails; what was removed until then is.
    """

    def doomed(owner: OwnerLabels | None, live: Collection[str] | None = None) -> bool:
        return is_doomed(
            owner,
            cluster_id=cluster_id,
            namespace=namespace,
            live_sessions=live_sessions() if live is None else live,
            raylet_alive=raylet_alive,
        )

    links = remove_abandoned_links()
    listed = engine.list_containers({CLUSTER: None, NAMESPACE: namespace})
    unfinished = find_unfinished_volumes(engine)
    live = live_sessions()  # asked again for the few that it dooms
    containers = [
        found.name
        for found in listed
        if doomed(found.owner, live) and doomed(found.owner) and engine.remove(found.id)
    ]
    volumes = [
        name
        for name, owner in unfinished
        if doomed(owner, live) and doomed(owner) and remove_volume(engine, name)
    ]
    networks = [
        network.name
        for network in list_networks(engine)
        if network.owner is not None
        and network.owner.namespace == namespace
        and (network.owner.cluster == cluster_id or doomed(network.owner))
        and remove_network_if_unused(engine, network)
    ]
    return Swept(
        tuple(containers), tuple(volumes), tuple(networks), links, builds=clean_builds(engine)
    )
