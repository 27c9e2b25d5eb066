"""Sessions whose process dies at any step of their creation, and whose engine does; without Ray."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
import uuid
from collections.abc import Iterator
from functools import partial

import pytest

from apothic import App, Image
from apothic.backend import use_client
from apothic.errors import SandboxClosedError, SandboxLostError, SandboxStartError
from apothic.values import Network
from ray_backend.sandbox.agent.binaries import agent_binary
from ray_backend.sandbox.containers import NodeSurroundings
from ray_backend.sandbox.engine.agent_volume import remove_agent
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import CLUSTER, OwnerLabels, RayletId
from ray_backend.sandbox.engine.link import abandoned_links
from ray_backend.sandbox.engine.sweep import sweep
from ray_backend.sandbox.host import SandboxHost
from ray_backend.sandbox.plan import SandboxPlan
from tests.docker.support import BUSYBOX, left_of, start_python
from tests.sandboxes.direct import DirectEngine
from tests.sandboxes.left import left_of_sessions
from tests.sandboxes.own_engine import OwnEngine, own_engine
from tests.support import eventually

IMAGE = Image.from_registry(BUSYBOX)
LAUNCH = ("create", "created", "attached", "started")
AGENT = ("agent-volume", "agent-filler", "agent-filled", "agent-elected")
NETWORK = ("network", "network-rules")
SESSION = "leaks:~s:1"


@pytest.fixture(scope="module")
def own(docker_engine: Engine) -> Iterator[OwnEngine]:
    with own_engine(docker_engine) as engine:
        yield engine


def named_session(cluster: str, network: Network) -> tuple[SandboxPlan, NodeSurroundings]:
    sandbox = App("leaks").sandbox(name="s", image=IMAGE, cpu=0, memory_mb=128, network=network)
    plan = SandboxPlan(
        actor_name=SESSION,
        cluster_id=cluster,
        sandbox_id="1",
        named=True,
        spec_json=sandbox.spec.model_dump_json(),
        cwd=b"/",
        env=pickle.dumps({}),
        arguments_digest="",
    )
    raylet = RayletId.of_process(os.getppid())
    around = NodeSurroundings(
        owner=OwnerLabels(cluster, "tests", raylet, SESSION, "actor"),
        node_id="here",
        gpu_ids=(),
        fetch=lambda digest: b"",
        secret=lambda name: None,
        pin_volume=lambda name: "here",
    )
    return plan, around


def die_at(cluster: str, step: str) -> None:
    """Open a named session, in a process of its own; it is killed at the step."""
    plan, around = named_session(cluster, "internet" if step in NETWORK else "none")

    def at(reached: str) -> None:
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(SandboxHost(plan, around, at=at, started=partial(at, "ready")).start())


@pytest.mark.parametrize("step", [*AGENT, *LAUNCH, *NETWORK])
def test_killed_at(step: str, own: OwnEngine, docker_engine: Engine):
    """The sweep of the node removes what is there; while the lease lives it keeps the container."""
    # A network needs the firewall, which only the shared engine has.
    engine = docker_engine if step in NETWORK else own.connect()
    binary = agent_binary(engine.architecture).read_bytes()
    if step in AGENT:
        remove_agent(engine, binary)
    cluster = uuid.uuid4().hex
    process = start_python(
        "import sys; from tests.sandboxes.test_interrupted import die_at; die_at(*sys.argv[1:])",
        cluster,
        step,
        env={} if step in NETWORK else {"DOCKER_HOST": own.host},
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert left_of(engine, cluster) or step == "create"
    sweep(engine, lambda: [SESSION], cluster, "tests")
    assert not any(f"-{process.pid}-" in link.name for link in abandoned_links())
    assert len(engine.list_containers({CLUSTER: cluster})) == (step in LAUNCH[1:]) + (
        step in AGENT[1:]
    )
    sweep(engine, list, cluster, "tests")
    if step not in NETWORK:
        remove_agent(engine, binary)  # the volume of the whole engine, which stays
        assert left_of(engine, cluster) == []
        engine.close()
    assert left_of_sessions(docker_engine, cluster) == []


def leave_session(cluster: str) -> None:
    """Have the process of a named session die when it is ready."""
    process = start_python(
        "import sys; from tests.sandboxes.test_interrupted import die_at; die_at(*sys.argv[1:])",
        cluster,
        "ready",
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors


def test_a_process_that_cannot_bring_its_session_back_at_once_tries_again(docker_engine: Engine):
    """What stands in the way may pass; until then the files are not given up."""
    cluster = uuid.uuid4().hex
    leave_session(cluster)
    plan, around = named_session(cluster, "none")
    in_the_way: list[Exception] = [ConnectionError("the GCS is away")]

    def started() -> None:
        if in_the_way:
            raise in_the_way.pop()

    async def come_back() -> None:
        again = SandboxHost(plan, around, restarted=True, was_ready=True, started=started)
        [container] = docker_engine.list_containers({CLUSTER: cluster})
        with pytest.raises(SandboxStartError, match="the GCS is away"):
            await again.start()
        core = await again.core()
        await core.write(b"file", b"content", False, False)
        assert again.status()["container_id"] == container.id
        await again.stop()
        assert again.left_nothing

    async def give_up() -> None:
        in_the_way[:] = [ConnectionError("the GCS is away")]
        again = SandboxHost(plan, around, restarted=True, was_ready=True, started=started)
        with pytest.raises(SandboxStartError, match="the GCS is away"):
            await again.start()
        await again.stop()

    asyncio.run(come_back())
    assert left_of_sessions(docker_engine, cluster) == []
    leave_session(cluster)
    asyncio.run(give_up())
    assert left_of_sessions(docker_engine, cluster) == []


def test_killed_while_the_firewall_is_set(docker_engine: Engine):
    """In the host's network a container helps with that: it goes, too."""
    cluster = uuid.uuid4().hex
    process = start_python(
        "import sys; from tests.sandboxes.test_interrupted import die_at; die_at(*sys.argv[1:])",
        cluster,
        "network-rules",
    )
    eventually(lambda: docker_engine.list_containers({CLUSTER: cluster}))
    process.kill()
    process.communicate()
    sweep(docker_engine, list, cluster, "tests")
    assert left_of_sessions(docker_engine, cluster) == []


@pytest.mark.parametrize("how", ["restarted", "killed", "restarted with live-restore"])
def test_engine(how: str, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Its sessions are lost and say so at once, also while it is away; a sweep clears the rest."""
    with own_engine(docker_engine, *(["--live-restore"] if "live-restore" in how else [])) as own:
        monkeypatch.setenv("DOCKER_HOST", own.host)
        backend = DirectEngine()
        previous = use_client(backend)
        try:
            sandbox = App("leaks").sandbox(name="s", image=IMAGE, cpu=0, memory_mb=128)
            sessions = [sandbox.create(), sandbox.named("n")]
            for session in sessions:
                session.exec("sleep 1000 &", shell=True)
            own.stop(signal.SIGKILL if how == "killed" else signal.SIGTERM)
            began = time.monotonic()
            with pytest.raises(SandboxLostError, match=r"engine|killed or removed"):
                sessions[0].exec("true")
            own_start_first = how == "killed"
            if own_start_first:
                own.start()
            with pytest.raises(SandboxLostError, match=r"engine|killed or removed"):
                sessions[1].exec("true")
            sessions[0].close()
            assert time.monotonic() - began < 20
            if not own_start_first:
                own.start()
            sessions[1].close()
            with pytest.raises(SandboxClosedError):
                sessions[1].exec("true")
            with sandbox.create() as fresh:
                assert fresh.exec("echo on", shell=True).stdout == "on\n"
            engine = own.connect()
            # What was closed while nobody could see it removed is known to need a sweep.
            told = [ref.host.left_nothing for ref in backend.opened]
            assert told == [own_start_first, True, True]
            sweep(engine, list, backend.cluster_id, "tests")
            assert left_of_sessions(engine, backend.cluster_id) == []
            engine.close()
        finally:
            use_client(previous)
            backend.disconnect()
