"""The network of sandboxes with ``network="internet"``: a bridge of its own, one per cluster and node.

Containers on it reach public addresses and nothing else: not one another, not the host under any of
its addresses, no private range, not the cluster's nodes. Where that is not in force, no container
starts. IPv6 is off on it, so rules for IPv4 are all there are.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import docker.errors

from apothic.errors import SandboxNetworkError
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.faults import FaultPoint, no_fault
from ray_backend.sandbox.engine.firewall import (
    BRIDGE_PREFIX,
    Rules,
    enforce,
    host_name_servers,
    ipv4_networks,
    is_private,
    remove_rules,
)
from ray_backend.sandbox.engine.labels import BRIDGE, NETWORK, OwnerLabels
from ray_backend.sandbox.engine.locks import held, held_if_free
from ray_backend.sandbox.engine.translate import translated

__all__ = [
    "DNS_VARIABLE",
    "InternetNetwork",
    "internet_network",
    "list_networks",
    "public_nodes",
    "refresh_internet",
    "release_internet",
    "remove_network_if_unused",
]

DNS_VARIABLE = "APOTHIC_SANDBOX_DNS"
"""IPv4 name servers for sandboxes, separated by commas; the host's own when not set."""


SWEEP = "sweep"
"""In place of a session, on what helps with a sweep; no session is named so."""


@dataclass(frozen=True)
class InternetNetwork:
    """A network of ours on an engine.

    Attributes:
        id: for `ContainerSpec.network`.
        name: readable.
        bridge: its interface on the host.
        owner: whose it is; None when the labels are not all ours.
        dns: for `ContainerSpec.dns`.
        public_nodes: see there; of the rules that were set.
    """

    id: str
    name: str
    bridge: str
    owner: OwnerLabels | None
    dns: tuple[str, ...] = ()
    public_nodes: frozenset[str] = frozenset()


@contextmanager
def internet_network(
    engine: Engine,
    owner: OwnerLabels,
    *,
    blocked: Callable[[], Sequence[str]] = tuple,
    at: FaultPoint = no_fault,
) -> Iterator[InternetNetwork]:
    """Give the cluster's network, made if need be and seen to isolate; about 0.8 s.

    It stays while the block runs: create and start the container in it.

    Args:
        engine: where.
        owner: for whom.
        blocked: gives the addresses of the cluster's nodes and other networks to keep out of reach;
            asked when the rules are set, as all containers of the network share them.
        at: called with ``network``, ``network-rules``.

    Raises:
        SandboxNetworkError: when the node cannot enforce the isolation, with the reason.
    """
    shared = OwnerLabels(owner.cluster, owner.namespace, owner.raylet)
    given = _given_name_servers()
    with held("network", engine.info.id, owner.cluster, owner.namespace, shared=True):
        with held("network-setup", engine.info.id):
            network = _find(engine, shared) or _create(engine, shared)
            at("network")
            _refuse_ipv6(engine, network)
            nodes = _set_rules(engine, owner, network, blocked)
            at("network-rules")
        yield replace(network, dns=given, public_nodes=nodes)


def refresh_internet(
    engine: Engine, owner: OwnerLabels, blocked: Callable[[], Sequence[str]]
) -> frozenset[str]:
    """Set the rules of the cluster's network again, as its nodes have changed; give `public_nodes`.

    Containers run on meanwhile, and are not without rules for a moment.

    Raises:
        SandboxNetworkError: when they are not in force afterwards, with the reason.
    """
    with held("network-setup", engine.info.id):
        network = _find(engine, owner)
        # None: it went with its last container just now.
        return frozenset() if network is None else _set_rules(engine, owner, network, blocked)


def public_nodes(addresses: Sequence[str]) -> frozenset[str]:
    """Give what only a rule of its own keeps out of reach: other addresses are in private ranges.

    Raises:
        SandboxNetworkError: when a host name cannot be resolved.
    """
    return _public(ipv4_networks(addresses))


def release_internet(engine: Engine, owner: OwnerLabels) -> bool:
    """Remove the cluster's network and its rules, unless a container still uses it.

    Call it when a container that used it has gone. False when it stays, or there was none.
    """
    network = _find(engine, owner)
    return network is not None and remove_network_if_unused(engine, network, owner)


def list_networks(engine: Engine) -> list[InternetNetwork]:
    """List the networks of all clusters on the engine."""
    with translated("list networks"):
        found = engine.api.networks(filters={"label": NETWORK})
    return [
        InternetNetwork(
            one["Id"],
            one["Name"],
            one["Labels"].get(BRIDGE, ""),
            OwnerLabels.from_labels(one["Labels"]),
        )
        for one in found
    ]


def remove_network_if_unused(
    engine: Engine, network: InternetNetwork, helper: OwnerLabels | None = None
) -> bool:
    """Remove a network and its rules; False when a container or one being created needs it.

    Args:
        engine: where.
        network: which.
        helper: the labels of what helps with it; of no live session when left out.
    """
    if network.owner is None:
        return False
    owner = network.owner
    key = (engine.info.id, owner.cluster, owner.namespace)
    # Others that remove are waited for: each may have seen the container that another has removed
    # since. Who creates a container just now is not: it removes the network when it is done with it.
    with held("network-removal", *key), held_if_free("network", *key) as free:
        if not free:
            return False
        with translated(f"remove the network {network.name!r}"):
            # The engine's own filter for networks overlooks containers that never ran.
            modes = [one["HostConfig"]["NetworkMode"] for one in engine.api.containers(all=True)]
            if network.id in modes or network.name in modes:
                return False
            try:
                engine.api.remove_network(network.id)
            except docker.errors.NotFound:
                pass
            except docker.errors.APIError as error:
                if error.status_code == 403:  # a container joined it
                    return False
                raise
        with held("network-setup", engine.info.id):
            alive = [one.bridge for one in list_networks(engine)]
            remove_rules(engine, helper or replace(owner, session=SWEEP), alive)
    return True


def _find(engine: Engine, owner: OwnerLabels) -> InternetNetwork | None:
    for network in list_networks(engine):
        whose = network.owner
        if whose is not None and (whose.cluster, whose.namespace) == (
            owner.cluster,
            owner.namespace,
        ):
            return network
    return None


def _given_name_servers() -> tuple[str, ...]:
    return tuple(os.environ.get(DNS_VARIABLE, "").replace(",", " ").split())


def _set_rules(
    engine: Engine,
    owner: OwnerLabels,
    network: InternetNetwork,
    blocked: Callable[[], Sequence[str]],
) -> frozenset[str]:
    # What helps with it is the session's: a sweep finds it when this process is killed.
    servers = _given_name_servers() or host_name_servers(engine, owner)
    networks = ipv4_networks(blocked())
    enforce(engine, owner, Rules(network.bridge, servers, networks))
    return _public(networks)


def _public(networks: Sequence[str]) -> frozenset[str]:
    return frozenset(one for one in networks if not is_private(one))


def _refuse_ipv6(engine: Engine, network: InternetNetwork) -> None:
    with translated(f"inspect the network {network.name!r}"):
        found = engine.api.inspect_network(network.id)
    if found.get("EnableIPv6"):
        raise SandboxNetworkError(
            f"the network {network.name!r} of this node has IPv6, for which there are no rules. Close "
            f"the sessions that use it, remove it ('docker network rm {network.name}'), and take "
            f"enable_ipv6 out of default-network-opts in /etc/docker/daemon.json if it is there."
        )


def _create(engine: Engine, owner: OwnerLabels) -> InternetNetwork:
    bridge = BRIDGE_PREFIX + secrets.token_hex(4)
    name = f"apothic-internet-{bridge}"
    with translated("create a network"):
        made = engine.api.create_network(
            name,
            driver="bridge",
            options={
                "com.docker.network.bridge.name": bridge,
                "com.docker.network.bridge.enable_icc": "false",
                "com.docker.network.bridge.enable_ip_masquerade": "true",
                # docker-py leaves a false `enable_ipv6` out, and the default may be the engine's own.
                "com.docker.network.enable_ipv6": "false",
            },
            labels={**owner.as_labels(), NETWORK: "internet", BRIDGE: bridge},
            enable_ipv6=False,
        )
    return InternetNetwork(made["Id"], name, bridge, owner)
