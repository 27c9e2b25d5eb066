"""A session's process on uvloop, which Ray runs async actors on where that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_backend.sandbox.engine.connection import Engine
from tests.docker.support import BUSYBOX
from tests.sandboxes.left import left_of_sessions
from tests.support import eventually, finish, import_or_skip, read_line, running, start_driver

pytestmark = pytest.mark.ray

BODY = f"""
import ray
from apothic import Image
from apothic.backend import connect
from apothic.errors import ExecTimeoutError

sandbox = App("uvloop").sandbox(
    name="s", image=Image.from_registry({BUSYBOX!r}), cpu=0, memory_mb=128, timeout_s=60
)
TWO = "echo begun; /bin/sleep 1000 & /bin/sleep 1000"


def loop_of(actor):
    return type(actor._loop).__module__


def sleeping():
    return int(session.exec("cat /proc/[0-9]*/comm | grep -c sleep", shell=True).stdout)


with sandbox.create() as session:
    print("CLUSTER", connect().cluster_id, flush=True)
    print("LOOP", ray.get(session.actor.__ray_call__.remote(loop_of)), flush=True)
    assert session.exec(["echo", "on"]).check().stdout == "on\\n"
    with session.exec_stream(TWO, shell=True) as stream:
        assert next(stream).text == "begun\\n"
        while sleeping() < 2:
            pass
    assert sleeping() == 0
    try:
        session.exec(TWO, shell=True, timeout_s=1)
    except ExecTimeoutError as error:
        assert error.result.stdout == "begun\\n"
    else:
        raise AssertionError("it ended within its time limit")
    assert sleeping() == 0
    data = os.urandom(5_000_000)  # more than one part
    session.write_bytes("/work/file", data, make_parents=True)
    assert session.read_bytes("/work/file") == data
print("CLOSED", flush=True)
"""


def test_a_session_on_uvloop(
    tmp_path: Path, docker_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_or_skip("uvloop")
    # Of the driver's own cluster, whose processes inherit it.
    monkeypatch.setenv("RAY_USE_UVLOOP", "1")
    with running(start_driver(tmp_path, BODY, tmp_path)) as driver:
        cluster = read_line(driver, "CLUSTER")
        assert read_line(driver, "LOOP") == "uvloop"
        assert "CLOSED" in finish(driver)
    eventually(lambda: not left_of_sessions(docker_engine, cluster))
