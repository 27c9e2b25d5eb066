"""Contract tests: what we use of Ray beyond its public API does what we take it for."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import exceptions as rays

from apothic import App, method
from ray_backend import ray_api
from ray_backend.registry import Registry
from ray_backend.translate import was_never_sent
from tests.support import eventually, read_line, running, start_driver

pytestmark = [pytest.mark.ray, pytest.mark.multiversion]

app = App("contracts")


@app.cls(cpu=0, memory_mb=10)
class Slow:
    def __init__(self, gate: str) -> None:
        eventually(lambda: os.path.exists(gate))
        self.count = 0

    @method()
    def add(self) -> int:
        self.count += 1
        return self.count

    @method()
    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class Plain:
    def task_id(self) -> str:
        return ray._private.worker.global_worker.current_task_id.hex()

    def stream(self):
        yield ray._private.worker.global_worker.current_task_id.hex()

    def session(self) -> str:
        return str(ray_api.session_directory())


def test_a_dead_actor_is_known_to_be_dead_before_the_next_call(ray_cluster: str) -> None:
    actor = Plain.remote()
    ray.get(actor.task_id.remote())
    assert not ray_api.is_known_dead(actor)
    ray.kill(actor)
    eventually(lambda: ray_api.is_known_dead(actor))
    with pytest.raises(rays.ActorDiedError):
        ray.get(actor.task_id.remote())


def test_a_killed_driver_is_no_live_job(ray_cluster: str, tmp_path: Path) -> None:
    body = (
        "import ray; app.client; print('JOB', ray.get_runtime_context().get_job_id(), flush=True)"
    )
    with running(
        start_driver(tmp_path, body + "\nsys.stdin.read()", "x", address=ray_cluster)
    ) as driver:
        job = read_line(driver, "JOB")
        assert job in ray_api.live_jobs()
        assert ray.get_runtime_context().get_job_id() in ray_api.live_jobs()
        driver.kill()
        eventually(lambda: job not in ray_api.live_jobs(), 5)


def test_actor_records(ray_cluster: str) -> None:
    actor = Plain.options(max_restarts=1).remote()
    ray.get(actor.task_id.remote())
    actor_id = actor._actor_id.hex()
    record = ray_api.actor_record(actor_id)
    assert record["State"] == "ALIVE"
    assert record["Address"]["NodeID"] == ray.get_runtime_context().get_node_id()
    assert ray_api.actor_is_alive(actor_id)
    assert ray_api.restart_count(actor_id) == 0
    os.kill(int(record["Pid"]), signal.SIGKILL)
    eventually(lambda: ray_api.restart_count(actor_id) == 1)
    ray.kill(actor)
    eventually(lambda: not ray_api.actor_is_alive(actor_id))
    assert ray_api.actor_record("ff" * 16) == {}


def test_free_resources_follow_what_runs(ray_cluster: str) -> None:
    node_id = ray.get_runtime_context().get_node_id()
    total = {node["NodeID"]: node["Resources"] for node in ray_api.live_nodes()}[node_id]

    def free(name: str) -> float:
        return ray_api.free_resources()[node_id].get(name, 0.0)

    eventually(lambda: free("CPU") == total["CPU"])
    actor = Plain.options(num_cpus=total["CPU"], memory=2**20).remote()
    ray.get(actor.task_id.remote())
    eventually(lambda: free("CPU") == 0)  # used up: Ray leaves it out
    assert free("memory") == total["memory"] - 2**20
    ray.kill(actor)
    eventually(lambda: free("CPU") == total["CPU"])


def _dead(actor: Any) -> ray_api.ActorSeat | None:
    seat = ray_api.actor_seat(actor._actor_id.hex())
    return seat if seat is not None and seat.state == "DEAD" else None


def test_seats_tell_who_queues_who_sits_and_who_cannot_be_placed(ray_cluster: str) -> None:
    node_id = ray.get_runtime_context().get_node_id()
    environment = {"env_vars": {"CONTRACT": "1"}}
    options = {"name": "seated", "namespace": "contract", "runtime_env": environment}
    actor = Plain.options(num_cpus=8, **options).remote()
    ray.get(actor.task_id.remote())
    seat = ray_api.actor_seat(actor._actor_id.hex())
    assert seat is not None
    assert seat in ray_api.actor_seats()
    assert (seat.name, seat.namespace, seat.class_name) == ("seated", "contract", "Plain")
    assert (seat.state, seat.node_id, seat.seated, seat.waits) == ("ALIVE", node_id, True, False)
    assert dict(seat.resources) == {"CPU": 8.0}
    assert seat.runtime_env["env_vars"] == environment["env_vars"]
    queuing = Plain.options(num_cpus=8).remote()
    key = queuing._actor_id.hex()
    eventually(
        lambda: [each.node_id for each in ray_api.actor_seats("PENDING_CREATION")] == [node_id]
    )
    waits = eventually(lambda: ray_api.actor_seat(key))
    assert waits in ray_api.actor_seats("PENDING_CREATION")
    assert waits.waits
    ray.kill(queuing)  # one without a process goes at once
    eventually(lambda: (ray_api.actor_seat(key) or waits).state == "DEAD")
    gone = Plain.options(num_cpus=0, label_selector={"ray.io/node-id": "f" * 56}).remote()
    eventually(lambda: (ray_api.actor_seat(gone._actor_id.hex()) or waits).unschedulable)
    ray.kill(actor)
    ended = eventually(lambda: _dead(actor))
    assert ended.node_id == node_id
    assert "ray.kill" in ended.death
    assert ray_api.actor_seat("ff" * 16) is None


def test_a_call_knows_its_task_id_as_its_reference_does(ray_cluster: str) -> None:
    actor = Plain.remote()
    ref = actor.task_id.remote()
    assert ray.get(ref) == ref.task_id().hex()
    stream = actor.stream.options(num_returns="streaming").remote()
    task_id = stream._generator_ref.task_id().hex()
    assert [ray.get(item) for item in stream] == [task_id]


def test_session_directory_is_the_nodes(ray_cluster: str) -> None:
    directory = ray_api.session_directory()
    assert (directory / "logs").is_dir()
    assert ray.get([Plain.remote().session.remote()]) == [str(directory)]


def test_kind_of_connection(ray_cluster: str) -> None:
    assert ray_api.is_own_cluster()
    assert not ray_api.is_client_mode()
    node = ray_api.live_nodes()[0]
    assert {"NodeID", "Alive", "Resources", "Labels"} <= node.keys()
    assert ray_api.connection_id() == ray_api.connection_id() != ""


def test_a_call_to_a_restarting_actor_was_never_sent(ray_cluster: str, tmp_path: Path) -> None:
    """Ray refuses it in words that we know, so that it is sent again and runs once."""
    gate = tmp_path / "gate"
    gate.touch()
    inst = Slow.named("restarting", str(gate))
    pid, actor = inst.pid.remote(), inst.actor
    gate.unlink()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: ray_api.actor_record(actor._actor_id.hex())["State"] == "RESTARTING")

    def is_refused() -> bool:
        with pytest.raises(rays.ActorUnavailableError) as caught:
            ray.get(actor.apothic_status.remote())
        return was_never_sent(caught.value)

    eventually(is_refused)  # this process may learn later than the GCS that it restarts
    job = inst.add.spawn()
    gate.touch()
    assert job.get() == 1
    assert inst.add.remote() == 2
    inst.close()


def test_putting_if_absent(ray_cluster: str) -> None:
    registry = Registry()
    assert registry.put_secret("contract", {"A": "1"}, overwrite=False)
    assert not registry.put_secret("contract", {"A": "2"}, overwrite=False)
    assert registry.get_secret("contract") == {"A": "1"}
    assert registry.delete_secret("contract")
    assert not registry.delete_secret("contract")
