"""Many callers at once: one construction an id, and no result lost or mixed up."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from apothic import App, Retries, enter, method
from ray_backend.manager import instance_names, stop_actor
from tests.support import eventually, finish, read_line, running, start_driver, words

pytestmark = [pytest.mark.ray, pytest.mark.slow]

app = App("stress")


@app.cls(
    cpu=0,
    memory_mb=10,
    max_containers=3,
    tasks_per_container=2,
    max_pending_tasks=1000,
    retries=Retries(5, initial_delay=0.05),
)
class Squares:
    def __init__(self, pids: str) -> None:
        with open(pids, "a") as file:
            file.write(f"{os.getpid()}\n")

    @enter()
    def up(self) -> None:
        self.calls = 0

    @method()
    def square(self, n: int) -> tuple[int, int]:
        self.calls += 1
        return n, n * n


NAMED = """
import threading
seen = []
def name(i):
    seen.append(Logged.named(f"id-{i % 5}", f"{LOG}-{i % 5}").pid.remote())
print("READY", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=lambda k=k: [name(i) for i in range(k, 50, 4)]) for k in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(seen) == 50, len(seen)
print("PIDS", *sorted(set(seen)))
"""


def test_eight_processes_name_five_ids(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ExitStack() as stack:
        drivers = [
            stack.enter_context(running(start_driver(tmp_path, NAMED, log, address=ray_cluster)))
            for _ in range(8)
        ]
        for driver in drivers:
            read_line(driver, "READY")
        for driver in drivers:
            assert driver.stdin is not None
            driver.stdin.write("\n")
            driver.stdin.flush()
        seen = {finish(driver, 150).split("PIDS ")[1] for driver in drivers}
    assert len(seen) == 1  # every process met the same five
    assert len(seen.pop().split()) == 5
    for number in range(5):
        assert words(Path(f"{log}-{number}")) == ["init", "enter-one", "enter-two"]
    assert len(instance_names()) == 5
    with ThreadPoolExecutor(5) as threads:
        reports = list(threads.map(stop_actor, instance_names()))
    assert all(len(report["hooks"]) == 2 for report in reports)


def test_a_pool_loses_nothing_when_a_replica_is_killed(ray_cluster: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pool = Squares.bind(str(pids))

    def replicas(number: int) -> bool:
        assert pool.square.map(range(40)) == [(n, n * n) for n in range(40)]
        return len(pids.read_text().split()) == number

    done = 0
    lock = threading.Lock()
    reached = threading.Event()

    def caller(k: int) -> list[tuple[int, int]]:
        nonlocal done
        found = []
        for n in range(k * 250, (k + 1) * 250):
            found.append(pool.square.remote(n))
            with lock:
                done += 1
                if done == 700:
                    reached.set()
        return found

    try:
        eventually(lambda: replicas(3))
        with ThreadPoolExecutor(8) as threads:
            running_callers = [threads.submit(caller, k) for k in range(8)]
            assert reached.wait(120)
            alive = [int(line) for line in pids.read_text().split()]
            os.kill(alive[1], signal.SIGKILL)
            results = [pair for future in running_callers for pair in future.result(120)]
        assert Counter(results) == Counter((n, n * n) for n in range(2000))

        eventually(lambda: replicas(4))  # the killed one is replaced
    finally:
        pool.close()
