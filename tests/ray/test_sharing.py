"""Who gets the same bound instance: clients of a deployed app do, scripts that only define it do not."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from apothic import App, Cls, method
from tests.support import (
    eventually,
    finish,
    process_is_gone,
    read_line,
    running,
    start_driver,
    words,
)

pytestmark = pytest.mark.ray

BOUND = """
if "deploy" in sys.argv:
    app.deploy()
cls = Cls.from_name("exits", "Logged") if "look-up" in sys.argv else Logged
inst = cls.bind(LOG)
print("PID", inst.pid.remote(), flush=True)
sys.stdin.readline()
"""


def test_clients_of_a_deployed_app_share_what_they_bind(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        ExitStack() as stack,
        running(start_driver(tmp_path, BOUND, log, "deploy", address=ray_cluster)) as first,
    ):
        pid = int(read_line(first, "PID"))
        second = stack.enter_context(
            running(start_driver(tmp_path, BOUND, log, "look-up", address=ray_cluster))
        )
        assert int(read_line(second, "PID")) == pid
        looked_up = Cls.from_name("exits", "Logged").bind(str(log))
        assert looked_up.pid.remote() == pid
        other = Cls.from_name("exits", "Logged").bind(str(log) + "-other")
        assert other.pid.remote() != pid
        other.close()
        for driver in (first, second):
            driver.communicate("\n", timeout=60)
        # The last lease is ours.
        assert looked_up.pid.remote() == pid
        assert words(log) == ["init", "enter-one", "enter-two"]
        looked_up._target.primary().release()
        eventually(lambda: process_is_gone(pid))
        assert words(log)[-2:] == ["exit-four", "exit-three"]


def test_an_app_that_is_only_defined_is_private_to_its_job(
    ray_cluster: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        running(start_driver(tmp_path, BOUND, log, address=ray_cluster)) as first,
        running(start_driver(tmp_path, BOUND, log, address=ray_cluster)) as second,
    ):
        pids = {int(read_line(driver, "PID")) for driver in (first, second)}
        assert len(pids) == 2
        for driver in (first, second):
            driver.communicate("\n", timeout=60)
    eventually(lambda: all(process_is_gone(pid) for pid in pids))


NEAR = """
from apothic import App, method
near = App("near")

@near.cls(cpu=0, memory_mb=10)
class Caller:
    @method()
    def ask(self, inst):
        return inst.pid.remote(), inst.handle_json

inst = Logged.new(LOG)
with Caller.new() as caller:
    pid, handle = caller.ask.remote(inst)
    assert pid == inst.pid.remote()
    assert handle == inst.handle_json
    print("SAME", pid)
"""


def test_an_instance_that_is_passed_along_is_the_same(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(start_driver(tmp_path, NEAR, log, address=ray_cluster)) as driver:
        assert "SAME" in finish(driver)
    assert words(log)[-1] == "exit-three"
    assert os.path.exists(log)


def test_the_handle_names_the_version_that_runs(ray_cluster: str) -> None:
    def make(tag: str) -> Cls:
        app = App("versions")

        @app.cls(cpu=0, memory_mb=10, tags=[tag])
        class Versioned:
            @method()
            def one(self) -> int:
                return 1

        return Versioned  # type: ignore[return-value]  # mypy ignores class decorators

    old, new = make("old"), make("new")
    first = old.named("v")
    found = new.named("v")
    assert old.spec.digest != new.spec.digest
    assert found.handle.spec_digest == first.handle.spec_digest == old.spec.digest
    assert found.inspect().tags == ("old",)
    first.close()
