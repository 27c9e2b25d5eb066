from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_backend.sandbox.engine.agent_volume import ensure_agent, remove_agent
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.helper import HELPER_IMAGE
from ray_backend.sandbox.engine.labels import AGENT, OwnerLabels
from ray_backend.sandbox.engine.launch import Launched
from ray_backend.sandbox.engine.sweep import sweep
from tests.docker.support import (
    BUSYBOX,
    read_all,
    run_inside,
    spec_of,
    start_python,
    with_container,
)

STEPS = ("agent-volume", "agent-filler", "agent-filled", "agent-elected")


@pytest.fixture
def binary(engine: Engine, owner: OwnerLabels) -> Iterator[bytes]:
    """Give a static program that is no other test's: busybox, with a tail."""
    container = engine.api.create_container(BUSYBOX, labels=owner.as_labels())["Id"]
    try:
        stream, _ = engine.api.get_archive(container, "/bin/busybox")
        content = b"".join(stream)[512:] + os.urandom(16)
    finally:
        engine.remove(container)
    yield content
    remove_agent(engine, content)
    assert _volumes(engine, owner) == []


def _volumes(engine: Engine, owner: OwnerLabels) -> list[str]:
    wanted = {"label": [AGENT, f"apothic.cluster={owner.cluster}"]}
    return [found["Name"] for found in engine.api.volumes(filters=wanted)["Volumes"] or []]


def test_in_an_empty_image(engine: Engine, owner: OwnerLabels, binary: bytes):
    """Nothing in the image, not even a directory: the agent starts, and is read-only."""
    volume = ensure_agent(engine, binary, owner)
    assert ensure_agent(engine, binary, owner) == volume
    assert _volumes(engine, owner) == [volume]

    async def body(launched: Launched) -> None:
        said = await read_all(launched.stream)
        assert said[2] == b"agent: applet not found\n"  # busybox, under this name

    spec = spec_of(owner, "/.apothic/agent", image=HELPER_IMAGE, agent_volume=volume)
    with_container(engine, spec, body)
    said = run_inside(
        engine,
        owner,
        "ls -l /.apothic; rm /.apothic/agent; echo x >/.apothic/agent; sha256sum /.apothic/agent",
        agent_volume=volume,
    )
    assert "-r-xr-xr-x    1 root     0" in said
    assert said.count("Read-only file system") == 2


def test_many_at_once(engine: Engine, owner: OwnerLabels, binary: bytes, tmp_path: Path):
    """Eight processes: one volume, complete for each as soon as it has the name."""
    (tmp_path / "binary").write_bytes(binary)
    processes = [
        start_python(
            """
            import sys
            from pathlib import Path
            from ray_backend.sandbox.engine.agent_volume import ensure_agent
            from ray_backend.sandbox.engine.connection import Engine
            from tests.docker.support import new_owner, run_inside

            engine, owner = Engine.connect(), new_owner(cluster=sys.argv[1])
            print("ready", flush=True)
            sys.stdin.readline()
            binary = Path(sys.argv[2]).read_bytes()
            volume = ensure_agent(engine, binary, owner)
            size = run_inside(engine, owner, "stat -c %s /.apothic/agent", agent_volume=volume)
            assert int(size) == len(binary), size
            print(volume)
            """,
            owner.cluster,
            tmp_path / "binary",
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    outputs = [process.communicate("go\n") for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(_volumes(engine, owner)) == 1


@pytest.mark.parametrize("step", STEPS)
def test_killed(engine: Engine, owner: OwnerLabels, binary: bytes, tmp_path: Path, step: str):
    (tmp_path / "binary").write_bytes(binary)
    process = start_python(
        """
        import os, signal, sys
        from pathlib import Path
        from ray_backend.sandbox.engine.agent_volume import ensure_agent
        from ray_backend.sandbox.engine.connection import Engine
        from tests.docker.support import new_owner

        def at(step):
            if step == sys.argv[3]:
                os.kill(os.getpid(), signal.SIGKILL)

        binary = Path(sys.argv[2]).read_bytes()
        ensure_agent(Engine.connect(), binary, new_owner(cluster=sys.argv[1]), at=at)
        """,
        owner.cluster,
        tmp_path / "binary",
        step,
    )
    _, errors = process.communicate()
    assert process.returncode == -9, errors
    volume = ensure_agent(engine, binary, owner)  # nobody is blocked
    sweep(engine, list, owner.cluster, "tests")
    assert _volumes(engine, owner) == [volume]
    assert engine.list_containers(owner.as_labels()) == []


@pytest.mark.parametrize("step", STEPS[:-1])
def test_failure(engine: Engine, owner: OwnerLabels, binary: bytes, step: str):
    def at(name: str) -> None:
        if name == step:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        ensure_agent(engine, binary, owner, at=at)
    assert _volumes(engine, owner) == []
    assert engine.list_containers(owner.as_labels()) == []


def test_volume_pruned_meanwhile(engine: Engine, owner: OwnerLabels, binary: bytes):
    volume = ensure_agent(engine, binary, owner)
    engine.api.remove_volume(volume)
    second = ensure_agent(engine, binary, owner)
    assert second != volume
    assert _volumes(engine, owner) == [second]
