"""The `apothic` command against a live cluster, started as a shell would where that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from apothic import App, Cls, Image, Secret, Volume, exit, method
from apothic.cli import main
from apothic.errors import SandboxClosedError
from ray_backend.sandbox.engine.connection import Engine
from tests.support import driver_env, eventually

pytestmark = pytest.mark.ray

APOTHIC = Path(sys.executable).with_name("apothic")

app = App("cli-tests")


@app.cls(cpu=0, memory_mb=10, tags=["fast", "small"], metadata={"team": "search"})
class Shelf:
    @method()
    def pid(self) -> int:
        return os.getpid()

    @exit()
    def tidy(self) -> None:
        pass


@app.cls(cpu=10_000)
class Huge:
    @method()
    def work(self) -> None: ...


bench = app.sandbox(
    name="bench",
    cpu=0,
    memory_mb=64,
    image=Image.from_registry("apothic-test-busybox"),
    tags=["slow"],
)


def said(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    """Run the command; give what it wrote, to standard error if it is to fail."""
    capsys.readouterr()
    assert main(argv) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_apps_and_instances(ray_cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    deployment = app.deploy()
    out = said(capsys, "apps")
    listed = [line.split() for line in out.splitlines()]
    assert ["cli-tests:Shelf", "class", "fast,small", deployment] in listed
    assert ["cli-tests:bench", "sandbox", "slow", deployment] in listed
    [each] = [
        each for each in json.loads(said(capsys, "--json", "apps")) if each["app"] == "cli-tests"
    ]
    assert each["classes"] == {"Shelf": ["fast", "small"], "Huge": []}
    assert each["sandboxes"] == {"bench": ["slow"]}

    shelf = Shelf.named("a:b")
    try:
        before = shelf.pid.remote()
        [line] = [
            line.split()
            for line in said(capsys, "instances", "cli-tests:Shelf").splitlines()
            if "a:b" in line
        ]
        assert line[:5] == ["cli-tests:Shelf:a:b", "named", "ready", "0", str(before)]
        assert line[-1] == "fast,small"
        assert said(capsys, "instances", "another-app") == "no instance lives\n"

        os.kill(before, signal.SIGKILL)
        eventually(lambda: _pid(shelf) not in (None, before))
        [info] = json.loads(said(capsys, "instances", "cli-tests", "--json"))
        assert (info["restarts"], info["tags"]) == (1, ["fast", "small"])

        info = json.loads(said(capsys, "inspect", "cli-tests:Shelf:a:b"))
        assert info["pid"] == shelf.pid.remote()
        assert info["metadata"] == {"team": "search"}
        assert info["finished_calls"] >= 1

        out = said(capsys, "close", "cli-tests:Shelf:a:b")
        assert out.startswith("closed cli-tests:Shelf:a:b\n  exit hook tidy: done")
        assert "does not live" in said(capsys, "close", "cli-tests:Shelf:a:b", status=1)
    finally:
        shelf.close()


def _pid(shelf: object) -> int | None:
    try:
        return shelf.pid.remote()  # type: ignore[attr-defined, no-any-return]
    except Exception:  # between the kill and the restart
        return None


def test_inspect_classes_and_apps(ray_cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    app.deploy()
    shelf = json.loads(said(capsys, "inspect", "cli-tests:Shelf"))
    assert shelf["exit_hook_names"] == ["tidy"]
    assert [each["name"] for each in shelf["methods"]] == ["pid"]
    assert set(json.loads(said(capsys, "inspect", "cli-tests"))["classes"]) == {"Shelf", "Huge"}


@pytest.mark.docker
def test_sandboxes(
    ray_cluster: str, docker_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    app.deploy()
    assert said(capsys, "sandboxes", "list", "cli-tests") == "no session lives\n"
    named, leased = bench.named("a:b"), bench.create()
    lines = [line.split() for line in said(capsys, "sandboxes").splitlines()]
    assert lines[0] == ["SESSION", "LIVES", "STATE", "RESTARTS", "NODE", "NETWORK"]
    assert ["cli-tests:bench:a:b", "named", "ready", "0"] in [line[:4] for line in lines]
    assert [f"cli-tests:bench:{leased.id}", "leased", "ready", "0"] in [line[:4] for line in lines]
    found = json.loads(said(capsys, "sandboxes", "list", "cli-tests:bench", "--json"))
    assert {info["sandbox_id"] for info in found} == {"a:b", leased.id}
    assert said(capsys, "instances", "cli-tests") == "no instance lives\n"

    info = json.loads(said(capsys, "sandboxes", "inspect", "cli-tests:bench:a:b"))
    assert info["container_id"] == named.inspect().container_id
    assert (info["named"], info["network"], info["cwd"]) == (True, "none", "/")
    definition = json.loads(said(capsys, "sandboxes", "inspect", "cli-tests:bench"))
    assert set(definition["sessions"]) == {"a:b", leased.id}

    for session in (named, leased):
        name = f"cli-tests:bench:{session.id}"
        assert said(capsys, "sandboxes", "close", name) == f"closed {name}\n"
        assert "does not live" in said(capsys, "sandboxes", "close", name, status=1)
        with pytest.raises(SandboxClosedError):
            session.exec("true")
    assert said(capsys, "sandboxes", "list", "cli-tests") == "no session lives\n"


def test_offers(ray_cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    app.deploy()
    assert "free now" in said(capsys, "offers")
    assert "cpu=0" in said(capsys, "offers", "--for", "cli-tests:Shelf")
    assert "cpu=0" in said(capsys, "offers", "--for", "cli-tests:bench")
    assert "no node can ever run cpu=10000" in said(capsys, "offers", "--for", "cli-tests:Huge")


def test_node_types_are_registered(
    ray_cluster: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "available_node_types:\n"
        "  cli-type: {resources: {CPU: 4, memory: 8589934592, 'offer:cli-type': 1}}\n"
    )
    assert said(capsys, "offers", "register", str(file)) == "registered cli-type\n"
    try:
        assert "cli-type" in said(capsys, "offers")
    finally:
        assert said(capsys, "offers", "unregister", "cli-type") == "unregistered cli-type\n"
    assert "registered are none" in said(capsys, "offers", "unregister", "cli-type", status=1)
    assert "cannot be read" in said(capsys, "offers", "register", str(file) + "x", status=1)


def test_secrets_come_from_outside_the_command_line(
    ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "correct horse battery staple"
    run = subprocess.run(
        [APOTHIC, "secrets", "create", "CLI_TOKEN"],
        env=driver_env(ray_cluster),
        input=value + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    try:
        assert value not in run.stdout + run.stderr
        assert "CLI_TOKEN" in said(capsys, "secrets", "list").split()
        assert _stored("CLI_TOKEN") == {"CLI_TOKEN": value}
        # Another value, under two names, from the environment.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLI_USER", "ada")
            patch.setenv("CLI_PASSWORD", value)
            names = ["--from-env", "CLI_USER", "--from-env", "CLI_PASSWORD"]
            err = said(capsys, "secrets", "create", "CLI_TOKEN", *names, status=1)
            assert "exists already" in err
            assert value not in err
            said(capsys, "secrets", "create", "CLI_TOKEN", *names, "--replace")
        assert _stored("CLI_TOKEN") == {"CLI_USER": "ada", "CLI_PASSWORD": value}
    finally:
        assert said(capsys, "secrets", "delete", "CLI_TOKEN") == "deleted secret CLI_TOKEN\n"
    assert "is not stored" in said(capsys, "secrets", "delete", "CLI_TOKEN", status=1)
    assert "no such variable" in said(
        capsys, "secrets", "create", "X", "--from-env", "CLI_NOT_SET", status=1
    )


def _stored(name: str) -> dict[str, str] | None:
    from ray_backend.registry import Registry

    return Registry().get_secret(name)


def test_volumes(ray_cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    volume = Volume.create("cli-volume", backend="vast_local", size_gb=2)
    try:
        assert ["cli-volume", "vast_local", "2"] in [
            line.split() for line in said(capsys, "volumes").splitlines()
        ]
    finally:
        volume.delete()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["inspect", "nothing-here"], "no app 'nothing-here' is deployed"),
        (["inspect", "cli-tests:Nobody"], "has no class 'Nobody'"),
        (["inspect", "a::b"], "takes APP[:CLASS[:ID]]"),
        (["close", "cli-tests:Shelf"], "names no instance"),
        (["close", "cli-tests:Shelf:nobody"], "does not live"),
        (["offers", "--for", "cli-tests"], "names no class or sandbox"),
        (["sandboxes", "inspect", "cli-tests"], "names no sandbox"),
        (["sandboxes", "inspect", "cli-tests:nothing"], "has no sandbox 'nothing'"),
        (["sandboxes", "inspect", "cli-tests:bench:nobody"], "does not live"),
        (["sandboxes", "close", "cli-tests:bench"], "names no session"),
        (["sandboxes", "list", "a:b:c"], "takes APP[:SANDBOX]"),
        (["instances", "a:b:c"], "takes APP[:CLASS]"),
    ],
)
def test_failures_are_one_sentence(
    ray_cluster: str, capsys: pytest.CaptureFixture[str], argv: list[str], text: str
) -> None:
    app.deploy()
    err = said(capsys, *argv, status=1)
    assert err.startswith("apothic: ")
    assert text in err
    assert err.count("\n") == 1


def test_no_cluster_is_started_by_looking() -> None:
    run = subprocess.run(
        [APOTHIC, "apps", "--base-url", "127.0.0.1:9"],
        env=driver_env(None),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("apothic: no Ray cluster answers at 127.0.0.1:9")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("argv", [[], ["apps", "--what"], ["secrets"], ["close"]])
def test_wrong_usage_is_status_two(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2


def test_instances_of_apps_that_are_not_deployed(
    ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They can be listed and closed by their names all the same."""
    other = App("cli-undeployed")

    @other.cls(cpu=0, memory_mb=10)
    class Loose:
        @method()
        def work(self) -> None: ...

    Loose.named("x")
    assert "cli-undeployed:Loose:x" in said(capsys, "instances")
    with pytest.raises(LookupError):
        Cls.from_name("cli-undeployed", "Loose")
    said(capsys, "close", "cli-undeployed:Loose:x")
    assert said(capsys, "instances", "cli-undeployed") == "no instance lives\n"


def test_a_secret_of_the_api_is_listed(
    ray_cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = Secret.create("CLI_OTHER", "x")
    assert "CLI_OTHER" in json.loads(said(capsys, "secrets", "list", "--json"))
    secret.delete()
