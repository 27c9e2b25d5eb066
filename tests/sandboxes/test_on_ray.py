"""The conformance suites on containers of a Ray cluster."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from apothic import App, Sandbox, SandboxSession, Volume
from apothic.backend import ControlPlaneClient, connect
from apothic.errors import SandboxClosedError
from apothic.session_calls import PART_BYTES, PARTS_IN_FLIGHT
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.firewall import Rules, read_rules
from ray_backend.sandbox.engine.network import list_networks
from tests.conformance.sandboxes.base import SMALL, SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import InterruptConformance, KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance, SharedSessionConformance
from tests.conformance.sandboxes.volumes_of_data import DataConformance
from tests.docker.support import left_of, new_owner
from tests.sandboxes.inside import ContainerConformance
from tests.sandboxes.test_direct import IMAGE
from tests.support import eventually

__all__ = ["marked"]

pytestmark = pytest.mark.ray


class OnRay(SandboxSuite):
    @pytest.fixture
    def engine(self, docker_engine: Engine, ray_cluster: str) -> Iterator[ControlPlaneClient]:
        client = connect()
        yield client
        eventually(lambda: not left_of(docker_engine, client.cluster_id))

    @pytest.fixture
    def define(self, engine: ControlPlaneClient) -> Callable[..., Sandbox]:
        app = App("conformance")
        count = iter(range(1000))

        def define(**options: Any) -> Sandbox:
            given = {"name": f"s{next(count)}", "image": IMAGE, **SMALL, **options}
            return app.sandbox(**given)

        return define


class TestRayExecs(OnRay, ExecConformance):
    pass


class TestRayFiles(OnRay, FileConformance):
    pass


class TestRayKills(OnRay, KillConformance, InterruptConformance):
    pass


class TestRaySessions(OnRay, SessionConformance, SharedSessionConformance):
    pass


class TestRayData(OnRay, DataConformance):
    pass


class TestRayContainers(OnRay, ContainerConformance):
    pass


class TestRayVolumes(OnRay):
    @pytest.mark.parametrize("named", [False, True])
    def test_close_leaves_no_half_written_file(
        self, define: Callable[..., Sandbox], named: bool
    ) -> None:
        """The agent of a named session does not end with its client, that of another does."""
        name = f"half-written-{named}".lower()
        sandbox = define(volumes={"/data": Volume.vast_local(name, size_gb=1)})
        count = PARTS_IN_FLIGHT + 2
        with sandbox.named("writer") if named else sandbox.create() as session:

            def parts() -> Iterator[bytes]:
                for number in range(count):
                    if number == count - 1:  # so that the first has arrived
                        assert session.listdir("/data") == ["file"]
                        assert session.close().closed
                    yield bytes(PART_BYTES)

            with pytest.raises(SandboxClosedError):
                session._upload(b"/data/file", parts(), count * PART_BYTES, False)
        with sandbox.create() as later:
            assert later.listdir("/data") == []
        Volume.from_name(name).delete()


class TestRayStreams(OnRay):
    def test_a_stream_that_nobody_reads_holds_its_program_up(self, session: SandboxSession) -> None:
        """What may lie between the two is bounded: pipes, windows, and the items that Ray holds."""
        code = "n=0; while head -c 65536 /dev/zero; do n=$((n+1)); echo $n >written; done"
        with session.exec_stream(code, shell=True, timeout_s=600) as stream:
            assert next(stream).kind == "stdout"
            eventually(lambda: written(session) > 0)
            looks = [written(session) for _ in range(300)]
            assert looks[-1] == looks[-100], "it goes on"
            assert looks[-1] < 16 * 16, "more than 16 MiB"
            for _ in range(10):
                next(stream)
            eventually(lambda: written(session) > looks[-1])
        session.exec("true").check()


def written(session: SandboxSession) -> int:
    try:
        return int(session.read_text("written") or 0)
    except FileNotFoundError:
        return 0


class TestRayProcesses(OnRay):
    def test_a_session_carries_no_more_than_it_needs(self, session: SandboxSession) -> None:
        """Its process is made for one session, and each package that it imports delays it."""
        pid = ray.get(session.actor.apothic_status.remote())["pid"]
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "_raylet" in loaded
        assert not re.search("pydantic|numpy", loaded)


LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 0))
print(socket.gethostbyname(socket.gethostname()), server.getsockname()[1], flush=True)
while True: server.accept()[0].close()
"""

REACH = """
import socket, sys
for target in sys.argv[1:]:
    address, port = target.split(":")
    try:
        socket.create_connection((address, int(port)), timeout=2).close()
        print(target)
    except OSError:
        pass
"""


class TestRayNetworks(OnRay):
    def test_the_cluster_s_nodes_are_out_of_reach(
        self,
        define: Callable[..., Sandbox],
        docker_engine: Engine,
        ray_cluster: str,
        python: str,
    ) -> None:
        """By a rule for each, which is there because the session's actor has asked Ray for them."""
        nodes = sorted({each["NodeManagerAddress"] for each in ray.nodes()})
        assert nodes
        host, _, port = ray_cluster.rpartition(":")
        with (
            define(network="internet").create() as session,
            session.exec_stream([python, "-c", LISTEN]) as listener,
        ):
            control = ":".join(next(listener).text.split())
            [network] = [
                one
                for one in list_networks(docker_engine)
                if one.owner is not None and one.owner.cluster == connect().cluster_id
            ]
            chain = Rules(network.bridge).out_chain
            lines = read_rules(docker_engine, new_owner()).splitlines()
            for node in nodes:
                wanted = f"-A {chain} -d {node}/32 -j REJECT"
                assert any(line.startswith(wanted) for line in lines), node

            # The GCS listens, as it does for those outside; and the probe inside finds who listens.
            socket.create_connection((host, int(port)), timeout=5).close()
            [config] = docker_engine.api.inspect_network(network.id)["IPAM"]["Config"]
            hosts = {host, *nodes, config["Gateway"]} - {"127.0.0.1"}  # which is its own inside
            targets = [f"{one}:{port}" for one in sorted(hosts)]
            probe = session.exec([python, "-c", REACH, *targets, control]).check()
            assert probe.stdout == f"{control}\n"


class TestRayImages(OnRay):
    def test_who_waits_for_a_build_is_told_what_it_does(
        self, define: Callable[..., Sandbox], capfd: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        step = "i=0; while [ $i -lt 30 ]; do echo line-$i; i=$((i + 1)); sleep 0.1; done"
        image = IMAGE.run_commands(f"{step}; echo {tmp_path} > /made")
        with define(image=image).create() as session:
            assert session.read_text("/made").strip() == str(tmp_path)
        told = capfd.readouterr().err
        assert "[apothic] conformance.s0" in told
        assert "line-" in told
