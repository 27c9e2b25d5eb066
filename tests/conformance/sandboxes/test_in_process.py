"""The suites on the sandboxes that `apothic.testing` has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apothic import App, Image, Retries, Sandbox, Secret, Volume
from apothic.backend import SandboxRequest
from apothic.errors import AppNotFoundError, SandboxNotFoundError, SandboxStartError
from apothic.testing import FakeControlPlane, fake_engine
from tests.conformance.sandboxes.base import SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import InterruptConformance, KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance, SharedSessionConformance
from tests.conformance.sandboxes.volumes_of_data import DataConformance

__all__ = ["marked"]


class InProcess(SandboxSuite):
    @pytest.fixture
    def engine(self) -> Iterator[FakeControlPlane]:
        with fake_engine() as engine:
            yield engine
            assert engine.list_sandboxes() == []

    @pytest.fixture
    def python(self) -> str:
        return sys.executable


class TestInProcessExecs(InProcess, ExecConformance):
    pass


class TestInProcessFiles(InProcess, FileConformance):
    pass


class TestInProcessKills(InProcess, KillConformance, InterruptConformance):
    pass


class TestInProcessSessions(InProcess, SessionConformance, SharedSessionConformance):
    pass


class TestInProcessData(InProcess, DataConformance):
    pass


class TestDeployedSandboxes(InProcess):
    def test_looking_up(self, engine: FakeControlPlane) -> None:
        app = App("deployed")
        shell = app.sandbox(name="shell", network="internet", tags=["a"], metadata={"b": 1})
        deployment = app.deploy()
        found = Sandbox.from_name("deployed", "shell")
        assert (found.name, found.app_name, found.network) == ("shell", "deployed", "internet")
        assert (found.tags, found.metadata, found.options) == (("a",), {"b": 1}, shell.options)
        remote = App.lookup("deployed")
        assert remote.shell.spec == remote.get_sandbox("shell").spec == shell.spec
        assert list(remote.sandboxes) == list(remote.sandbox_names) == ["shell"]
        with pytest.raises(SandboxNotFoundError, match="shell"):
            Sandbox.from_name("deployed", "other")
        with pytest.raises(SandboxNotFoundError):
            remote.get_sandbox("other")
        with pytest.raises(AppNotFoundError):
            Sandbox.from_name("other", "shell")
        with found.create() as session:
            info = shell.inspect()
            assert info.sessions == (session.id,)
            assert (info.deployment_id, info.remote_only) == (deployment, False)
            assert found.inspect().remote_only
            assert shell.attach(session.handle).exec("true").ok
        assert "shell" in found.explain()

    def test_secrets_reach_execs_and_nothing_else(self, engine: FakeControlPlane) -> None:
        Secret.create("TOKEN", "hunter2")
        sandbox = App("deployed").sandbox(secrets=[Secret.from_name("TOKEN")])
        with sandbox.create(env={"OWN": "1"}) as session:
            assert session.exec("echo $TOKEN$OWN", shell=True).stdout == "hunter21\n"
            assert "hunter2" not in session.handle_json + repr(session) + str(session.inspect())
            assert "hunter2" not in str(sandbox.inspect()) + repr(sandbox)
            with sandbox.create(env={"TOKEN": None}) as without:
                assert "TOKEN" not in without.get_env()

    def test_a_secret_that_is_not_stored(self, engine: FakeControlPlane) -> None:
        sandbox = App("deployed").sandbox(secrets=[Secret.from_name("ABSENT")])
        with pytest.raises(SandboxStartError, match="ABSENT"):
            sandbox.create()
        assert engine.list_sandboxes() == []

    def test_opening_is_tried_again(self, engine: FakeControlPlane, monkeypatch: Any) -> None:
        opened, real = [], engine.start_sandbox

        class Failing:
            def wait_ready(self) -> None:
                raise SandboxStartError("not this time.")

        def start(request: SandboxRequest) -> Any:
            opened.append(request.sandbox_id)
            return Failing() if len(opened) < 3 else real(request)

        monkeypatch.setattr(engine, "start_sandbox", start)
        patient = App("deployed").sandbox(retries=Retries(2, initial_delay=0.01))
        with patient.create() as session:
            assert session.exec("true").ok
        assert len(set(opened)) == 3
        opened.clear()
        with pytest.raises(SandboxStartError):
            App("deployed").sandbox(name="once").create()
        assert len(opened) == 1

    def test_volumes_and_variables_of_the_image(
        self, engine: FakeControlPlane, tmp_path: Path
    ) -> None:
        mount = str(tmp_path / "data")
        sandbox = App("deployed").sandbox(
            image=Image.debian_slim().env(FROM="image"),
            volumes={mount: Volume.from_name("v", create_if_missing=True)},
        )
        with sandbox.create() as session:
            assert session.exec("echo $FROM", shell=True).stdout == "image\n"
            session.write_text(f"{mount}/file", "kept")
        assert not (tmp_path / "data").exists()
        with sandbox.create() as session:
            assert session.read_text(f"{mount}/file") == "kept"

    def test_deploying_closes_what_is_outdated(self, engine: FakeControlPlane) -> None:
        app = App("deployed")
        session = app.sandbox(name="shell").named("a")
        app.deploy(close_outdated=True)
        assert session.exec("true").ok
        newer = App("deployed")
        newer.sandbox(name="shell", cpu=2)
        newer.deploy(close_outdated=True)
        assert engine.list_sandboxes() == []
