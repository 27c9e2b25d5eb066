"""What a shell sees of the `apothic` command: its streams and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apothic import App, Image, Volume, method
from ray_backend.sandbox.engine.connection import Engine
from tests.support import driver_env

pytestmark = pytest.mark.ray

APOTHIC = Path(sys.executable).with_name("apothic")


def run(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [APOTHIC, *words],
        env=driver_env(address),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def test_output_is_the_answer_and_nothing_else(ray_cluster: str) -> None:
    Volume.create("cli-process", backend="vast_local", size_gb=2)
    listed = run(ray_cluster, "volumes", "list", "--json")
    assert (listed.returncode, listed.stderr) == (0, "")
    found = {"name": "cli-process", "backend": "vast_local", "size_gb": 2.0}
    assert found in json.loads(listed.stdout)
    deleted = run(ray_cluster, "volumes", "delete", "cli-process")
    assert (deleted.returncode, deleted.stderr) == (0, "")
    assert deleted.stdout == "deleted volume cli-process\n"
    again = run(ray_cluster, "volumes", "delete", "cli-process")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("apothic: volume 'cli-process' does not exist")
    assert again.stderr.count("\n") == 1


def test_looking_at_a_leased_instance_neither_ends_nor_keeps_it(ray_cluster: str) -> None:
    app = App("cli-process")

    class Leased:
        @method()
        def ping(self) -> str:
            return "pong"

    with app.cls(cpu=0, memory_mb=10)(Leased).new() as instance:
        seen = run(ray_cluster, "inspect", f"cli-process:Leased:{instance.id}")
        assert json.loads(seen.stdout)["named"] is False
        assert instance.ping.remote() == "pong"
    gone = run(ray_cluster, "instances", "cli-process", "--json")
    assert json.loads(gone.stdout) == []


@pytest.mark.docker
def test_looking_at_a_leased_session_neither_ends_nor_keeps_it(
    ray_cluster: str, docker_engine: Engine
) -> None:
    image = Image.from_registry("apothic-test-busybox")
    box = App("cli-process").sandbox(name="box", cpu=0, memory_mb=64, image=image)
    with box.create(cwd="/work") as session:
        seen = run(ray_cluster, "sandboxes", "inspect", f"cli-process:box:{session.id}")
        info = json.loads(seen.stdout)
        assert (info["named"], info["cwd"]) == (False, "/work")
        assert session.exec("echo on", shell=True).stdout == "on\n"
    assert run(ray_cluster, "sandboxes").stdout == "no session lives\n"


def test_a_secret_is_no_argument(ray_cluster: str) -> None:
    refused = run(ray_cluster, "secrets", "create", "CLI_PROCESS", "the value itself")
    assert refused.returncode == 2
    empty = run(ray_cluster, "secrets", "create", "CLI_PROCESS")
    assert empty.returncode == 1
    assert "is empty" in empty.stderr
