"""Exit hooks: one test for each way in which an instance can stop."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from ray_backend.manager import instance_names
from tests.support import (
    LIFE,
    eventually,
    finish,
    process_is_gone,
    read_line,
    running,
    start_driver,
    threads,
    words,
)

pytestmark = pytest.mark.ray

NAMED = "inst = Logged.named('n', LOG)\n"
NEW = "inst = Logged.new(LOG)\n"
SAY = "print('PID', inst.pid.remote(), flush=True)\n"
WAIT = "sys.stdin.read()\n"


def assert_one_life(log: Path, within_s: float = 10.0) -> None:
    """Hooks ran exactly once, in order, on one thread, and no actor of ours is left."""
    eventually(lambda: words(log)[-1:] == LIFE[-1:], within_s)
    eventually(lambda: not instance_names(), within_s)
    assert words(log) == LIFE
    assert len(threads(log)) == 1


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(NEW + SAY + "print(inst.close())", id="close"),
        pytest.param("with Logged.new(LOG) as inst:\n    print(inst.pid.remote())", id="with"),
        pytest.param(
            "with Logged.bind(LOG) as inst:\n    print(inst.pid.remote())", id="with-bind"
        ),
        pytest.param(NAMED + SAY + "inst.close()", id="named-close"),
        pytest.param(NAMED + SAY + "Logged.close_named('n')", id="close_named"),
        pytest.param(NEW + SAY + "Logged.close_handle(inst.handle_json)", id="close_handle"),
        pytest.param(NEW + SAY, id="driver-ends"),
        pytest.param("inst = Logged.bind(LOG)\n" + SAY, id="driver-ends-bound"),
        pytest.param(NEW + SAY + "del inst\nimport gc; gc.collect()", id="object-dropped"),
    ],
)
def test_ways_that_end_well(ray_cluster: str, tmp_path: Path, log: Path, body: str) -> None:
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as driver:
        finish(driver)
        assert_one_life(log)


def test_driver_ends_by_exception(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    body = NEW + SAY + "raise RuntimeError('the driver fails')"
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as driver:
        driver.communicate(timeout=60)
        assert driver.returncode == 1
        assert_one_life(log)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_driver_is_killed(
    ray_cluster: str, tmp_path: Path, log: Path, signum: signal.Signals
) -> None:
    with running(start_driver(tmp_path, NEW + SAY + WAIT, log, address=ray_cluster)) as driver:
        read_line(driver, "PID")
        driver.send_signal(signum)
        driver.wait(timeout=30)
        assert_one_life(log)


def test_driver_is_killed_during_creation(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    body = (
        "import threading\n"
        "threading.Thread(target=Logged.new, args=(LOG,), daemon=True).start()\n"
        "while not os.path.exists(LOG): pass\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as driver:
        driver.wait(timeout=60)
        assert_one_life(log)


def test_worker_gets_sigterm(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    with running(start_driver(tmp_path, NAMED + SAY + WAIT, log, address=ray_cluster)) as driver:
        pid = int(read_line(driver, "PID"))
        os.kill(pid, signal.SIGTERM)
        assert_one_life(log)
        eventually(lambda: process_is_gone(pid))


def test_close_named_from_another_job(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    with running(start_driver(tmp_path, NAMED + SAY, log, address=ray_cluster)) as first:
        finish(first)
    assert words(log) == LIFE[:3]
    body = "print('CLOSED', Logged.close_named('n').closed, Logged.close_named('n').closed)"
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as second:
        assert "CLOSED True False" in finish(second)
    assert_one_life(log)


def test_redeploy_with_closing(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    body = "app.deploy()\n" + NAMED + SAY
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as first:
        finish(first)
    body = "app.deploy()\nprint('STILL', Logged.named('n').pid.remote())"
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as same:
        finish(same)
    assert words(log) == LIFE[:3]
    body = "app.deploy(close_outdated=True)"
    new_options = "dict(tags=['v2'])"
    second = start_driver(tmp_path, body, log, address=ray_cluster, options=new_options)
    with running(second):
        finish(second)
    assert_one_life(log)


def test_idle_scale_down(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    body = (
        "import apothic.pools; apothic.pools.IDLE_S = 0.5\n"
        "inst = Logged.bind(LOG)\n"
        "jobs = [inst.sleep.spawn(0.3) for _ in range(2)]\n"
        "[job.get() for job in jobs]\n"
        "print('DONE', flush=True)\n" + WAIT
    )
    options = "dict(max_containers=2, tasks_per_container=1)"
    driver = start_driver(tmp_path, body, log, address=ray_cluster, options=options)
    with running(driver):
        read_line(driver, "DONE")
        assert words(log).count("init") == 2
        eventually(lambda: words(log)[-2:] == LIFE[-2:])
        eventually(lambda: len(instance_names()) == 1)
        assert words(log).count("exit-three") == 1
        finish_quietly(driver)
    eventually(lambda: words(log).count("exit-three") == 2)


def test_lease_of_an_actor_ends_with_it(ray_cluster: str, tmp_path: Path, log: Path) -> None:
    body = (
        "import ray\n"
        "@ray.remote(num_cpus=0)\n"
        "class Holder:\n"
        "    def make(self):\n"
        "        self.inst = Logged.new(LOG)\n"
        "        return self.inst.pid.remote()\n"
        "app.client\n"
        "holder = Holder.remote()\n"
        "print('PID', ray.get(holder.make.remote()), flush=True)\n"
        "ray.kill(holder)\n"
        "print('KILLED', flush=True)\n" + WAIT
    )
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as driver:
        read_line(driver, "KILLED")
        assert_one_life(log)
        finish_quietly(driver)


def test_instance_shared_by_two_jobs_lives_until_both_are_gone(
    ray_cluster: str, tmp_path: Path, log: Path
) -> None:
    first = start_driver(
        tmp_path,
        NEW + "print('H', inst.handle_json, flush=True)\n" + WAIT,
        log,
        address=ray_cluster,
    )
    with running(first):
        handle = read_line(first, "H")
        body = f"inst = Cls.from_handle({handle!r})\n" + SAY + WAIT
        with running(start_driver(tmp_path, body, log, address=ray_cluster)) as second:
            read_line(second, "PID")
            first.kill()
            first.wait()
            assert instance_names()
            finish_quietly(second)
            assert_one_life(log)


def finish_quietly(process: subprocess.Popen[str]) -> None:
    """Let a driver that reads its standard input go on to its end."""
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    process.wait(timeout=60)
