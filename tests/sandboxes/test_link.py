"""The socket beside the engine's streams: what is left of it, and doing without."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apothic import App, Sandbox
from apothic.backend import use_client
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.link import LinkOffer
from ray_backend.sandbox.host import SandboxHost
from tests.conformance.sandboxes.base import SMALL
from tests.docker.support import left_of
from tests.sandboxes.direct import DirectEngine, DirectRef
from tests.sandboxes.test_direct import IMAGE


@pytest.fixture
def engine(docker_engine: Engine) -> Iterator[DirectEngine]:
    engine = DirectEngine()
    previous = use_client(engine)
    yield engine
    use_client(previous)
    engine.disconnect()
    assert left_of(docker_engine, engine.cluster_id) == []


@pytest.fixture
def sandbox(engine: DirectEngine) -> Sandbox:
    return App("link").sandbox(name="s", image=IMAGE, **SMALL)


def offers() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"apothic-link-{_own_pid()}-*"))


def _own_pid() -> int:
    return int(Path("/proc/self").resolve().name)


def is_linked(engine: DirectEngine) -> bool:
    container = engine.opened[-1].host._container
    assert container is not None
    return container.direct is not None


def test_an_engine_on_this_machine_gives_a_link_and_nothing_of_it_is_left(
    engine: DirectEngine, sandbox: Sandbox
) -> None:
    with sandbox.create() as session:
        assert is_linked(engine)
        assert offers() == []
        listed = session.exec(["ls", "-A", "/.apothic-link"]).check()
        assert listed.stdout == ""


def test_without_a_link_the_engines_streams_do_all(
    engine: DirectEngine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkOffer, "make", lambda engine: None)
    with sandbox.create() as session:
        assert not is_linked(engine)
        session.write_bytes("/tmp/f", b"x" * 5_000_000)
        assert session.read_bytes("/tmp/f") == b"x" * 5_000_000


def test_an_agent_that_cannot_connect_uses_the_engines_streams(
    engine: DirectEngine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkOffer, "file_name", "missing")
    with sandbox.create() as session:
        assert not is_linked(engine)
        assert session.exec(["echo", "on"]).stdout == "on\n"
    assert offers() == []


def test_an_engine_that_does_not_see_the_directory_does_without(
    engine: DirectEngine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(LinkOffer):
        def __init__(self) -> None:
            super().__init__()
            self.close()

    monkeypatch.setattr(LinkOffer, "make", lambda engine: Elsewhere())
    with sandbox.create() as session:
        assert not is_linked(engine)
        assert session.exec(["echo", "on"]).stdout == "on\n"


def test_a_named_session_whose_process_died_goes_on_over_the_engines_streams(
    engine: DirectEngine, sandbox: Sandbox
) -> None:
    session = sandbox.named("kept")
    session.write_text("/tmp/f", "kept")
    first = engine.opened[-1]
    container = first.host._container
    assert container is not None
    assert container.direct is not None

    async def die() -> None:
        assert container.direct is not None
        container.direct.abort()
        container.stream.abort()

    first._loop.run(die())
    plan = first.plan
    second = DirectRef(engine, plan, named=True)
    second.host = SandboxHost(plan, engine.around(plan), was_ready=True)
    engine.opened.append(second)
    second.wait_ready()
    assert second.call("read", b"/tmp/f", 100).result() == b"kept"
    assert not is_linked(engine)
