"""Sessions between processes: definitions looked up, handles passed along, names and caps raced for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from apothic import App, Image, Sandbox, Secret, method
from apothic.backend import ControlPlaneClient, connect
from apothic.errors import SandboxLimitError, SandboxNotFoundError
from ray_backend.sandbox.engine.connection import Engine
from tests.conformance.sandboxes.base import SMALL
from tests.docker.support import left_of
from tests.sandboxes.test_direct import IMAGE
from tests.support import driver_env, eventually, finish, read_line, running

pytestmark = pytest.mark.ray

HEAD = """
import sys
from apothic import App, Image, Sandbox
"""


@pytest.fixture
def client(docker_engine: Engine, ray_cluster: str) -> Iterator[ControlPlaneClient]:
    client = connect()
    yield client
    eventually(lambda: not left_of(docker_engine, client.cluster_id))


@pytest.fixture
def driver(ray_cluster: str, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Give a function that starts another process, far from the source of these tests."""

    def start(body: str, *args: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", HEAD + body, *map(str, args)],
            cwd=tmp_path,
            env=driver_env(ray_cluster),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_definition_is_used_where_its_files_and_secrets_are_not(
    client: ControlPlaneClient, driver: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("from the definition")
    secret = Secret.create("sharing", {"TOKEN": "s3cret"})
    app = App("sharing-definitions")
    app.sandbox(
        name="work",
        image=IMAGE.add_local_dir(tmp_path / "data", "/data"),
        secrets=[secret],
        tags=["shared"],
        **SMALL,
    )
    app.deploy()
    (tmp_path / "data" / "file").unlink()
    body = """
with Sandbox.from_name("sharing-definitions", "work").create() as session:
    print("FILE", session.read_text("/data/file"))
    print("TOKEN", session.exec("echo $TOKEN", shell=True).stdout)
print("TAGS", *Sandbox.from_name("sharing-definitions", "work").tags)
"""
    out = finish(driver(body))
    assert "FILE from the definition" in out
    assert "TOKEN s3cret" in out
    assert "TAGS shared" in out
    with pytest.raises(SandboxNotFoundError, match="it has work"):
        Sandbox.from_name("sharing-definitions", "wrok")


def test_deploying_closes_sessions_of_older_definitions_on_demand(
    client: ControlPlaneClient,
) -> None:
    def define(memory_mb: int) -> tuple[App, Sandbox]:
        app = App("sharing-versions")
        return app, app.sandbox(name="work", image=IMAGE, cpu=0, memory_mb=memory_mb)

    app, old = define(256)
    app.deploy()
    session = old.named("kept")
    app, new = define(300)
    app.deploy()
    assert session.exec("true").ok
    app.deploy(close_outdated=True)
    eventually(lambda: not client.list_sandboxes("sharing-versions"))
    with new.named("kept") as fresh:
        limit = fresh.exec("cat /sys/fs/cgroup/memory.max || true", shell=True).stdout.strip()
        assert limit in ("", str(300 * 1000**2), str(300 * 1024**2))


def test_one_name_is_one_session_for_many_processes(
    client: ControlPlaneClient, driver: Callable[..., subprocess.Popen[str]]
) -> None:
    body = """
sandbox = App("sharing-names").sandbox(
    name="work", image=Image.from_registry(sys.argv[1]), cpu=0, memory_mb=256, max_containers=3,
)
session = sandbox.named("one")
print("ID", session.inspect().container_id)
session.write_text("/log", sys.argv[2] + "\\n", append=True)
"""
    with ExitStack() as stack:
        drivers = [
            stack.enter_context(running(driver(body, "apothic-test-debian", n))) for n in range(4)
        ]
        ids = {read_line(each, "ID") for each in drivers}
        for each in drivers:
            finish(each)
    assert len(ids) == 1
    (info,) = client.list_sandboxes("sharing-names")
    assert info.named
    session = App("sharing-names").sandbox(
        name="work", image=IMAGE, cpu=0, memory_mb=256, max_containers=3
    ).named("one")  # fmt: skip
    assert sorted(session.read_text("/log").split()) == ["0", "1", "2", "3"]
    session.close()


def test_the_cap_holds_between_processes(
    client: ControlPlaneClient, driver: Callable[..., subprocess.Popen[str]]
) -> None:
    body = """
from apothic.errors import SandboxLimitError
sandbox = App("sharing-cap").sandbox(
    name="work", image=Image.from_registry(sys.argv[1]), cpu=0, memory_mb=256,
    max_containers=3, tasks_per_container=1,
)
sessions, refused = [], 0
for _ in range(2):
    try:
        sessions.append(sandbox.create())
    except SandboxLimitError as error:
        assert "3 sessions" in str(error), error
        refused += 1
print("OPENED", len(sessions), refused, flush=True)
sys.stdin.readline()
"""
    with ExitStack() as stack:
        drivers = [
            stack.enter_context(running(driver(body, "apothic-test-busybox"))) for _ in range(3)
        ]
        counts = [[*map(int, read_line(each, "OPENED").split())] for each in drivers]
        assert sum(opened for opened, _ in counts) == 3
        assert sum(refused for _, refused in counts) == 3
        full = App("sharing-cap").sandbox(
            name="work", image=Image.from_registry("apothic-test-busybox"), cpu=0, memory_mb=256,
            max_containers=3, tasks_per_container=1,
        )  # fmt: skip
        with pytest.raises(SandboxLimitError):
            full.create()
        for each in drivers:
            each.communicate("\n", timeout=60)
    eventually(lambda: not client.list_sandboxes("sharing-cap"))
    full.create().close()


def test_a_session_is_passed_to_an_instance_and_outlives_its_first_holder(
    client: ControlPlaneClient, driver: Callable[..., subprocess.Popen[str]]
) -> None:
    app = App("sharing-handles")

    @app.cls(cpu=0, memory_mb=10)
    class Worker:
        @method()
        def take(self, session: object) -> str:
            self.session = session
            return session.exec("cat /left").stdout  # type: ignore[attr-defined,no-any-return]

        @method()
        def look(self) -> str:
            return self.session.exec("cat /left").stdout  # type: ignore[attr-defined,no-any-return]

    session = app.sandbox(name="work", image=IMAGE, **SMALL).create()
    session.write_text("/left", "by the driver")
    with Worker.new() as worker:
        assert worker.take.remote(session) == "by the driver"
        body = """
session = App("sharing-handles").sandbox(name="work").attach(sys.argv[1])
print("READ", session.read_text("/left"))
"""
        assert "READ by the driver" in finish(driver(body, session.handle_json))
        session._ref.release()  # as the end of this process would
        assert worker.look.remote() == "by the driver"
        assert len(client.list_sandboxes("sharing-handles")) == 1
    eventually(lambda: not client.list_sandboxes("sharing-handles"))
