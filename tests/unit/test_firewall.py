"""What counts as a packet filter in force, by what an engine and its host show of it."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from apothic.errors import SandboxNetworkError
from ray_backend.sandbox.engine import firewall, network
from ray_backend.sandbox.engine.firewall import Rules, enforce, ipv4_networks
from ray_backend.sandbox.engine.info import EngineInfo
from ray_backend.sandbox.engine.network import InternetNetwork, public_nodes
from tests.docker.support import new_owner

RULES = Rules("apo0123abcd", ("10.0.0.2",), ("8.8.4.4/32",))
APART = f"-i {RULES.bridge} -o {RULES.bridge} -j DROP"
OUR_LINES = [*(f"-A {jump}" for jump in RULES.jumps()), *RULES.lines()]

OLD = [  # Docker 20.10 to 28.0.0, with another bridge
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
    "-A FORWARD -o docker0 -j DOCKER",
    "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
    f"-A FORWARD -o {RULES.bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    f"-A FORWARD -i {RULES.bridge} ! -o {RULES.bridge} -j ACCEPT",
    f"-A FORWARD {APART}",
]
NEW = [  # 28.0.1 and newer
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -j DOCKER-FORWARD",
    "-A DOCKER-FORWARD -j DOCKER-CT",
    "-A DOCKER-FORWARD -j DOCKER-INTERNAL",
    "-A DOCKER-FORWARD -j DOCKER-BRIDGE",
    "-A DOCKER-FORWARD -i docker0 -j ACCEPT",
    f"-A DOCKER-FORWARD {APART}",
    f"-A DOCKER-FORWARD -i {RULES.bridge} ! -o {RULES.bridge} -j ACCEPT",
    "-A DOCKER-USER -j RETURN",
]


def look(monkeypatch: pytest.MonkeyPatch, engine_s: list[str], **info: Any) -> None:
    """Set the rules on a host that shows these afterwards."""
    jump, *ours = OUR_LINES
    shown = "\n".join([jump, *engine_s, *ours, "bridge-nf-call-iptables 1"])
    monkeypatch.setattr(firewall, "read_rules", lambda *args, **kwargs: shown)
    engine: Any = SimpleNamespace(info=EngineInfo.parse(info))
    enforce(engine, new_owner(), RULES)


@pytest.mark.parametrize("engine_s", [OLD, NEW], ids=["old", "28"])
def test_the_engine_keeps_containers_apart_in_either_chain(
    monkeypatch: pytest.MonkeyPatch, engine_s: list[str]
) -> None:
    look(monkeypatch, engine_s)
    look(monkeypatch, engine_s, FirewallBackend={"Driver": "iptables+firewalld"})


@pytest.mark.parametrize(
    "engine_s",
    [
        OLD[:-1],
        [*OLD[:2], "-A FORWARD -j ACCEPT", *OLD[2:]],
        [*OLD[:2], f"-A FORWARD -i {RULES.bridge} -j ACCEPT", *OLD[2:]],
        [line for line in NEW if APART not in line],
        [line for line in NEW if line != "-A FORWARD -j DOCKER-FORWARD"],
        [NEW[0], "-A FORWARD -i docker0 -j DOCKER-FORWARD", *NEW[2:]],
        [NEW[0], "-A FORWARD -j ACCEPT", *NEW[1:]],
        [*NEW[:2], f"-A DOCKER-FORWARD -i {RULES.bridge} -o {RULES.bridge} -j ACCEPT", *NEW[2:]],
    ],
)
def test_a_rule_that_is_missing_or_that_no_packet_comes_to_does_not_count(
    monkeypatch: pytest.MonkeyPatch, engine_s: list[str]
) -> None:
    with pytest.raises(SandboxNetworkError, match="does not keep containers") as caught:
        look(monkeypatch, engine_s)
    assert APART in str(caught.value)
    assert "FORWARD nor in a chain DOCKER-FORWARD" in str(caught.value)


@pytest.mark.parametrize("driver", ["nftables", "nftables+firewalld"])
def test_an_engine_that_filters_with_nftables_is_refused(
    monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    """Whatever an earlier start of it with iptables has left."""
    with pytest.raises(SandboxNetworkError, match="firewall-backend") as caught:
        look(monkeypatch, NEW, FirewallBackend={"Driver": driver})
    assert driver in str(caught.value)


def test_addresses_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"head": ["8.8.4.4", "10.0.0.9"]}

    def resolve(name: str, *args: Any) -> list[Any]:
        if name not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in names[name]]

    monkeypatch.setattr(firewall.socket, "getaddrinfo", resolve)
    assert ipv4_networks([]) == ()
    assert ipv4_networks(["8.8.8.8", "8.8.8.8", "10.1.2.3/8"]) == ("10.0.0.0/8", "8.8.8.8/32")
    assert ipv4_networks(["2001:db8::1", "::1", "fe80::1%eth0"]) == ()
    assert ipv4_networks(["::ffff:8.8.8.8"]) == ("8.8.8.8/32",)
    assert ipv4_networks(["head", "8.8.4.4"]) == ("10.0.0.9/32", "8.8.4.4/32")
    assert public_nodes(["head", "192.168.1.1", "127.0.0.1"]) == {"8.8.4.4/32"}
    with pytest.raises(SandboxNetworkError, match=r"'gone'.*Name or service not known") as caught:
        ipv4_networks(["8.8.8.8", "gone"])
    assert "--node-ip-address" in str(caught.value)


@pytest.mark.parametrize("address", ["", "a..b", "x" * 70, "1.2.3.4:80"])
def test_what_can_be_no_address_is_refused_with_its_value(address: str) -> None:
    with pytest.raises(SandboxNetworkError) as caught:
        ipv4_networks([address])
    assert repr(address) in str(caught.value)


def test_a_network_with_ipv6_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no rules for it; nor is an address of it blocked."""
    found = {"EnableIPv6": False}
    engine: Any = SimpleNamespace(api=SimpleNamespace(inspect_network=lambda id: found))
    ours = InternetNetwork("id", "apothic-internet-x", "x", None)
    network._refuse_ipv6(engine, ours)
    found["EnableIPv6"] = True
    with pytest.raises(SandboxNetworkError, match="docker network rm apothic-internet-x"):
        network._refuse_ipv6(engine, ours)
