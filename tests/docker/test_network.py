"""What a container on the internet network reaches, from inside; and that the rules go with it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from apothic.errors import SandboxNetworkError
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.firewall import Rules, enforce, read_rules
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.launch import Launched
from ray_backend.sandbox.engine.network import (
    internet_network,
    list_networks,
    refresh_internet,
    release_internet,
)
from ray_backend.sandbox.engine.sweep import sweep
from tests.docker.support import (
    new_owner,
    read_line,
    run_inside,
    spec_of,
    with_container,
)


@pytest.fixture(scope="module")
def listening() -> Iterator[int]:
    """Listen on all addresses of the host, as Ray does; give the port."""
    with socket.create_server(("0.0.0.0", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"reached\n")
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def own_address() -> str:
    """Give the address under which this machine is seen from outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def rules_of(engine: Engine, owner: OwnerLabels) -> str:
    return "\n".join(line for line in read_rules(engine, owner).splitlines() if "apo" in line)


def test_none_has_no_way_out(engine: Engine, owner: OwnerLabels, listening: int):
    said = run_inside(
        engine, owner, f"ls /sys/class/net; nc -w 2 {own_address()} {listening} </dev/null; echo $?"
    )
    assert said.startswith("lo\n")
    assert "reached" not in said


def test_the_plain_bridge_would_reach_the_host(engine: Engine, owner: OwnerLabels, listening: int):
    """The probe works: what the next test finds closed is open without the rules."""
    network = engine.api.create_network("apothic-test-open", labels=owner.as_labels())["Id"]
    try:
        for address in (own_address(), _gateway(engine, network)):
            said = run_inside(
                engine, owner, f"nc -w 5 {address} {listening} </dev/null", network=network
            )
            assert said == "reached\n"
    finally:
        engine.api.remove_network(network)


def test_closed_to_everything_private(engine: Engine, owner: OwnerLabels, listening: int):
    with internet_network(engine, owner) as network:

        async def body(other: Launched) -> None:
            await read_line(other.stream)
            attached = engine.api.inspect_container(other.id)["NetworkSettings"]["Networks"]
            neighbour = next(iter(attached.values()))["IPAddress"]
            script = "".join(
                f"echo {name}; nc -w 2 {address} {port} </dev/null 2>&1; ping -c 1 -W 1 {address} 2>&1;"
                for name, address, port in (
                    ("host", own_address(), listening),
                    ("gateway", _gateway(engine, network.id), listening),
                    ("default bridge", "172.17.0.1", listening),
                    ("neighbour", neighbour, 7777),
                    ("metadata", "169.254.169.254", 80),
                    ("private", "10.0.0.1", 80),
                )
            )
            said = await asyncio.to_thread(
                run_inside,
                engine,
                owner,
                script + "ip addr | grep inet6; ip link | grep -c mtu",
                network=network.id,
            )
            assert "reached" not in said
            assert "bytes from" not in said
            assert "inet6 fe80" not in said
            assert said.endswith("2\n")  # it has an interface besides the loopback

        listener = "echo up; while true; do echo reached | nc -l -p 7777; done"
        spec = spec_of(owner, "/bin/sh", "-c", listener, network=network.id)
        with_container(engine, spec, body)
        found = read_rules(engine, owner)
        assert f"-A DOCKER-USER -i {network.bridge} -j APO-{network.bridge}-OUT" in found
        assert f"-A INPUT -i {network.bridge} -j APO-{network.bridge}-HOST" in found
    assert release_internet(engine, owner)
    assert network.bridge not in rules_of(engine, owner)


def test_public_addresses_pass_but_for_the_cluster_s(engine: Engine, owner: OwnerLabels):
    """Seen in the packet filter's own counters, since here no public host may answer."""
    with internet_network(engine, owner, blocked=lambda: ["8.8.4.4"]) as network:
        chain = f"APO-{network.bridge}-OUT"

        def refused_after_a_packet_to(address: str) -> int:
            run_inside(engine, owner, f"nc -w 1 {address} 80 </dev/null", network=network.id)
            counters = read_rules(engine, owner, before=f"iptables -w -Z -nvxL {chain}\n")
            lines = [line.split() for line in counters.splitlines() if " REJECT " in line]
            return sum(int(words[0]) for words in lines if words[0].isdigit())

        assert refused_after_a_packet_to("8.8.8.8") == 0
        assert refused_after_a_packet_to("8.8.4.4") > 0
    assert release_internet(engine, owner)


def test_stays_while_it_is_used(engine: Engine, owner: OwnerLabels):
    with internet_network(engine, owner) as first:
        assert engine.api.inspect_network(first.id)["EnableIPv6"] is False
        created = engine.create_container(spec_of(owner, network=first.id))
        assert not release_internet(engine, owner)  # someone is creating just now
    assert not release_internet(engine, owner)  # created, not started
    with internet_network(engine, owner) as second:
        assert second.id == first.id
    assert rules_of(engine, owner).count("-j APO-") == 2
    engine.start(created.id)
    assert not release_internet(engine, owner)
    engine.remove(created.id)
    assert release_internet(engine, owner)
    assert not release_internet(engine, owner)
    assert rules_of(engine, owner) == ""


def test_rules_are_set_again_for_other_nodes(engine: Engine, owner: OwnerLabels):
    assert refresh_internet(engine, owner, lambda: ["8.8.4.4"]) == frozenset()  # no network
    assert rules_of(engine, owner) == ""
    with internet_network(engine, owner, blocked=lambda: ["10.0.0.1", "8.8.8.8"]) as network:
        assert network.public_nodes == {"8.8.8.8/32"}
        before = rules_of(engine, owner)
        joined = ["10.0.0.1", "8.8.8.8", "8.8.4.4", "2001:db8::1"]
        assert refresh_internet(engine, owner, lambda: joined) == {"8.8.8.8/32", "8.8.4.4/32"}
        after = rules_of(engine, owner)
        new = [line for line in after.splitlines() if line not in before.splitlines()]
        assert [line.split()[3] for line in new] == ["8.8.4.4/32"]
        assert len(after.splitlines()) == len(before.splitlines()) + 1
        with pytest.raises(SandboxNetworkError, match=r"'no\.\.name'"):
            refresh_internet(engine, owner, lambda: ["no..name"])
        assert rules_of(engine, owner) == after
    assert release_internet(engine, owner)
    assert rules_of(engine, owner) == ""


def test_rules_that_someone_removed_or_preceded(engine: Engine, owner: OwnerLabels):
    with internet_network(engine, owner) as network:
        rules = Rules(network.bridge)
        script = f"iptables -w -F {rules.out_chain}; iptables -w -D {rules.jumps()[1]}\n"
        read_rules(engine, owner, before=script)
        with internet_network(engine, owner):
            assert f"-A {rules.jumps()[1]}" in rules_of(engine, owner)
        read_rules(engine, owner, before=f"iptables -w -I INPUT 1 -i {network.bridge} -j ACCEPT\n")
        try:
            with internet_network(engine, owner):
                lines = [x for x in rules_of(engine, owner).splitlines() if "-A INPUT" in x]
                assert lines[0] == f"-A {rules.jumps()[1]}"
        finally:
            read_rules(
                engine, owner, before=f"iptables -w -D INPUT -i {network.bridge} -j ACCEPT\n"
            )
    assert release_internet(engine, owner)
    assert rules_of(engine, owner) == ""


def test_refused_where_it_cannot_be_enforced(engine: Engine, owner: OwnerLabels):
    """A bridge whose containers the engine lets talk: the look afterwards finds it."""
    options = {"com.docker.network.bridge.name": "apo0000test"}
    network = engine.api.create_network(
        "apothic-test-icc", options=options, labels=owner.as_labels()
    )["Id"]
    try:
        with pytest.raises(
            SandboxNetworkError, match="does not keep containers of the network apart"
        ):
            enforce(engine, owner, Rules("apo0000test"))
    finally:
        engine.api.remove_network(network)
        for chain in ("OUT", "HOST"):
            parent = "INPUT" if chain == "HOST" else "DOCKER-USER"
            name = f"APO-apo0000test-{chain}"
            jump = f"iptables -w -D {parent} -i apo0000test -j {name} 2>/dev/null"
            script = f"while {jump}; do :; done\niptables -w -F {name}\niptables -w -X {name}\n"
            read_rules(engine, owner, before=script)
    assert rules_of(engine, owner) == ""


def test_swept_with_its_cluster(engine: Engine, owner: OwnerLabels):
    """Left by an actor that was killed: the next sweep of the cluster, or of its successor."""
    with internet_network(engine, owner):
        pass
    assert len(list_networks(engine)) == 1
    sweep(engine, list, new_owner().cluster, "tests")  # its raylet lives
    assert len(list_networks(engine)) == 1
    swept = sweep(engine, list, new_owner().cluster, "tests", raylet_alive=lambda one: False)
    assert len(swept.networks) == 1
    assert rules_of(engine, owner) == ""


def _gateway(engine: Engine, network: str) -> str:
    return str(engine.api.inspect_network(network)["IPAM"]["Config"][0]["Gateway"])
