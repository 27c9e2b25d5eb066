from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from apothic.errors import ImageNotFoundError, InvalidOptionError, SandboxEngineError
from ray_backend.sandbox.engine.attach import AttachedStream
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.container import CAPABILITIES, RUNTIME_VARIABLE
from ray_backend.sandbox.engine.labels import SESSION, OwnerLabels
from ray_backend.sandbox.engine.launch import Launched, launch
from ray_backend.sandbox.engine.outcome import (
    OOM_COUNTER_FILES,
    ask_outcome,
    count_oom_events,
    parse_oom_kills,
)
from tests.docker.support import (
    read_all,
    read_line,
    run_inside,
    spec_of,
    start_python,
    with_container,
)
from tests.sandboxes.own_engine import own_engine
from tests.support import eventually
from tests.support import read_line as read_output

_BITS = {  # linux/capability.h
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_BIND_SERVICE": 10,
}


def test_life_of_an_unnamed_one(engine: Engine, owner: OwnerLabels):
    async def run() -> None:
        launched = await launch(engine, spec_of(owner))
        launched.stream.write(b"hello\n")
        await launched.stream.drain()
        assert await read_line(launched.stream) == "hello"
        (found,) = engine.list_containers({SESSION: "session-1", **owner.as_labels()})
        assert (found.id, found.owner, found.status) == (launched.id, owner, "running")
        state = engine.inspect(launched.id)
        assert state is not None
        assert state.running
        assert state.pid
        memory = engine.memory(launched.id)
        assert memory is not None
        assert 0 < memory.used_bytes < memory.limit_bytes == 64 * 1024**2
        launched.stream.abort()  # as a killed process does

    asyncio.run(run())
    eventually(lambda: not engine.list_containers(owner.as_labels()), timeout_s=5)
    assert engine.inspect("none") is None
    assert engine.memory("none") is None
    assert engine.disk_bytes("0" * 64) is None


def test_client_killed(engine: Engine, owner: OwnerLabels):
    """Nobody says good-bye: the engine removes the container by itself."""
    process = start_python(
        """
        import asyncio, sys
        from ray_backend.sandbox.engine.connection import Engine
        from ray_backend.sandbox.engine.labels import OwnerLabels, RayletId
        from ray_backend.sandbox.engine.launch import launch
        from tests.docker.support import new_owner, spec_of

        async def main():
            launched = await launch(Engine.connect(), spec_of(new_owner(cluster=sys.argv[1])))
            print("started", launched.id, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """,
        owner.cluster,
    )
    container = read_output(process, "started ")
    state = engine.inspect(container)
    assert state is not None
    assert state.running
    process.send_signal(signal.SIGKILL)
    process.communicate()
    eventually(lambda: engine.inspect(container) is None, timeout_s=5)


def test_kept_for_the_next_client(engine: Engine, owner: OwnerLabels):
    async def run() -> None:
        launched = await launch(engine, spec_of(owner, keep=True))
        try:
            launched.stream.write(b"one\n")
            assert await read_line(launched.stream) == "one"
            await launched.stream.close()
            second = await AttachedStream.open(engine, launched.id)
            second.write(b"two\n")
            assert await read_line(second) == "two"
            assert engine.kill(launched.id)
            assert await second.read() is None
            assert engine.wait(launched.id, 10) == 137
            assert not engine.kill(launched.id)
            state = engine.inspect(launched.id)
            assert state is not None
            assert (state.status, state.exit_code) == ("exited", 137)
            await second.close()
        finally:
            assert engine.remove(launched.id)

    asyncio.run(run())


def test_one_that_ends_while_it_is_removed(engine: Engine, owner: OwnerLabels):
    """As a session's does, whose agent ends with its stream: the engine may then leave it."""

    async def run() -> None:
        launched = await launch(engine, spec_of(owner))
        launched.stream.abort()
        await asyncio.to_thread(engine.remove, launched.id)
        assert engine.inspect(launched.id) is None

    for _ in range(20):
        asyncio.run(run())


def test_remove_is_idempotent(engine: Engine, owner: OwnerLabels):
    for _ in range(3):
        created = engine.create_container(spec_of(owner))
        engine.start(created.id)
        with ThreadPoolExecutor(8) as pool:  # some meet the engine while it removes
            removed = list(pool.map(engine.remove, [created.id] * 8))
        assert any(removed)
        assert engine.inspect(created.id) is None
        assert not engine.remove(created.id)


def test_wait_gives_up(engine: Engine, owner: OwnerLabels):
    async def body(launched: Launched) -> None:
        with pytest.raises(TimeoutError, match="still runs"):
            await asyncio.to_thread(engine.wait, launched.id, 0.2)
        outcome = await asyncio.to_thread(lambda: ask_outcome(engine, launched.id, timeout_s=0.2))
        assert outcome.running

    with_container(engine, spec_of(owner), body)
    assert engine.wait("none", 1) is None


@pytest.mark.parametrize("keep", [True, False])
def test_exit_status(engine: Engine, owner: OwnerLabels, keep: bool):
    """Also when the engine has removed the container before we ask."""

    async def run() -> None:
        launched = await launch(engine, spec_of(owner, "/bin/sh", "-c", "exit 7", keep=keep))
        assert await read_all(launched.stream) == {1: b"", 2: b""}
        if not keep:
            while engine.inspect(launched.id) is not None:
                await asyncio.sleep(0.01)
        outcome = ask_outcome(engine, launched.id)
        assert (outcome.running, outcome.exit_code, outcome.oom_killed) == (False, 7, False)
        await launched.stream.close()
        engine.remove(launched.id)

    asyncio.run(run())


def test_out_of_memory_of_a_child(engine: Engine, owner: OwnerLabels):
    """The counter inside, and the engine's events, also once the container is gone."""
    look = "; ".join(f"cat {path} 2>/dev/null" for path in OOM_COUNTER_FILES)
    script = f"{look}; echo =; tail -c 300m /dev/zero | wc -c >/dev/null; {look}; echo .; read x"

    async def body(launched: Launched) -> None:
        text = ""
        while not text.endswith(".\n"):
            piece = await launched.stream.read()
            assert piece is not None
            text += piece[1].decode() if piece[0] == 1 else ""
        before, after = map(parse_oom_kills, text.split("=\n"))
        assert (before, after) == (0, 1)
        assert count_oom_events(engine, launched.id) == 1
        state = engine.inspect(launched.id)
        assert state is not None
        assert state.running
        launched.stream.write_eof()
        await read_all(launched.stream)
        while engine.inspect(launched.id) is not None:
            await asyncio.sleep(0.01)
        assert ask_outcome(engine, launched.id).oom_killed

    with_container(engine, spec_of(owner, "/bin/sh", "-c", script, memory_mb=32), body)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\noom_group_kill 0\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\n", None),
        ("", None),
    ],
)
def test_parse_oom_kills(text: str, count: int | None):
    assert parse_oom_kills(text) == count


def test_isolation(engine: Engine, owner: OwnerLabels):
    said = run_inside(
        engine,
        owner,
        "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status; ulimit -n; ulimit -c;"
        "hostname; ls -d /sys/class/net/*; grep -c . /proc/self/mountinfo >/dev/null;"
        "df /dev/shm | tail -1; mount -t tmpfs none /mnt; mount -o remount,rw /.apothic;"
        "touch /.apothic/x; mknod /tmp/m b 8 0; cat /proc/1/cgroup",
    )
    mask = f"{sum(1 << _BITS[name] for name in CAPABILITIES):016x}"
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        assert f"{kind}:\t{mask}" in said
    assert "CapAmb:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said  # filtered
    assert re.search(r"\n16384\n0\nsandbox\n/sys/class/net/lo\n", said)
    assert "32768" in said  # KiB of /dev/shm: half of memory_mb
    assert said.count("ermission denied") + said.count("not permitted") >= 3, said
    assert "Read-only file system" in said
    assert "/docker/" not in said  # the host's cgroup paths


def test_limits(engine: Engine, owner: OwnerLabels):
    # The fork loop is bounded by the pids limit, which the engine sets before it starts.
    said = run_inside(
        engine,
        owner,
        "i=0; while [ $i -lt 40 ]; do sleep 30 & i=$((i+1)); done; echo unlimited",
        pids=16,
    )
    assert "can't fork" in said
    assert "unlimited" not in said

    async def body(launched: Launched) -> None:
        host = engine.api.inspect_container(launched.id)["HostConfig"]
        assert host["CpuQuota"] / host["CpuPeriod"] == 64.5  # more than the node has
        assert host["Memory"] == host["MemorySwap"] == 64 * 1024**2
        assert host["PidsLimit"] == 1024
        assert host["LogConfig"]["Type"] == "none"
        assert host["IpcMode"] == "private"

    with_container(engine, spec_of(owner, cpu=64.5), body)


def test_runs_as_root_whatever_the_image_says(engine: Engine, owner: OwnerLabels):
    assert run_inside(engine, owner, "id -u; su nobody -c 'id -u'; pwd") == "0\n65534\n/\n"


def test_disk_limit_is_enforced_or_to_be_watched(engine: Engine, owner: OwnerLabels):
    script = "dd if=/dev/zero of=/x bs=1M count=30 2>&1 | tail -1; echo; read x"

    async def body(launched: Launched) -> None:
        said = await launched.stream.read()
        assert said is not None
        written = engine.disk_bytes(launched.id)
        assert written is not None
        if launched.disk_limit == "enforced":
            assert b"No space" in said[1]
            assert written <= 20 * 1000**2
        else:
            assert launched.disk_limit == "watch"
            assert not engine.info.may_limit_disk
            assert written >= 30 * 1024**2

    with_container(engine, spec_of(owner, "/bin/sh", "-c", script, disk_gb=0.02), body)


def test_gpu_where_there_is_none(engine: Engine, owner: OwnerLabels):
    if any("nvidia" in runtime for runtime in engine.info.runtimes):
        pytest.skip("this engine has GPUs")
    with pytest.raises(SandboxEngineError, match="nvidia-container-toolkit"):
        run_inside(engine, owner, "true", gpu_ids=("0",))


def test_refusals(engine: Engine, owner: OwnerLabels, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ImageNotFoundError, match="'apothic-none' is not on this node"):
        engine.create_container(spec_of(owner, image="apothic-none"))
    monkeypatch.setenv(RUNTIME_VARIABLE, "runsc")
    if "runsc" not in engine.info.runtimes:
        with pytest.raises(SandboxEngineError, match="APOTHIC_SANDBOX_RUNTIME='runsc', but"):
            engine.create_container(spec_of(owner))
    monkeypatch.setenv(RUNTIME_VARIABLE, "runc")
    assert run_inside(engine, owner, "echo ok") == "ok\n"
    for wrong in (
        {"memory_mb": 0},
        {"memory_mb": 5},
        {"pids": 0},
        {"cpu": -1},
        {"cpu": float("nan")},
        {"disk_gb": 0},
        {"network": "host"},
        {"network": "container:x"},
    ):
        with pytest.raises(InvalidOptionError):
            spec_of(owner, **wrong)


def test_name_is_taken(engine: Engine, owner: OwnerLabels):
    """The container that has the name survives an attempt to launch another."""

    async def body(launched: Launched) -> None:
        state = engine.inspect(launched.id)
        assert state is not None
        with pytest.raises(SandboxEngineError, match="already in use"):
            await launch(engine, spec_of(owner, name=state.name))
        launched.stream.write(b"alive\n")
        assert await read_line(launched.stream) == "alive"

    with_container(engine, spec_of(owner), body)


def test_program_is_missing(engine: Engine, owner: OwnerLabels):
    with pytest.raises(SandboxEngineError, match="no such file"):
        asyncio.run(launch(engine, spec_of(owner, "/none")))


def test_a_container_without_gpus_does_not_run_where_an_image_could_take_them(
    engine: Engine, owner: OwnerLabels
):
    """NVIDIA's runtime gives a container what its image asks for; this one only has its name."""
    runc = shutil.which("runc")
    assert runc is not None  # comes with the engine
    with own_engine(engine, f"--add-runtime=nvidia={runc}", "--default-runtime=nvidia") as own:
        other = own.connect()
        with contextlib.closing(other):
            assert other.info.default_runtime == "nvidia"
            made = other.create_container(spec_of(owner, "true", agent_volume="none"))
            try:
                found = other.api.inspect_container(made.id)
                assert found["HostConfig"]["Runtime"] == "runc"
            finally:
                other.remove(made.id)
                other.api.remove_volume("none")
