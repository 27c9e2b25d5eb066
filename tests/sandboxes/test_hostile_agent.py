"""Sessions whose agent is hostile: each ends with a typed error, and nothing of it is left."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apothic import App
from apothic.backend import use_client
from apothic.errors import SandboxClosedError, SandboxLostError, SandboxStartError
from apothic.session import SandboxSession
from ray_backend.sandbox import containers
from ray_backend.sandbox.channel import operations
from ray_backend.sandbox.engine.agent_volume import ensure_agent, remove_agent
from ray_backend.sandbox.engine.connection import Engine
from tests.docker.support import left_of, new_owner
from tests.sandboxes.direct import DirectEngine
from tests.sandboxes.hostile_agent import AT_START, ON_EXEC, hostile_program
from tests.sandboxes.test_direct import IMAGE
from tests.support import eventually

GROWTH_BYTES = 48 * 1024**2


@pytest.fixture(scope="module")
def program(docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a file with the hostile program, whose volume is there."""
    path = tmp_path_factory.mktemp("hostile") / "agent"
    path.write_bytes(hostile_program())
    ensure_agent(docker_engine, path.read_bytes(), new_owner())
    yield path
    remove_agent(docker_engine, path.read_bytes())


@pytest.fixture
def engine(
    docker_engine: Engine, program: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DirectEngine]:
    monkeypatch.setattr(containers, "agent_binary", lambda architecture: program)
    engine = DirectEngine()
    previous = use_client(engine)
    yield engine
    use_client(previous)
    engine.disconnect()
    assert left_of(docker_engine, engine.cluster_id) == []


Opener = Callable[[str], SandboxSession]


@pytest.fixture
def opening(engine: DirectEngine, monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Give a function that opens a session whose agent does what is said."""

    def opening(does: str) -> SandboxSession:
        # The hostile program's first argument, in the place of the agent's.
        monkeypatch.setattr(containers, "DIE_ON_EOF", does)
        options = {"image": IMAGE, "cpu": 0, "memory_mb": 128, "timeout_s": 30}
        return App("hostile").sandbox(name="s", **options).create()

    return opening


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "ANSWER_LIMIT_S", 1.0)


@pytest.fixture
def bounded() -> Iterator[None]:
    """See that this process, which is the actor's here, has not grown."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory_bytes("VmRSS")
    yield
    assert _memory_bytes("VmHWM") - before < GROWTH_BYTES


def _memory_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def check_lost(session: SandboxSession, engine: DirectEngine, docker: Engine) -> None:
    """See that a session is lost, says so to everybody, and that its container is gone."""
    (ref,) = engine.sessions.values()
    with pytest.raises(SandboxLostError):
        session.listdir("/")
    eventually(lambda: ref.native.state == "lost")
    eventually(lambda: left_of(docker, engine.cluster_id) == [])
    session.close()
    with pytest.raises(SandboxClosedError):
        session.listdir("/")


@pytest.mark.parametrize("does", list(AT_START))
def test_a_hostile_start(
    opening: Opener, engine: DirectEngine, docker_engine: Engine, bounded: None, does: str
) -> None:
    with pytest.raises((SandboxStartError, SandboxLostError), match=AT_START[does]):
        opening(does)
    assert left_of(docker_engine, engine.cluster_id) == []


@pytest.mark.parametrize("does", list(ON_EXEC))
def test_a_hostile_answer(
    opening: Opener, engine: DirectEngine, docker_engine: Engine, bounded: None, does: str
) -> None:
    session = opening(does)
    with contextlib.suppress(SandboxLostError):  # what came before the nonsense counts
        assert session.exec("true").ok
    with pytest.raises(SandboxLostError, match=ON_EXEC[does]):
        session.exec("true")
    check_lost(session, engine, docker_engine)


def test_a_hostile_answer_ends_all_that_waits(
    opening: Opener, engine: DirectEngine, docker_engine: Engine
) -> None:
    session = opening("deaf")
    with ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(session.listdir, "/"),
            pool.submit(session.read_bytes, "/file"),
            pool.submit(session.write_bytes, "/file", b"x"),
            pool.submit(session.exec, "true"),
        ]
        eventually(lambda: session.inspect().running_calls == len(waiting))
        docker_engine.kill(session.inspect().container_id or "")
        for one in waiting:
            assert isinstance(one.exception(30), SandboxLostError)
    check_lost(session, engine, docker_engine)


@pytest.mark.parametrize("verb", ["exists", "listdir", "read_bytes", "exec", "write", "upload"])
def test_an_agent_that_falls_silent(
    opening: Opener, engine: DirectEngine, docker_engine: Engine, impatient: None, verb: str
) -> None:
    session = opening("deaf")
    verbs: dict[str, Callable[[], object]] = {
        "exists": lambda: session.exists("/x"),
        "listdir": lambda: session.listdir("/x"),
        "read_bytes": lambda: session.read_bytes("/x"),
        "exec": lambda: session.exec("true", timeout_s=0.1),
        "write": lambda: session.write_bytes("/x", b"x"),
        "upload": lambda: session.write_bytes("/x", bytes(8_000_000)),
    }
    with pytest.raises(SandboxLostError, match="silent: no answer to a request in 1 s"):
        verbs[verb]()
    check_lost(session, engine, docker_engine)


def test_output_at_a_mad_rate_that_no_kill_ends(
    opening: Opener,
    engine: DirectEngine,
    docker_engine: Engine,
    impatient: None,
    bounded: None,
) -> None:
    session = opening("bustle")
    begin = time.monotonic()
    with pytest.raises(SandboxLostError, match="silent"):
        session.exec("true", timeout_s=1, max_output_bytes=1_000_000)
    assert time.monotonic() - begin < 60
    check_lost(session, engine, docker_engine)


def test_no_greeting(opening: Opener, engine: DirectEngine, docker_engine: Engine) -> None:
    begin = time.monotonic()
    with pytest.raises(SandboxStartError, match="has not answered in 10 s"):
        opening("endless noise")
    assert time.monotonic() - begin < 40
    assert left_of(docker_engine, engine.cluster_id) == []
