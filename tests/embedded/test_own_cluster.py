"""A cluster that a process starts for itself ends with it, and every instance with its exit hooks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

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

BODY = """
inst = Logged.named('n', LOG)
raylet = os.popen("pgrep -P %d raylet" % os.getpid()).read().split()
print('PIDS', inst.pid.remote(), *raylet, flush=True)
"""


@pytest.mark.parametrize("how", ["normal", "exception", "SIGTERM", "SIGKILL", "shutdown"])
def test_named_instances_end_with_their_cluster(tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    ending = {
        "exception": "raise RuntimeError('the driver fails')",
        "shutdown": "import ray; ray.shutdown()",
    }.get(how, "print('END', flush=True)" if how == "normal" else "sys.stdin.read()")
    with running(start_driver(tmp_path, BODY + ending, log)) as driver:
        pids = [int(pid) for pid in read_line(driver, "PIDS").split()]
        if how.startswith("SIG"):
            driver.send_signal(getattr(signal, how))
            driver.wait(timeout=60)
        elif how == "exception":
            driver.communicate(timeout=60)
        else:
            finish(driver)
        eventually(lambda: words(log)[-1:] == LIFE[-1:])
        assert words(log) == LIFE
        assert len(threads(log)) == 1
        eventually(lambda: all(process_is_gone(pid) for pid in pids))


AWAITED = """
import asyncio


async def main():
    inst = await Logged.aio.named('n', LOG)
    print('PID', await inst.pid.aio.remote(), flush=True)


asyncio.run(main())
"""


def test_a_cluster_that_a_coroutine_started_lives_until_the_hooks_have_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(start_driver(tmp_path, AWAITED, log)) as driver:
        pid = int(finish(driver).split()[-1])
    eventually(lambda: process_is_gone(pid))
    assert words(log) == LIFE


def test_it_says_so_on_standard_error(tmp_path: Path) -> None:
    with running(start_driver(tmp_path, "app.client", tmp_path / "log")) as driver:
        _, err = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert err.count("apothic: no Ray cluster was named") == 1


SECOND = """
import ray
for number in range(2):
    with Logged.new(LOG) as fresh:
        assert fresh.pid.remote() == Logged.attach(fresh.handle).pid.remote()
    Logged.named("n", LOG).pid.remote()
    ray.shutdown()
print("TWICE")
"""


def test_a_process_may_have_one_cluster_after_another(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(start_driver(tmp_path, SECOND, log)) as driver:
        assert "TWICE" in finish(driver)
    assert words(log).count("init") == words(log).count(LIFE[-1]) == 4
