"""Nothing leaks: each way in which a session ends, or never comes to be; counted afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from apothic import App, Image, Sandbox, SandboxSession, Secret, Volume
from apothic.backend import ControlPlaneClient, connect
from apothic.errors import (
    ApothicError,
    ImageBuildError,
    ImageNotFoundError,
    PlacementError,
    SandboxClosedError,
    SandboxFileError,
    SandboxLostError,
    SandboxStartError,
)
from ray_backend.manager import instance_names
from ray_backend.names import MANAGER_NAME, NAMESPACE
from ray_backend.ray_api import actor_record
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import BUILD
from tests.docker.support import BUSYBOX
from tests.sandboxes.left import (
    left_by_sessions,
    left_of_builds,
    left_of_sessions,
    see_nothing_left,
)
from tests.support import eventually, finish, process_is_gone, read_line, running, start_driver

pytestmark = pytest.mark.ray

IMAGE = Image.from_registry(BUSYBOX)
SMALL: dict[str, Any] = {"image": IMAGE, "cpu": 0, "memory_mb": 128}
DEFINITION = f"""
from apothic import Image
sandbox = App("leaks").sandbox(
    name="s", image=Image.from_registry({BUSYBOX!r}), cpu=0, memory_mb=128, timeout_s=60
)
"""


@pytest.fixture
def client(docker_engine: Engine, ray_cluster: str) -> Iterator[ControlPlaneClient]:
    """Give the client; see afterwards that nothing of any session is left, anywhere.

    A seat stays until two sweeps have seen to its session: the last test waits for them.
    """
    yield connect()
    see_nothing_left(docker_engine, but="seat")


@pytest.fixture
def sandbox(client: ControlPlaneClient) -> Sandbox:
    return App("leaks").sandbox(name="s", timeout_s=60, **SMALL)


def actor_pid(session: SandboxSession) -> int:
    return int(ray.get(session.actor.apothic_status.remote())["pid"])


def restarts_of(session: SandboxSession) -> int:
    return int(actor_record(session.actor._actor_id.hex()).get("NumRestarts", 0))


def answers(session: SandboxSession) -> bool:
    try:
        session.pwd()
    except SandboxLostError:
        return False
    return True


def container_of(session: SandboxSession) -> str:
    found = session.inspect().container_id
    assert found
    return found


def test_close(sandbox: Sandbox, docker_engine: Engine, client: ControlPlaneClient):
    with sandbox.create(env={"LONG": "x" * 100_000}) as session:
        pid, container = actor_pid(session), container_of(session)
        session.exec("sleep 1000 &", shell=True)
    assert docker_engine.inspect(container) is None
    assert instance_names() == []
    eventually(lambda: process_is_gone(pid))
    assert left_by_sessions(docker_engine) == []  # at once: no sweep is needed


def test_closed_twice_at_once_while_verbs_run(sandbox: Sandbox, docker_engine: Engine):
    session = sandbox.create()
    other = sandbox.attach(session.handle)
    stream = session.exec_stream("while :; do echo on; sleep 0.1; done", shell=True)
    next(stream)
    with ThreadPoolExecutor(8) as threads:
        execs = [threads.submit(session.exec, "sleep 1000; true", shell=True) for _ in range(4)]
        eventually(lambda: session.inspect().running_calls >= 5)
        reports = [threads.submit(one.close) for one in (session, other)]
        assert sum(report.result().closed for report in reports) >= 1
        for running_exec in execs:
            assert isinstance(running_exec.exception(), SandboxClosedError | SandboxLostError)
    with pytest.raises((SandboxClosedError, SandboxLostError)):
        list(stream)
    assert left_of_sessions(docker_engine, connect().cluster_id) == []


@pytest.mark.parametrize("how", ["ended", "SIGKILL"])
def test_driver(
    tmp_path: Path, client: ControlPlaneClient, ray_cluster: str, docker_engine: Engine, how: str
):
    """One session still in use, one whose object was dropped, one that is being opened."""
    body = f"""{DEFINITION}
sandbox.create()
kept = sandbox.create()
kept.exec("sleep 1000 &", shell=True)
threading.Thread(target=sandbox.create, daemon=True).start()
print("IDS", kept.inspect().container_id, flush=True)
{"sys.stdin.read()" if how == "SIGKILL" else ""}
"""
    with running(start_driver(tmp_path, body, tmp_path, address=ray_cluster)) as driver:
        container = read_line(driver, "IDS")
        if how == "SIGKILL":
            driver.kill()
            driver.wait()
        else:
            finish(driver)
        eventually(lambda: docker_engine.inspect(container) is None)
        eventually(lambda: not instance_names())


def test_container_killed_from_outside(sandbox: Sandbox, docker_engine: Engine):
    session = sandbox.create()
    docker_engine.kill(container_of(session))
    with pytest.raises(SandboxLostError, match="killed or removed from outside"):
        session.exec("true")
    eventually(lambda: not left_of_sessions(docker_engine, connect().cluster_id))
    session.close()
    named = sandbox.named("n")
    docker_engine.remove(container_of(named))
    with pytest.raises(SandboxLostError, match="killed or removed from outside"):
        named.exec("true")
    again = sandbox.named("n")  # a lost one makes room for another by itself
    assert again.exec("echo on", shell=True).stdout == "on\n"
    again.close()


@pytest.mark.parametrize("how", ["driver killed", "closed"])
def test_image_build_interrupted(
    tmp_path: Path, client: ControlPlaneClient, ray_cluster: str, docker_engine: Engine, how: str
):
    builds = f"""
from apothic import Image
image = Image.from_registry({BUSYBOX!r}).run_commands("echo {tmp_path.name}; sleep 1000")
sandbox = App("leaks").sandbox(name="built", image=image, cpu=0, memory_mb=128)
"""
    verb = "sandbox.create()" if how == "driver killed" else "sandbox.named('n')"
    with running(start_driver(tmp_path, builds + verb, tmp_path, address=ray_cluster)) as driver:
        [step] = eventually(lambda: [x for x in docker_engine.api.containers() if _builds(x)])
        if how == "driver killed":
            driver.kill()
        else:
            assert App("leaks").sandbox(name="built", **SMALL).close_named("n").closed
        eventually(lambda: docker_engine.inspect(step["Id"]) is None)
        driver.wait(timeout=60)
    eventually(lambda: not left_of_builds(docker_engine))


def _builds(container: dict[str, Any]) -> bool:
    return BUILD in container["Labels"] and "sleep 1000" in container["Command"]


def test_creation_interrupted(sandbox: Sandbox, client: ControlPlaneClient):
    """Ctrl-C at whatever moment it comes; and a cancelled task."""
    for delay_s in (0.01, 0.05, 0.2, 0.5):
        timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
        session = None
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            session = sandbox.create()
            time.sleep(5)  # interrupted now
        if session is not None:
            session.close()
        timer.join()

    async def cancelled(delay_s: float) -> None:
        creating = asyncio.ensure_future(sandbox.aio.create())
        await asyncio.sleep(delay_s)
        creating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await creating).aio.close()  # it was faster

    for delay_s in (0.01, 0.05, 0.2):
        asyncio.run(cancelled(delay_s))
    eventually(lambda: not instance_names())


def test_failed_starts(client: ControlPlaneClient, docker_engine: Engine):
    """Each fails as a named session and as another, side by side."""
    volume = Volume.vast_local("leaks-v", size_gb=1)
    cases: dict[str, tuple[type[Exception], dict[str, Any], dict[str, Any]]] = {
        "image": (
            ImageNotFoundError,
            {"image": Image.from_registry("apothic-test-none-such")},
            {},
        ),
        "build": (ImageBuildError, {"image": IMAGE.run_commands("exit 3")}, {}),
        "secret": (SandboxStartError, {"secrets": [Secret.from_name("none-such")]}, {}),
        "volume": (SandboxStartError, {"volumes": {"/dev": volume}}, {}),
        "cwd": (SandboxFileError, {}, {"cwd": "/etc/passwd/x"}),
        "room": (PlacementError, {"cpu": 10_000}, {}),
    }

    def fail(case: tuple[str, bool]) -> None:
        name, named = case
        error, options, arguments = cases[name]
        sandbox = App("leaks").sandbox(name=f"bad-{name}", **{**SMALL, **options})
        with pytest.raises(error):
            sandbox.named("n", **arguments) if named else sandbox.create(**arguments)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fail, [(name, named) for name in cases for named in (True, False)]))
    assert instance_names() == []
    assert left_of_sessions(docker_engine, client.cluster_id) == []
    client.delete_volume("leaks-v")


def test_closed_while_it_waits_for_room(client: ControlPlaneClient, docker_engine: Engine):
    options = {**SMALL, "cpu": 6}
    sandbox = App("leaks").sandbox(name="big", **options)
    with sandbox.create(), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(sandbox.named, "n")
        eventually(lambda: len(instance_names()) == 2)
        sandbox.close_named("n")
        assert isinstance(waiting.exception(timeout=60), ApothicError)
        assert len(instance_names()) == 1


def test_named_racing_with_close(sandbox: Sandbox, docker_engine: Engine):
    def open_and_close(_: int) -> None:
        for _ in range(3):
            with contextlib.suppress(SandboxClosedError, SandboxLostError, SandboxStartError):
                session = sandbox.named("raced")
                session.exec("true")
                session.close()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(open_and_close, range(3)))
    sandbox.close_named("raced")
    assert left_of_sessions(docker_engine, connect().cluster_id) == []


def test_closed_as_it_begins(sandbox: Sandbox, client: ControlPlaneClient):
    """Told to open and to close before it could do either, whichever comes to it first."""

    def begin_and_close(number: int) -> str:
        request = sandbox._request(f"n{number}", b"/", {}, named=True)
        session = client.start_sandbox(request)
        opening = session.native.apothic_start.remote()
        report = session.close()
        with contextlib.suppress(SandboxClosedError, ray.exceptions.RayError):
            ray.get(opening)
        return report.note or ""

    with ThreadPoolExecutor(4) as threads:
        notes = set(threads.map(begin_and_close, range(24)))
    assert not [note for note in notes if "did not answer" in note]


def test_many_at_once(sandbox: Sandbox, docker_engine: Engine):
    def live(number: int) -> str:
        with sandbox.create(env={"N": number}) as session:
            return session.exec("echo $N", shell=True).check().stdout

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(live, range(16))) == [f"{number}\n" for number in range(16)]
    assert left_of_sessions(docker_engine, connect().cluster_id) == []


def test_an_actor_does_not_grow(sandbox: Sandbox):
    """500 execs, streams closed early and cancelled ones: its files, threads and tables stay."""

    def used(actor: Any) -> dict[str, int]:
        tables = ("_running", "_ended", "_gates")
        return {
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            **{name: len(getattr(actor, name)) for name in tables},
            "cancelled": max(0, len(actor._cancelled) - 1000),
        }

    def measure() -> dict[str, int]:
        return dict(ray.get(session.actor.__ray_call__.remote(used)))

    def use(count: int) -> None:
        for _ in range(count):
            session.exec(["true"])
        for _ in range(count // 20):
            with contextlib.closing(session.exec_stream("echo on; sleep 1000", shell=True)) as got:
                next(got)
        asyncio.run(cancel(count // 20))

    async def cancel(count: int) -> None:
        for _ in range(count):
            line = "touch began; exec sleep 1000"
            task = asyncio.ensure_future(session.aio.exec(line, shell=True))
            while not await session.aio.exists("began"):
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await session.aio.exec("rm began")

    with sandbox.create() as session:
        use(40)
        eventually(lambda: not measure()["_running"])
        before = measure()
        use(500)
        eventually(lambda: not measure()["_running"])
        after = measure()
        assert after["files"] <= before["files"] + 3
        assert after["threads"] <= before["threads"] + 3
        assert {**before, "files": 0, "threads": 0} == {**after, "files": 0, "threads": 0}
        assert session.exec("ls -d /proc/[0-9]* | wc -l", shell=True).stdout.strip() in "345"


def manager_pid() -> int:
    manager = ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    return int(actor_record(manager._actor_id.hex())["Pid"])


def test_what_a_dead_actor_left_is_swept(
    sandbox: Sandbox, docker_engine: Engine, client: ControlPlaneClient
):
    """Killed with everything of it unremoved: a container that never ran, and a lost one of its own."""
    session = sandbox.create()
    pid, labels = actor_pid(session), dict(_labels(docker_engine, session))
    stray = docker_engine.api.create_container(BUSYBOX, "sleep 1000", labels=labels)["Id"]
    foreign = docker_engine.api.create_container(
        BUSYBOX, "sleep 1000", labels={**labels, "apothic.raylet": "none"}
    )["Id"]
    try:
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SandboxLostError):
            session.exec("true")
        eventually(lambda: docker_engine.inspect(stray) is None)
        assert docker_engine.inspect(foreign) is not None
    finally:
        docker_engine.remove(foreign)


def _labels(engine: Engine, session: SandboxSession) -> dict[str, str]:
    found = engine.inspect(container_of(session))
    assert found is not None
    return dict(found.labels)


def test_manager_killed(
    tmp_path: Path, client: ControlPlaneClient, ray_cluster: str, docker_engine: Engine
):
    """With one session at work, and one whose driver dies while there is no manager."""
    sandbox = App("leaks").sandbox(name="s", timeout_s=60, **SMALL)
    body = (
        f"{DEFINITION}\nprint('ID', sandbox.create().inspect().container_id, flush=True)\ninput()"
    )
    with (
        sandbox.create() as session,
        running(start_driver(tmp_path, body, tmp_path, address=ray_cluster)) as driver,
    ):
        container = read_line(driver, "ID")
        os.kill(manager_pid(), signal.SIGKILL)
        driver.kill()
        assert session.exec("echo on", shell=True).stdout == "on\n"
        eventually(lambda: docker_engine.inspect(container) is None)
        assert session.exec("echo on", shell=True).stdout == "on\n"
        mine = container_of(session)
    assert docker_engine.inspect(mine) is None


def _until(fact: Callable[[], bool], limit_s: float) -> float:
    began = time.monotonic()
    eventually(fact, limit_s + 10)
    return time.monotonic() - began


def test_unnamed_actor_killed(sandbox: Sandbox, docker_engine: Engine):
    session = sandbox.create()
    pid, container = actor_pid(session), container_of(session)
    session.exec("sleep 1000 & setsid sleep 1000 &", shell=True)
    os.kill(pid, signal.SIGKILL)
    assert _until(lambda: docker_engine.inspect(container) is None, 2) < 2
    with pytest.raises(SandboxLostError):
        session.exec("true")
    assert not session.close().closed


def test_named_actor_killed(sandbox: Sandbox, docker_engine: Engine):
    session = sandbox.named("survivor", cwd="/work", env={"FIRST": 1})
    session.write_text("file", "content")
    session.mkdir("deeper")
    session.chdir("deeper")
    session.update_env({"SECOND": 2})
    session.exec("while :; do date +%s%N > /tmp/beat; sleep 0.05; done &", shell=True)
    container, ids = container_of(session), []
    for _ in range(2):
        pid, restarts = actor_pid(session), session.inspect().restarts
        os.kill(pid, signal.SIGKILL)
        # A verb that meets the dying process may have reached it: it is not sent twice. This process
        # may learn later than the GCS that there is another.
        eventually(partial(lambda n: restarts_of(session) > n, restarts))
        eventually(partial(answers, session))
        result = session.exec("pwd; echo $FIRST$SECOND; cat ../file", shell=True)
        assert result.check().stdout == "/work/deeper\n12\ncontent"
        beats = {session.read_text("/tmp/beat")}
        eventually(partial(lambda seen: session.read_text("/tmp/beat") not in seen, beats))
        assert container_of(session) == container
        ids.append(pid)
    assert len({*ids, actor_pid(session)}) == 3
    assert sandbox.named("survivor").pwd() == "/work/deeper"
    assert session.close().closed
    assert docker_engine.inspect(container) is None


def test_every_node_is_swept_in_the_end(client: ControlPlaneClient, docker_engine: Engine):
    """After all that went before, nothing is left for a sweep to look for."""
    see_nothing_left(docker_engine)
