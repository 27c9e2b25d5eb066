"""The suites on the sandboxes that `apothic.testing` has."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from apothic import App, AppManifest, Sandbox, Secret
from apothic.backend import (
    ControlPlaneClient,
    InstanceRef,
    SandboxRef,
    SandboxRequest,
    StartRequest,
    use_client,
)
from apothic.errors import (
    AppNotFoundError,
    SandboxNotFoundError,
    SandboxStartError,
    SecretNotFoundError,
)
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo, SandboxSpec
from apothic.testing.sandboxes import InProcessSandboxes
from apothic.values import ClassInstanceHandle, ClassSpec, InstanceInfo
from apothic.volume import StorageMount
from tests.conformance.sandboxes.base import SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance, SharedSessionConformance

__all__ = ["marked"]


class Engine(ControlPlaneClient):
    """A control plane with sandboxes alone."""

    def __init__(self) -> None:
        self.secrets: dict[str, Mapping[str, str]] = {}
        self.apps: dict[str, AppManifest] = {}
        self._id = f"test-{uuid.uuid4().hex}"
        self.sandboxes = InProcessSandboxes(self._id, self.find_secret)

    def find_secret(self, name: str) -> Mapping[str, str]:
        if name not in self.secrets:
            raise SecretNotFoundError(f"secret {name!r} is not stored.")
        return self.secrets[name]

    @property
    def cluster_id(self) -> str:
        return self._id

    @property
    def job_id(self) -> str:
        return "job"

    def deploy(
        self, manifest: AppManifest, blobs: Mapping[str, bytes], *, close_outdated: bool
    ) -> None:
        self.apps[manifest.name] = manifest

    def find_app(self, name: str) -> AppManifest:
        if name not in self.apps:
            raise AppNotFoundError(name)
        return self.apps[name]

    def list_apps(self) -> list[str]:
        return list(self.apps)

    def find_spec(self, digest: str) -> ClassSpec | None:
        return None

    def start(self, request: StartRequest) -> InstanceRef:
        raise NotImplementedError

    def attach(self, handle: ClassInstanceHandle) -> InstanceRef:
        raise NotImplementedError

    def list_instances(self, app: str | None = None, cls: str | None = None) -> list[InstanceInfo]:
        return []

    def put_secret(self, name: str, variables: Mapping[str, str], *, overwrite: bool) -> bool:
        self.secrets[name] = variables
        return True

    def list_secrets(self) -> list[str]:
        return list(self.secrets)

    def delete_secret(self, name: str) -> bool:
        return self.secrets.pop(name, None) is not None

    def ensure_volume(self, volume: StorageMount) -> None:
        raise NotImplementedError

    def list_volumes(self) -> list[StorageMount]:
        return []

    def delete_volume(self, name: str) -> bool:
        return False

    def explain(self, spec: ClassSpec | SandboxSpec) -> str:
        return f"{spec.name} runs here"

    def start_sandbox(self, request: SandboxRequest) -> SandboxRef:
        return self.sandboxes.start_sandbox(request)

    def attach_sandbox(self, handle: SandboxHandle) -> SandboxRef:
        return self.sandboxes.attach_sandbox(handle)

    def find_sandbox_spec(self, digest: str) -> SandboxSpec | None:
        return self.sandboxes.find_sandbox_spec(digest)

    def list_sandboxes(
        self, app: str | None = None, sandbox: str | None = None
    ) -> list[SandboxSessionInfo]:
        return self.sandboxes.list_sandboxes(app, sandbox)

    def disconnect(self) -> None:
        self.sandboxes.close_all()


class InProcess(SandboxSuite):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = Engine()
        previous = use_client(engine)
        try:
            yield engine
            assert engine.list_sandboxes() == []
        finally:
            use_client(previous)
            engine.disconnect()

    @pytest.fixture
    def python(self) -> str:
        return sys.executable


class TestInProcessExecs(InProcess, ExecConformance):
    pass


class TestInProcessFiles(InProcess, FileConformance):
    pass


class TestInProcessKills(InProcess, KillConformance):
    pass


class TestInProcessSessions(InProcess, SessionConformance, SharedSessionConformance):
    pass


class TestDeployedSandboxes(InProcess):
    def test_looking_up(self, engine: Engine) -> None:
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
        assert found.explain() == "shell runs here"

    def test_secrets_reach_execs_and_nothing_else(self, engine: Engine) -> None:
        Secret.create("TOKEN", "hunter2")
        sandbox = App("deployed").sandbox(secrets=[Secret.from_name("TOKEN")])
        with sandbox.create(env={"OWN": "1"}) as session:
            assert session.exec("echo $TOKEN$OWN", shell=True).stdout == "hunter21\n"
            assert "hunter2" not in session.handle_json + repr(session) + str(session.inspect())
            assert "hunter2" not in str(sandbox.inspect()) + repr(sandbox)
            with sandbox.create(env={"TOKEN": None}) as without:
                assert "TOKEN" not in without.get_env()

    def test_a_secret_that_is_not_stored(self, engine: Engine) -> None:
        sandbox = App("deployed").sandbox(secrets=[Secret.from_name("ABSENT")])
        with pytest.raises(SandboxStartError, match="ABSENT"):
            sandbox.create()
        assert engine.list_sandboxes() == []

    def test_opening_is_tried_again(self, engine: Engine, monkeypatch: Any) -> None:
        opened, real = [], engine.sandboxes.start_sandbox

        class Failing:
            def wait_ready(self) -> None:
                raise SandboxStartError("not this time.")

        def start(request: SandboxRequest) -> Any:
            opened.append(request.sandbox_id)
            return Failing() if len(opened) < 3 else real(request)

        monkeypatch.setattr(engine.sandboxes, "start_sandbox", start)
        from apothic import Retries

        patient = App("deployed").sandbox(retries=Retries(2, initial_delay=0.01))
        with patient.create() as session:
            assert session.exec("true").ok
        assert len(set(opened)) == 3
        opened.clear()
        with pytest.raises(SandboxStartError):
            App("deployed").sandbox(name="once").create()
        assert len(opened) == 1
