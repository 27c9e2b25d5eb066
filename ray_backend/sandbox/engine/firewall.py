"""The packet filter of the engine's host: what a sandbox network's bridge may reach.

The engine's API knows no rule "not the host, not private addresses", so the rules are set with the
host's own iptables, in its network namespace. It is run in a short container that shares this
namespace and sees the host's programs read-only: that needs no more than the engine itself, and works
for a user who is not root, and where Ray runs in a container. About 0.3 s a run.

Nothing is believed without a look: after each change the rules are read back and compared.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apothic.errors import SandboxEngineError, SandboxNetworkError
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.helper import helper_container
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.translate import translated

__all__ = [
    "BRIDGE_PREFIX",
    "Rules",
    "enforce",
    "host_name_servers",
    "ipv4_networks",
    "is_private",
    "read_rules",
    "remove_rules",
]

BRIDGE_PREFIX = "apo"
_CHAIN = re.compile(r"^-N (APO-(apo[0-9a-f]{8})-(?:OUT|HOST))$", re.MULTILINE)
_OUR_JUMP = re.compile(r"-A (?:INPUT|DOCKER-USER) -i apo[0-9a-f]{8} -j APO-apo[0-9a-f]{8}-\w+")
_REJECT = "-j REJECT --reject-with icmp-net-prohibited"
_LIMIT_S = 60.0

# Everything of IPv4 that is not the public internet: the IANA special-purpose registry (RFC 6890),
# with link-local (cloud metadata), shared (carriers, overlay networks) and multicast addresses.
PRIVATE_RANGES = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)

_REMEDY = (
    "Use network='none', or correct that on the node. Sandboxes with network='internet' need a Docker "
    "engine that manages iptables (its default) on a Linux host with iptables installed."
)


@dataclass(frozen=True)
class Rules:
    """What a bridge may reach: the public internet, and name servers where they are private.

    Attributes:
        bridge: the interface.
        name_servers: IPv4 addresses whose port 53 may be reached.
        blocked: further networks that may not, as `ipv4_networks` gives them: the cluster's nodes,
            which may be public.
    """

    bridge: str
    name_servers: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    @property
    def out_chain(self) -> str:
        """The chain for packets that pass through the host."""
        return f"APO-{self.bridge}-OUT"

    @property
    def host_chain(self) -> str:
        """The chain for packets to the host itself, under any of its addresses."""
        return f"APO-{self.bridge}-HOST"

    def lines(self) -> list[str]:
        """Give the rules as ``iptables -S`` prints them."""
        out = self.out_chain
        allowed = [
            f"-A {out} -d {server}/32 -p {protocol} -m {protocol} --dport 53 -j RETURN"
            for server in self.name_servers
            for protocol in ("udp", "tcp")
        ]
        ranges = [*PRIVATE_RANGES, *self.blocked]
        return [
            *allowed,
            *(f"-A {out} -d {one} {_REJECT}" for one in ranges),
            f"-A {self.host_chain} {_REJECT}",
        ]

    def jumps(self) -> tuple[str, str]:
        """Give the rules that lead to the two chains."""
        return (
            f"DOCKER-USER -i {self.bridge} -j {self.out_chain}",
            f"INPUT -i {self.bridge} -j {self.host_chain}",
        )


def ipv4_networks(addresses: Iterable[str]) -> tuple[str, ...]:
    """Give addresses and networks as ``iptables -S`` prints them, each once, host names resolved.

    Raises:
        SandboxNetworkError: when a host name has no IPv4 address, as its node may be public.
    """
    return tuple(sorted({network for one in addresses for network in _networks(one)}))


def is_private(network: str) -> bool:
    """Tell whether a network is out of reach in any case."""
    inner = ipaddress.IPv4Network(network)
    return any(inner.subnet_of(ipaddress.IPv4Network(outer)) for outer in PRIVATE_RANGES)


def _networks(address: str) -> list[str]:
    try:
        found = ipaddress.ip_network(address, strict=False)
    except ValueError:
        return _resolved(address)
    if isinstance(found, ipaddress.IPv4Network):
        return [str(found)]
    mapped = found.network_address.ipv4_mapped
    # Other IPv6 addresses need no rule: the network has no IPv6, so there is no way to them.
    return [] if mapped is None else [f"{mapped}/32"]


def _resolved(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of what can be no name
        raise SandboxNetworkError(
            f"the cluster has a node with the address {name!r}, which must be kept out of reach of "
            f"network='internet', but is no IP address and cannot be resolved to IPv4 on this node: "
            f"{error}. Start Ray there with --node-ip-address and an IP address, or make the name "
            f"known here (/etc/hosts), or use network='none'."
        ) from error
    return [f"{address[4][0]}/32" for address in found]


def enforce(engine: Engine, owner: OwnerLabels, rules: Rules) -> None:
    """Set the rules, read them back, and make sure that nothing comes before them.

    Raises:
        SandboxNetworkError: when they are not in force afterwards, with the reason.
    """
    if engine.info.rootless:
        raise SandboxNetworkError(
            f"the Docker engine of this node is rootless: packets to the host do not pass its "
            f"filter. {_REMEDY}"
        )
    if engine.info.firewall.startswith("nftables"):
        # Its rules are in tables of its own, which iptables neither shows nor comes before; and a
        # chain DOCKER-USER that an earlier start has left is no part of them.
        raise SandboxNetworkError(
            f"the Docker engine of this node filters with nftables (it says FirewallBackend="
            f"{engine.info.firewall!r}), where isolation cannot be checked. Set "
            f'"firewall-backend": "iptables" in /etc/docker/daemon.json and restart Docker. {_REMEDY}'
        )
    restore = "\n".join(
        [
            "*filter",
            f":{rules.out_chain} - [0:0]",
            f":{rules.host_chain} - [0:0]",
            *rules.lines(),
            "COMMIT",
        ]
    )
    # The chains are replaced in one step, so that running containers are never without them.
    script = f"iptables-restore -w --noflush <<'END'\n{restore}\nEND\n"
    for jump in rules.jumps():
        chain, _, rest = jump.partition(" ")
        script += f"iptables -w -C {jump} 2>/dev/null || iptables -w -I {chain} 1 {rest}\n"
    found = read_rules(engine, owner, before=script)
    if _problem(rules, found) is not None:
        # Something was put before our jumps: another at the top; the old ones do no harm.
        script = "".join(
            f"iptables -w -I {jump.replace(' ', ' 1 ', 1)}\n" for jump in rules.jumps()
        )
        found = read_rules(engine, owner, before=script)
    problem = _problem(rules, found)
    if problem is not None:
        raise SandboxNetworkError(
            f"the isolation of network='internet' is not in force on this node: {problem}. {_REMEDY}"
        )


def remove_rules(engine: Engine, owner: OwnerLabels, bridges_alive: Sequence[str]) -> None:
    """Remove the rules of bridges that are gone; names of bridges are never used again.

    Raises:
        SandboxNetworkError: when iptables cannot be run.
    """
    gone = [
        (chain, bridge)
        for chain, bridge in _CHAIN.findall(read_rules(engine, owner))
        if bridge not in bridges_alive
    ]
    script = ""
    for chain, bridge in gone:
        parent = "INPUT" if chain.endswith("-HOST") else "DOCKER-USER"
        jump = f"iptables -w -D {parent} -i {bridge} -j {chain} 2>/dev/null"
        script += f"while {jump}; do :; done\niptables -w -F {chain}\niptables -w -X {chain}\n"
    if script:
        _run(engine, owner, _GUARD + script)


def read_rules(engine: Engine, owner: OwnerLabels, *, before: str = "") -> str:
    """Give all rules as ``iptables -S`` prints them, after running a script of commands."""
    return _run(engine, owner, _GUARD + before + _SHOW)


def host_name_servers(engine: Engine, owner: OwnerLabels) -> tuple[str, ...]:
    """Give the IPv4 name servers of the engine's host that containers ask themselves.

    Those at a loopback address are asked by the engine for them.
    """
    servers = re.findall(
        r"^nameserver\s+(\d+\.\d+\.\d+\.\d+)\s*$",
        _run(engine, owner, "cat /etc/resolv.conf"),
        re.MULTILINE,
    )
    return tuple(server for server in servers if not ipaddress.IPv4Address(server).is_loopback)


_GUARD = """set -e
PATH=/usr/sbin:/usr/bin:/sbin:/bin
command -v iptables >/dev/null || { echo 'the host has no iptables'; exit 91; }
iptables -w -n -L DOCKER-USER >/dev/null 2>&1 || {
    echo 'the engine keeps no chain DOCKER-USER: it does not manage iptables'; exit 91; }
"""
_SHOW = """
iptables -w -S
echo "bridge-nf-call-iptables $(cat /proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null)"
"""


def _problem(rules: Rules, found: str) -> str | None:
    """Say what keeps the rules from being in force; None when they are."""
    lines = found.splitlines()
    if "bridge-nf-call-iptables 1" not in lines:
        return (
            "the kernel does not filter packets between containers "
            "(net.bridge.bridge-nf-call-iptables is not 1)"
        )
    chains = (f"-A {rules.out_chain} ", f"-A {rules.host_chain} ")
    ours = [line for line in lines if line.startswith(chains)]
    if sorted(ours) != sorted(rules.lines()):
        return f"chain {rules.out_chain} is not as it was set"
    forward = [line for line in lines if line.startswith("-A FORWARD ")]
    if forward[:1] != ["-A FORWARD -j DOCKER-USER"]:
        return f"another rule comes before the engine's own: {(forward or ['none'])[0]}"
    apart = f"-i {rules.bridge} -o {rules.bridge} -j DROP"
    # Where Docker 28.0.1 and newer have it, and where older engines do.
    if not (
        _is_reached(f"FORWARD {apart}", rules.bridge, lines)
        or (
            _is_reached("FORWARD -j DOCKER-FORWARD", rules.bridge, lines)
            and _is_reached(f"DOCKER-FORWARD {apart}", rules.bridge, lines)
        )
    ):
        return (
            f"the engine does not keep containers of the network apart: packets come to the rule "
            f"{apart!r} neither in chain FORWARD nor in a chain DOCKER-FORWARD that FORWARD jumps to"
        )
    for jump in rules.jumps():
        parent = jump.partition(" ")[0]
        for line in lines:
            if line == f"-A {jump}":
                break
            if line.startswith(f"-A {parent} ") and not _OUR_JUMP.fullmatch(line):
                return f"another rule comes before ours: {line}"
        else:
            return f"rule {jump!r} is missing"
    return None


def _is_reached(rule: str, bridge: str, lines: Sequence[str]) -> bool:
    """Tell whether a rule is there, and none before it that ends its chain for all of a bridge."""
    chain = rule.partition(" ")[0]
    either = (f"-i {bridge} ", f"-o {bridge} ")
    ends = {
        f"-A {chain} {of}-j {verdict}"
        for of in ("", *either, "".join(either))
        for verdict in ("ACCEPT", "RETURN")
    }
    for line in lines:
        if line == f"-A {rule}":
            return True
        if line in ends:
            return False
    return False


def _run(engine: Engine, owner: OwnerLabels, script: str) -> str:
    """Run a shell script with the host's programs in the host's network; give its output."""
    optional = ["/etc/alternatives", "/lib64", "/run"]
    while True:
        try:
            return _run_with(engine, owner, script, ["/usr", "/bin", "/sbin", "/lib", *optional])
        except SandboxEngineError as error:
            missing = next((one for one in optional if f"not exist: {one}" in str(error)), None)
            if missing is None:
                raise SandboxNetworkError(
                    f"the packet filter of this node cannot be set: {error} {_REMEDY}"
                ) from error
            optional.remove(missing)


def _run_with(engine: Engine, owner: OwnerLabels, script: str, paths: Sequence[str]) -> str:
    mounts = [
        # /run holds the lock that keeps iptables commands apart.
        {"Type": "bind", "Source": path, "Target": path, "ReadOnly": path != "/run"}
        for path in paths
    ]
    config = {
        "Entrypoint": ["/bin/sh", "-c", script],
        "HostConfig": {
            "Mounts": mounts,
            "NetworkMode": "host",
            "CapDrop": ["ALL"],
            "CapAdd": ["NET_ADMIN", "NET_RAW"],
            "LogConfig": {"Type": "json-file"},
        },
    }
    with helper_container(engine, owner, config) as helper, translated("set the packet filter"):
        engine.api.start(helper)
        try:
            status = engine.wait(helper, _LIMIT_S)
        except TimeoutError as error:
            raise SandboxEngineError(f"iptables did not end within {_LIMIT_S} s.") from error
        output = engine.api.logs(helper, stdout=True, stderr=True).decode("utf-8", "replace")
        if status != 0:
            raise SandboxEngineError(f"{output.strip() or f'exit status {status}'}.")
        return output
