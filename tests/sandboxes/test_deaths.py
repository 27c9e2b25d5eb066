"""A cluster dies whole, without notice, and the next one removes what it left; or its engine does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from ray_backend.names import NAMESPACE
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import CLUSTER, OWNER
from tests.docker.support import BUSYBOX, new_owner
from tests.sandboxes.left import left_of_sessions
from tests.sandboxes.own_engine import own_engine
from tests.support import (
    eventually,
    finish,
    process_is_gone,
    processes_of_run,
    read_line,
    running,
    start_driver,
)

pytestmark = pytest.mark.ray

DOOMED = "APOTHIC_TEST_DOOMED"
"""In the environment of all processes of the cluster that is to die."""

DEFINITION = f"""
from apothic import Image
from apothic.backend import connect

base = dict(image=Image.from_registry({BUSYBOX!r}), cpu=0, memory_mb=128)
app = App("deaths")
sandbox = app.sandbox(name="s", **base)
online = app.sandbox(name="i", network="internet", **base)
"""


def kill_all(processes: list[int]) -> None:
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none may see another die
        for pid in processes:
            os.kill(pid, number)
    eventually(lambda: all(process_is_gone(pid) for pid in processes))


def test_the_next_cluster_sweeps(
    tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(DOOMED, mark)
    opening = f"""{DEFINITION}
sessions = [sandbox.named("n"), sandbox.create(), online.create()]
print("IDS", connect().cluster_id, *[s.inspect().container_id for s in sessions], flush=True)
sys.stdin.read()
"""
    with running(start_driver(tmp_path, opening, tmp_path)) as driver:
        dead, named, *unnamed = read_line(driver, "IDS").split()
        kill_all(list(processes_of_run(DOOMED, mark)))
    monkeypatch.delenv(DOOMED)
    eventually(lambda: not any(docker_engine.inspect(each) for each in unnamed))
    found = docker_engine.inspect(named)
    assert found is not None
    assert found.running
    assert len(left_of_sessions(docker_engine, dead)) == 2  # that one, and the network

    # This process stands in for the raylet of another cluster, which lives.
    living = new_owner("deaths:~s:n", namespace=NAMESPACE).as_labels()
    strangers = {
        "living": living,
        "foreign": {name: text for name, text in found.labels.items() if name != OWNER},
    }
    made = {
        name: docker_engine.api.create_container(BUSYBOX, "sleep 1000", labels=labels)["Id"]
        for name, labels in strangers.items()
    }
    try:
        closing = f"""{DEFINITION}
session, kept = sandbox.create(), sandbox.named("kept")
print("UP", connect().cluster_id, flush=True)
sys.stdin.read()
assert session.exec("true").ok
"""
        with running(start_driver(tmp_path, closing, tmp_path)) as driver:
            ours = read_line(driver, "UP")
            assert ours != dead
            eventually(lambda: docker_engine.inspect(named) is None)
            foreign = docker_engine.inspect(made["foreign"])
            assert foreign is not None
            eventually(lambda: left_of_sessions(docker_engine, dead) == [foreign.name])
            finish(driver)
        assert left_of_sessions(docker_engine, ours) == []
        assert all(docker_engine.inspect(each) is not None for each in made.values())
    finally:
        for each in made.values():
            docker_engine.remove(each)
    assert left_of_sessions(docker_engine, dead) == []


def test_a_cluster_ends_with_its_driver(
    tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Killed, the driver takes its cluster along, and that its sessions, named ones as well."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(DOOMED, mark)
    opening = f"""{DEFINITION}
sessions = [sandbox.named("n"), online.named("n"), sandbox.create()]
print("CLUSTER", connect().cluster_id, flush=True)
sys.stdin.read()
"""
    with running(start_driver(tmp_path, opening, tmp_path)) as driver:
        cluster = read_line(driver, "CLUSTER")
        driver.kill()
        driver.wait()
        try:
            eventually(lambda: not left_of_sessions(docker_engine, cluster))
        except AssertionError:
            raise AssertionError(left_of_sessions(docker_engine, cluster)) from None
        # Ray's own agents give the GCS, which is dead as well, half a minute.
        eventually(lambda: not processes_of_run(DOOMED, mark), 120)


def test_an_engine_that_was_away(
    tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Sessions are lost, and closed while nobody can see them removed: the manager sees to it later."""
    body = f"""{DEFINITION}
from apothic.errors import SandboxLostError
sessions = [sandbox.create(), sandbox.named("n")]
print("UP", connect().cluster_id, flush=True)
sys.stdin.readline()
for session in sessions:
    try:
        session.exec("true")
    except SandboxLostError as error:
        print("LOST", error, flush=True)
    session.close()
print("CLOSED", flush=True)
sys.stdin.readline()
with sandbox.named("n") as again:
    print("AGAIN", again.exec("echo on", shell=True).stdout, flush=True)
"""

    def go_on(driver: subprocess.Popen[str]) -> None:
        assert driver.stdin is not None
        driver.stdin.write("\n")
        driver.stdin.flush()

    with own_engine(docker_engine) as own:
        monkeypatch.setenv("DOCKER_HOST", own.host)
        with running(start_driver(tmp_path, body, tmp_path)) as driver:
            cluster = read_line(driver, "UP")
            own.stop(signal.SIGKILL)
            go_on(driver)
            assert "engine" in read_line(driver, "LOST")
            assert "engine" in read_line(driver, "LOST")
            read_line(driver, "CLOSED")
            own.start()
            with contextlib.closing(own.connect()) as engine:
                assert len(engine.list_containers({CLUSTER: cluster})) == 1  # the named one's
                eventually(lambda: not engine.list_containers({CLUSTER: cluster}), 40)
            go_on(driver)
            assert read_line(driver, "AGAIN") == "on"
            finish(driver)
