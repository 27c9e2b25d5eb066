"""What the tests against a real engine share."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ray_backend.sandbox.engine.attach import STDOUT, AttachedStream
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.container import ContainerSpec
from ray_backend.sandbox.engine.labels import CLUSTER, OwnerLabels, RayletId
from ray_backend.sandbox.engine.launch import Launched, launch

T = TypeVar("T")

BUSYBOX = "apothic-test-busybox"
AGENT_STAND_IN = "apothic-test-agent"
"""An empty volume: most tests start a program of the image."""


def new_owner(session: str = "session-1", **changes: Any) -> OwnerLabels:
    fields: dict[str, Any] = {
        "cluster": f"cluster-{uuid.uuid4().hex}",
        "namespace": "tests",
        "raylet": RayletId.of_process(os.getpid()),
        "session": session,
        "owner": "actor-1",
    }
    return OwnerLabels(**{**fields, **changes})


def spec_of(owner: OwnerLabels, *command: str, **changes: Any) -> ContainerSpec:
    fields: dict[str, Any] = {
        "name": f"apothic-{uuid.uuid4().hex[:12]}",
        "image": BUSYBOX,
        "command": command or ("/bin/cat",),
        "labels": owner.as_labels(),
        "agent_volume": AGENT_STAND_IN,
        "memory_mb": 64,
    }
    return ContainerSpec(**{**fields, **changes})


async def read_all(stream: AttachedStream) -> dict[int, bytes]:
    found: dict[int, bytes] = {1: b"", 2: b""}
    while (piece := await stream.read()) is not None:
        found[piece[0]] += piece[1]
    return found


async def read_line(stream: AttachedStream) -> str:
    line = b""
    while not line.endswith(b"\n"):
        piece = await stream.read()
        assert piece is not None, f"the stream ended after {line!r}"
        assert piece[0] == STDOUT, piece
        line += piece[1]
    return line.decode().rstrip("\n")


def run_inside(engine: Engine, owner: OwnerLabels, script: str, **changes: Any) -> str:
    """Run a shell script as PID 1; give its output and errors together."""

    async def run() -> str:
        launched = await launch(engine, spec_of(owner, "/bin/sh", "-c", script, **changes))
        try:
            found = await read_all(launched.stream)
        finally:
            await launched.stream.close()
            await asyncio.to_thread(engine.remove, launched.id)
        return (found[1] + found[2]).decode()

    return asyncio.run(run())


def with_container(
    engine: Engine,
    spec: ContainerSpec,
    body: Callable[[Launched], Coroutine[Any, Any, T]],
) -> T:
    """Launch, run the body, and remove the container."""

    async def run() -> T:
        launched = await launch(engine, spec)
        try:
            return await body(launched)
        finally:
            await launched.stream.close()
            await asyncio.to_thread(engine.remove, launched.id)

    return asyncio.run(run())


def start_python(
    body: str, *args: object, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start another process of ours."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, args)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_of(engine: Engine, cluster: str) -> list[str]:
    """Name the containers, volumes and networks that a cluster has left."""
    wanted = {"label": f"{CLUSTER}={cluster}"}
    return [
        *(found.name for found in engine.list_containers({CLUSTER: cluster})),
        *(found["Name"] for found in engine.api.volumes(filters=wanted)["Volumes"] or []),
        *(found["Name"] for found in engine.api.networks(filters=wanted)),
    ]
