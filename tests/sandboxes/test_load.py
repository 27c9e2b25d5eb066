"""A hundred sessions live at once on whatever cores there are: no failure, nothing left, and figures."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from apothic import App, SandboxSession
from ray_backend.sandbox.engine.connection import Engine
from tests.sandboxes.left import see_nothing_left
from tests.sandboxes.test_direct import IMAGE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SESSIONS = 100
EXECS = 20
CREATED_AT_ONCE = 10
MEMORY_MB = 256
MEASURED = 10
MIB = 1024**2


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no Pss of {pid}")


@pytest.mark.timeout(400)
def test_a_hundred_sessions_run_side_by_side(
    ray_cluster: str,
    docker_engine: Engine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sandbox = App("load").sandbox(
        name="load", image=IMAGE, cpu=0, memory_mb=MEMORY_MB, max_containers=SESSIONS
    )
    exec_ms: list[float] = []

    def work(numbered: tuple[int, SandboxSession]) -> None:
        number, session = numbered
        for turn in range(EXECS):
            began = time.perf_counter()
            result = session.exec(["/bin/echo", str(number), str(turn)])
            exec_ms.append((time.perf_counter() - began) * 1e3)
            assert result.stdout == f"{number} {turn}\n"

    def memory_mib(session: SandboxSession) -> float:
        container = docker_engine.memory(session.inspect().container_id or "")
        assert container is not None
        pid = ray.get(session.actor.apothic_status.remote())["pid"]
        return pss_mib(pid) + container.used_bytes / MIB

    sessions: list[SandboxSession] = []
    try:
        with ThreadPoolExecutor(CREATED_AT_ONCE) as threads:
            began = time.perf_counter()
            for made in [threads.submit(sandbox.create) for _ in range(SESSIONS)]:
                sessions.append(made.result())
            created_s = time.perf_counter() - began
        with ThreadPoolExecutor(SESSIONS) as threads:
            list(threads.map(work, enumerate(sessions)))
        assert {session.inspect().state for session in sessions} == {"ready"}
        memory = [memory_mib(session) for session in sessions[:MEASURED]]
    finally:
        with ThreadPoolExecutor(CREATED_AT_ONCE) as threads:
            list(threads.map(lambda session: session.close(), sessions))
    assert len(exec_ms) == SESSIONS * EXECS
    see_nothing_left(docker_engine)
    ordered = sorted(exec_ms)
    figures = {
        "sessions_per_s": SESSIONS / created_s,
        "exec_p50_ms": statistics.median(ordered),
        "exec_p95_ms": ordered[int(0.95 * len(ordered))],
        "memory_mib": statistics.median(memory),
    }
    with capsys.disabled():
        print(f"\n{SESSIONS} sessions:", *(f"{key} {value:.1f}" for key, value in figures.items()))
