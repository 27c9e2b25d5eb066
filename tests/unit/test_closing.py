"""A close that failed: verbs stay refused, and it can be called again until all of it is closed."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apothic import App, SandboxSession, method
from apothic.errors import BackendError, InstanceClosedError, SandboxClosedError, SandboxError
from apothic.local_session import CoreRef
from apothic.local_session.workspace import LocalWorkspace
from apothic.testing import FakeControlPlane, fake_engine
from apothic.testing.instance import FakeInstance
from apothic.values import CloseReport
from tests.support import interrupted_in

app = App("closing")
SHELL = app.sandbox(name="shell")


@app.cls(max_containers=3, tasks_per_container=1)
class Pooled:
    @method()
    def wait(self, path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)


@pytest.fixture
def engine() -> Iterator[FakeControlPlane]:
    with fake_engine() as engine:
        yield engine


@pytest.fixture(params=["local", "create"])
def session(request: pytest.FixtureRequest, engine: FakeControlPlane) -> SandboxSession:
    opened: SandboxSession = getattr(SHELL, request.param)()
    return opened


def test_a_session_that_its_engine_fails_to_close(
    session: SandboxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: CoreRef) -> CloseReport:
        raise BackendError("the cluster does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(type(session._ref), "close", fail)
        for _ in range(2):
            with pytest.raises(BackendError, match="does not answer"):
                session.close()
            assert session.closed
            with pytest.raises(SandboxClosedError):
                session.pwd()
    assert session.close().closed is True
    assert session.close().closed is False


def test_a_session_whose_programs_do_not_die(
    session: SandboxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalWorkspace.close

    async def close(self: LocalWorkspace) -> None:
        await real(self)
        raise SandboxError("not dead yet.")

    with monkeypatch.context() as patch:
        patch.setattr(LocalWorkspace, "close", close)
        for _ in range(2):
            with pytest.raises(SandboxError, match="not dead"):
                session.close()
            with pytest.raises(SandboxClosedError):
                session.exec("true")
    assert session.close().closed is True
    assert session.close().closed is False


def test_an_interrupted_close_of_a_session(
    session: SandboxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, go_on = LocalWorkspace.close, threading.Event()

    async def close(self: LocalWorkspace) -> None:
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        await real(self)

    monkeypatch.setattr(LocalWorkspace, "close", close)
    with interrupted_in("close"), pytest.raises(KeyboardInterrupt):
        session.close()
    go_on.set()
    assert session.close().closed is True
    assert session.close().closed is False


def test_replicas_that_fail_to_close_are_closed_by_the_next_try(
    engine: FakeControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, gate = Pooled.bind(), tmp_path / "gate"
    jobs = [pool.wait.spawn(str(gate)) for _ in range(3)]
    assert len(engine.list_instances()) == 3
    gate.touch()
    for job in jobs:
        job.get()
    real, tries = FakeInstance.close, []

    def close(self: FakeInstance) -> CloseReport:
        tries.append(self)
        if len(tries) <= 2:
            raise BackendError("the cluster does not answer.")
        return real(self)

    monkeypatch.setattr(FakeInstance, "close", close)
    with pytest.raises(BackendError):
        pool.close()
    assert len(engine.list_instances()) == 2
    assert pool.closed
    with pytest.raises(InstanceClosedError):
        pool.wait.remote(str(gate))
    assert pool.close().closed is True
    assert engine.list_instances() == []
    assert [tries.count(each) for each in dict.fromkeys(tries)] == [2, 2, 1]
    assert pool.close() == CloseReport(closed=False, note="it was closed before")


def test_the_next_try_leaves_alone_what_others_have_opened_since(
    engine: FakeControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: FakeInstance) -> CloseReport:
        raise BackendError("the cluster does not answer.")

    first, other = Pooled.bind(), Pooled.bind()
    handle = first.handle
    with monkeypatch.context() as patch:
        patch.setattr(FakeInstance, "close", fail)
        with pytest.raises(BackendError):
            first.close()
    engine.kill(handle)
    other.wait.remote("/")  # another instance, of the same name
    first.close()
    assert [info.state for info in engine.list_instances()] == ["ready"]
    assert other.close().closed
    assert engine.list_instances() == []
