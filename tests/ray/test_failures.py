"""What is left, and what callers see, when processes die: workers, the manager, native code."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from apothic import App, enter, exit, method
from apothic.errors import (
    FunctionTimeoutError,
    InstanceClosedError,
    InstanceLostError,
    InstanceStartError,
    JobCancelledError,
)
from ray_backend.manager import instance_names
from ray_backend.names import MANAGER_NAME, NAMESPACE
from ray_backend.registry import Registry
from tests.support import eventually, finish, process_is_gone, running, start_driver, words

pytestmark = pytest.mark.ray

app = App("failures")


@app.cls(cpu=0, memory_mb=10, timeout_s=1, max_pending_tasks=1000)
class Fragile:
    def __init__(self, log: str = "/dev/null") -> None:
        self.log = log
        self.note("init")
        self.count = 0

    def note(self, word: str) -> None:
        with open(self.log, "a") as file:
            file.write(word + "\n")

    @enter()
    def up(self) -> None:
        self.note("enter")

    @exit()
    def down(self) -> None:
        self.note("exit")

    @method()
    def pid(self) -> int:
        return os.getpid()

    @method()
    def add(self, n: int = 1) -> int:
        self.count += n
        return self.count

    @method()
    def sleep(self, seconds: float) -> float:
        self.note("sleep")
        time.sleep(seconds)
        return seconds

    @method()
    def spin(self) -> None:
        self.note("spin")
        while True:
            pass

    @method()
    def stuck(self) -> None:
        self.note("stuck")
        ctypes.CDLL(None).sleep(60)

    @method()
    def stuck_with_lock(self) -> None:
        self.note("stuck_with_lock")
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter lock, as a C extension may

    @method()
    def backtrack(self) -> None:
        self.note("backtrack")
        re.match(r"(a|aa)+$", "a" * 60 + "b")

    @method()
    def hold_lock(self, seconds: int) -> int:
        ctypes.PyDLL(None).sleep(seconds)
        return seconds


@app.cls(cpu=0, memory_mb=10, timeout_s=1)
class FragileAsync:
    @method()
    async def sleep(self, seconds: float) -> float:
        import asyncio

        await asyncio.sleep(seconds)
        return seconds

    @method()
    def sync_sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @method()
    async def pid(self) -> int:
        return os.getpid()


# -- kill -9 of the worker -----------------------------------------------------------------------


def test_named_instance_comes_back(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    inst = Fragile.named("back", str(log))
    inst.add.remote(5)
    for number in range(1, 4):
        os.kill(inst.pid.remote(), signal.SIGKILL)
        # A call that meets the dying process counts as in flight; the first one after it works.
        eventually(lambda: words(log) == ["init", "enter"] * (number + 1))  # noqa: B023
        assert inst.add.remote(1) == 1  # on a new object
        assert inst.inspect().restarts == number
        assert words(log) == ["init", "enter"] * (number + 1)
    inst.close()
    assert words(log)[-1] == "exit"


def test_named_instance_comes_back_by_itself(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    inst = Fragile.named("itself", str(log))
    os.kill(inst.pid.remote(), signal.SIGKILL)
    eventually(lambda: words(log) == ["init", "enter"] * 2)
    inst.close()


def test_call_in_flight_is_lost(ray_cluster: str) -> None:
    inst = Fragile.named("flight")
    pid = inst.pid.remote()
    job = inst.sleep.spawn(0.9)
    eventually(lambda: inst.inspect().running_calls == 1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(InstanceLostError, match="comes back by itself"):
        job.get()
    assert inst.add.remote() == 1
    inst.close()


def test_unnamed_instance_is_lost(ray_cluster: str) -> None:
    inst = Fragile.new()
    os.kill(inst.pid.remote(), signal.SIGKILL)
    for _ in range(3):
        with pytest.raises(InstanceLostError):
            inst.add.remote()
    inst.close()


def test_bound_instance_is_replaced(ray_cluster: str) -> None:
    inst = Fragile.bind()
    os.kill(inst.pid.remote(), signal.SIGKILL)
    with pytest.raises(InstanceLostError):
        inst.add.remote()
    assert inst.add.remote() == 1
    inst.close()


def test_ray_kill_from_outside(ray_cluster: str) -> None:
    inst = Fragile.named("outside")
    ray.kill(inst.actor)
    with pytest.raises((InstanceClosedError, InstanceLostError)):
        inst.add.remote()
    fresh = Fragile.named("outside")
    assert fresh.add.remote() == 1
    fresh.close()


# -- processes that end before they are ready -----------------------------------------------------


@app.cls(cpu=0, memory_mb=10)
class Doomed:
    def __init__(self, log: str, ends: int) -> None:
        with open(log, "a") as file:
            file.write("init\n")
        if len(Path(log).read_text().split()) in range(*divmod(ends, 10)):
            os._exit(3)

    @method()
    def pid(self) -> int:
        return os.getpid()


@pytest.mark.parametrize("kind", ["new", "named", "remote"])
def test_constructor_that_ends_the_process(ray_cluster: str, tmp_path: Path, kind: str) -> None:
    log = tmp_path / "log"
    arguments = (str(log), 9)  # ends every time
    with pytest.raises(InstanceStartError, match="process ended while it was constructed"):
        Doomed.named("doomed", *arguments) if kind == "named" else getattr(Doomed, kind)(*arguments)
    eventually(lambda: not instance_names())
    assert words(log) == ["init"]


def test_named_instance_that_cannot_come_back_is_given_up(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    inst = Doomed.named("doomed-later", str(log), 29)  # the second time to the eighth
    os.kill(inst.pid.remote(), signal.SIGKILL)
    eventually(lambda: not instance_names())
    assert words(log) == ["init"] * 4
    with pytest.raises((InstanceLostError, InstanceClosedError)):
        inst.pid.remote()


def test_named_instance_gets_a_second_chance(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    inst = Doomed.named("doomed-once", str(log), 23)  # the second time only
    os.kill(inst.pid.remote(), signal.SIGKILL)
    eventually(lambda: words(log) == ["init"] * 3)
    assert inst.pid.remote()
    inst.close()


# -- time limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sleep", "spin"])
def test_python_code_is_interrupted_and_state_kept(
    ray_cluster: str, tmp_path: Path, verb: str
) -> None:
    log = tmp_path / "log"
    inst = Fragile.new(str(log))
    inst.add.remote(41)
    pid = inst.pid.remote()
    began = time.monotonic()
    with pytest.raises(FunctionTimeoutError, match=r"timeout_s=1 ") as caught:
        getattr(inst, verb).remote(*([60] if verb == "sleep" else []))
    assert time.monotonic() - began < 1 + 3
    assert not caught.value.state_lost
    assert (inst.add.remote(1), inst.pid.remote()) == (42, pid)
    assert words(log) == ["init", "enter", verb]  # never run twice
    inst.close()


@pytest.mark.parametrize(
    ("kind", "verb"),
    [("new", "stuck"), ("named", "stuck"), ("named", "stuck_with_lock"), ("new", "backtrack")],
)
def test_native_code_has_its_process_replaced(
    ray_cluster: str, tmp_path: Path, kind: str, verb: str
) -> None:
    log = tmp_path / "log"
    inst = Fragile.new(str(log)) if kind == "new" else Fragile.named("native", str(log))
    inst.add.remote(41)
    pid = inst.pid.remote()
    began = time.monotonic()
    with pytest.raises(FunctionTimeoutError, match="lost") as caught:
        getattr(inst, verb).remote()
    assert time.monotonic() - began < 1 + 12
    assert caught.value.state_lost
    if verb != "stuck":
        assert f"in {verb}" in str(caught.value)  # the stack says where
    assert inst.add.remote(1) == 1
    assert process_is_gone(pid)
    assert words(log) == ["init", "enter", verb, "init", "enter"]
    inst.close()


def test_only_the_overdue_call_is_said_to_have_timed_out(ray_cluster: str) -> None:
    inst = Fragile.named("queue")
    inst.pid.remote()
    stuck, queued = inst.stuck_with_lock.spawn(), inst.pid.spawn()
    with pytest.raises(FunctionTimeoutError):
        stuck.get()
    with pytest.raises(InstanceLostError):
        queued.get()
    inst.close()


def test_keeping_the_lock_within_the_limit_is_no_fault(ray_cluster: str) -> None:
    inst = Fragile.new()
    pid = inst.pid.remote()
    inst.sleep.remote(0.1, timeout_s=0.5)  # the guard was set for less time
    assert inst.hold_lock.remote(7, timeout_s=8) == 7
    assert inst.hold_lock.remote(1, timeout_s=2) == 1
    assert inst.pid.remote() == pid
    inst.close()


def test_an_idle_instance_is_left_alone(ray_cluster: str) -> None:
    inst = Fragile.new()
    pid = inst.pid.remote()
    job = Fragile.new()
    job.hold_lock.remote(7, timeout_s=8)  # longer than a guard that nobody took back would wait
    job.close()
    assert inst.pid.remote() == pid
    inst.close()


def test_async_call_is_cancelled(ray_cluster: str) -> None:
    inst = FragileAsync.new()
    pid = inst.pid.remote()
    for verb in ("sleep", "sync_sleep"):
        with pytest.raises(FunctionTimeoutError):
            getattr(inst, verb).remote(60)
    assert inst.pid.remote() == pid
    inst.close()


def test_limit_of_one_call(ray_cluster: str) -> None:
    inst = Fragile.new()
    assert inst.sleep.remote(1.2, timeout_s=5) == 1.2
    with pytest.raises(FunctionTimeoutError, match=r"timeout_s=0\.2"):
        inst.sleep.remote(60, timeout_s=0.2)
    inst.close()


def test_queueing_is_not_counted(ray_cluster: str) -> None:
    inst = Fragile.new()
    jobs = [inst.sleep.spawn(0.4) for _ in range(5)]
    assert [job.get() for job in jobs] == [0.4] * 5
    inst.close()


def test_cancelling(ray_cluster: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    inst = Fragile.new(str(log))
    running_job = inst.sleep.spawn(60, timeout_s=90)
    queued = inst.add.spawn(1)
    eventually(lambda: words(log)[-1:] == ["sleep"])
    queued.cancel()
    running_job.cancel()
    for job in (running_job, queued):
        with pytest.raises(JobCancelledError):
            job.get()
        assert job.status == "cancelled"
    assert inst.add.remote(1) == 1
    inst.close()


# -- the manager -----------------------------------------------------------------------------------


def manager_pid() -> int:
    from ray_backend.ray_api import actor_record

    actor = ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    return int(actor_record(actor._actor_id.hex())["Pid"])


def test_losing_the_manager_loses_nothing(ray_cluster: str, tmp_path: Path) -> None:
    instances = [Fragile.named(f"m{i}") for i in range(5)] + [Fragile.new() for _ in range(5)]
    before = {name: Registry().get_lease(name) for name in Registry().list_leases()}
    stop = threading.Event()
    failures: list[BaseException] = []
    calls = 0

    def call() -> None:
        nonlocal calls
        while not stop.is_set():
            for inst in instances:
                try:
                    inst.add.remote()
                    calls += 1
                except BaseException as error:
                    failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    pid = manager_pid()
    os.kill(pid, signal.SIGKILL)
    # An orphan, made while there is no manager: a driver leases an instance and is killed.
    body = "inst = Logged.new(LOG)\nprint(inst.pid.remote(), flush=True)\nos.kill(os.getpid(), 9)"
    log = tmp_path / "log"
    with running(start_driver(tmp_path, body, log, address=ray_cluster)) as driver:
        driver.wait(timeout=60)
    eventually(lambda: words(log)[-1:] == ["exit-three"])
    eventually(lambda: manager_pid() != pid)
    stop.set()
    thread.join()
    assert failures == []
    assert calls > 0
    # The orphan's ends behind its exit hook.
    eventually(
        lambda: {name: Registry().get_lease(name) for name in Registry().list_leases()} == before
    )
    for inst in instances:
        inst.close()


def test_actor_without_a_lease_is_swept(ray_cluster: str) -> None:
    inst = Fragile.named("loose")
    (name,) = instance_names()
    os.kill(manager_pid(), signal.SIGKILL)
    Registry().forget_lease(name)  # as if the store had lost it while the manager was away
    eventually(lambda: not instance_names())
    with pytest.raises((InstanceClosedError, InstanceLostError)):
        inst.add.remote()


def test_interrupted_creation_leaves_nothing(ray_cluster: str, tmp_path: Path) -> None:
    """A driver is killed between lease and actor: the lease goes, and no actor comes."""
    body = (
        "import ray_backend.lifecycle as lifecycle\n"
        "lifecycle.launch = lambda *a: os.kill(os.getpid(), 9)\n"
        "Logged.new(LOG)\n"
    )
    with running(start_driver(tmp_path, body, tmp_path / "log", address=ray_cluster)) as driver:
        driver.wait(timeout=60)
    eventually(lambda: not Registry().list_leases(), 30)
    assert not instance_names()


def test_creation_that_is_refused_leaves_nothing(ray_cluster: str, tmp_path: Path) -> None:
    body = (
        "import ray_backend.lifecycle as lifecycle\n"
        "def fail(*a): raise KeyboardInterrupt\n"
        "lifecycle.launch = fail\n"
        "try:\n    Logged.named('k', LOG)\n"
        "except KeyboardInterrupt:\n    print('INTERRUPTED')\n"
    )
    with running(start_driver(tmp_path, body, tmp_path / "log", address=ray_cluster)) as driver:
        assert "INTERRUPTED" in finish(driver)
    assert not Registry().list_leases()
