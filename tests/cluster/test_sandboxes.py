"""Sandboxes on several nodes: steered as classes are, moved as they are, bound to a node when named."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from apothic import Sandbox, SandboxSession, Volume
from apothic.backend import connect
from apothic.errors import (
    NoMatchingOfferError,
    PlacementTimeoutError,
    SandboxLostError,
    SandboxStartError,
)
from ray_backend import ray_api, readiness
from ray_backend.manager import instance_names
from ray_backend.registry import Registry
from tests.cluster.conftest import Nodes
from tests.cluster.test_steering import STEERING
from tests.support import eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.docker]

Define = Callable[..., Sandbox]

FULL_T4 = r"^  t4 +1 +0\.\d USD/h +no$"
"""The row of a table for the offer that has no room."""


def node_of(nodes: Nodes, session: SandboxSession) -> str:
    """Name the node that a session's actor is on, and see that it works."""
    assert session.exec("echo here", shell=True).stdout == "here\n"
    node_id = session.inspect().node_id
    assert node_id in {each["NodeID"] for each in ray.nodes() if each["Alive"]}
    return nodes.name(node_id)


def gpus_of(nodes: Nodes, session: SandboxSession) -> list[str]:
    """Give the GPUs that the engine was asked for; there is one request, and it names devices."""
    asked = nodes.engine.devices_of(session.inspect().container_id)
    if asked is None:
        return []
    [request] = asked
    assert "Count" not in request
    assert request["Capabilities"] == [["gpu"]]
    return list(request["DeviceIDs"])


def kill_process(session: SandboxSession) -> None:
    """Kill the process of a session's actor, and wait until the session takes verbs again."""
    actor_id = session.actor._actor_id.hex()
    before = ray_api.actor_record(actor_id)
    os.kill(before["Pid"], signal.SIGKILL)
    eventually(lambda: ray_api.actor_record(actor_id)["NumRestarts"] > before["NumRestarts"])
    with contextlib.suppress(SandboxLostError):  # one that was on its way
        session.exec("true")


def waits() -> bool:
    return any(each.waits for each in ray_api.actor_seats("PENDING_CREATION"))


# -- where they go ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("constraints", "node"), STEERING, ids=str)
def test_each_parameter_steers(
    nodes: Nodes, sandbox: Define, constraints: dict[str, Any], node: str
) -> None:
    box = sandbox(**constraints)
    with box.create() as session:
        assert node_of(nodes, session) == node
        assert len(gpus_of(nodes, session)) == box.options.constraints.num_gpus


def test_the_next_when_full_and_each_its_own_gpu(nodes: Nodes, sandbox: Define) -> None:
    box = sandbox(gpu=["T4", "A100"])
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(box.create()) for _ in range(3)]
        assert [node_of(nodes, each) for each in found] == ["t4", "t4", "small"]
        first, second, third = (gpus_of(nodes, each) for each in found)
        assert sorted([*first, *second]) == ["0", "1"]
        assert third == ["0"]
        assert re.search(FULL_T4, box.explain(), re.MULTILINE)


def test_a_node_added_later_and_gpus_by_the_names_that_the_node_gives_them(
    nodes: Nodes, sandbox: Define
) -> None:
    box = sandbox(gpu="H100")
    before = len(Registry().list_leases())
    began = time.monotonic()
    with pytest.raises(NoMatchingOfferError) as caught:
        box.create()
    assert time.monotonic() - began < 1
    assert str(caught.value) in box.explain()
    row = r"^  t4 +1 +gpu +T4 with 16 GB \(by name\) +H100$"
    assert re.search(row, str(caught.value), re.MULTILINE)
    assert len(Registry().list_leases()) == before
    visible = {"CUDA_VISIBLE_DEVICES": "4,GPU-5a"}
    nodes.add_offer("late-gpu", "H100", num_gpus=2, environment=visible)
    try:
        with box.create() as first, box.named("second") as second:
            assert node_of(nodes, first) == node_of(nodes, second) == "late-gpu"
            found = sorted([*gpus_of(nodes, first), *gpus_of(nodes, second)])
            assert found == ["4", "GPU-5a"]
            second.close()
    finally:
        nodes.forget("late-gpu")


def test_an_engine_without_gpus_says_what_helps(
    nodes: Nodes, sandbox: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.engine, "takes_gpus", False)
    with pytest.raises(SandboxStartError, match="install nvidia-container-toolkit on the node"):
        sandbox(gpu="T4").create()


def test_a_host_local_volume_ties_to_its_node(nodes: Nodes, sandbox: Define) -> None:
    name = f"tied-{time.monotonic_ns()}"
    volumes = {"/data": Volume.vast_local(name, size_gb=1)}
    try:
        with sandbox(geolocation="FR", volumes=volumes).create() as session:
            assert node_of(nodes, session) == "small"
            session.write_text("/data/word", "kept")
        with sandbox(volumes=volumes).named("tied") as session:
            assert node_of(nodes, session) == "small"
            assert session.read_text("/data/word") == "kept"
            session.close()
        with pytest.raises(NoMatchingOfferError, match="geolocation"):
            sandbox(geolocation="US", volumes=volumes).create()
    finally:
        Volume.from_name(name).delete()


# -- waiting for room ------------------------------------------------------------------------------


def test_what_queues_goes_where_room_comes_first(nodes: Nodes, sandbox: Define) -> None:
    box = sandbox(gpu=["T4", "A100"], gpu_count=2)
    with box.create() as first, box.create() as second, ThreadPoolExecutor(2) as pool:
        assert (node_of(nodes, first), node_of(nodes, second)) == ("t4", "large")
        futures = [pool.submit(box.create), pool.submit(box.named, "queued")]
        seats = eventually(
            lambda: (
                found
                if len(found := [s for s in ray_api.actor_seats("PENDING_CREATION") if s.waits])
                == 2
                else None
            )
        )
        assert all("offer:t4" in seat.resources for seat in seats)  # the cheapest that fits
        second.close()
        eventually(lambda: any(future.done() for future in futures), 60)
        [late] = [future for future in futures if future.done()]
        assert node_of(nodes, late.result()) == "large"
        first.close()
        with futures[0].result(60) as third, futures[1].result(60) as fourth:
            assert sorted([node_of(nodes, third), node_of(nodes, fourth)]) == ["large", "t4"]
            assert len(gpus_of(nodes, third)) == len(gpus_of(nodes, fourth)) == 2
            assert len(instance_names()) == 2
            fourth.close()


def test_who_waits_in_vain_is_told_who_holds_the_room(
    nodes: Nodes, sandbox: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(readiness.PLACEMENT_TIMEOUT_VARIABLE, "2")
    box = sandbox(gpu="T4", gpu_count=2)
    with box.named("the-holder") as holder:
        for ask in (box.create, lambda: box.named("other")):
            with pytest.raises(PlacementTimeoutError) as caught:
                ask()
            assert f"held by: {box.label} 'the-holder'" in str(caught.value)
            assert re.search(FULL_T4, str(caught.value), re.MULTILINE)
            assert [each.sandbox_id for each in connect().list_sandboxes()] == ["the-holder"]
        holder.close()


# -- staying on a node, and losing it ----------------------------------------------------------------


@pytest.fixture
def pair(nodes: Nodes) -> Iterator[dict[str, str]]:
    """Two nodes alike; the one of each that the other is not."""
    for key in ("pair-1", "pair-2"):
        nodes.add_offer("pair", key=key, labels={"apothic.io/country": "IS"})
    yield {"pair-1": "pair-2", "pair-2": "pair-1"}
    for key in ("pair-1", "pair-2"):
        nodes.forget(key)


@ray.remote
class Blocker:
    """Takes room."""

    def ready(self) -> None: ...


def block(node_id: str, num_cpus: int) -> Any:
    at = NodeAffinitySchedulingStrategy(node_id, soft=False)
    blocker = Blocker.options(num_cpus=num_cpus, scheduling_strategy=at).remote()  # type: ignore[attr-defined]
    ray.get(blocker.ready.remote())
    return blocker


def test_named_sessions_stay_with_their_container_and_are_lost_with_their_node(
    nodes: Nodes, sandbox: Define, pair: dict[str, str]
) -> None:
    # One that found room at once comes back on its node, though the other one has more.
    box = sandbox(cpu=1, geolocation="IS")
    named = box.named("stays")
    home = node_of(nodes, named)
    named.write_text("/word", "kept")
    blocker = block(nodes.id(home), 3)
    for restarts in (1, 2):
        kill_process(named)
        assert named.read_text("/word") == "kept"
        assert node_of(nodes, named) == home
        assert named.inspect().restarts == restarts
    ray.kill(blocker)

    # One that waited for room anywhere is bound to the node that it got.
    other = pair[home]
    blockers = {each: block(nodes.id(each), cpus) for each, cpus in ((home, 3), (other, 4))}
    wide = sandbox(cpu=2, geolocation="IS")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(wide.named, "waited")
        eventually(waits)
        ray.kill(blockers[other])
        waited = future.result(60)
    assert node_of(nodes, waited) == other
    waited.write_text("/word", "kept")
    ray.kill(blockers[home])
    blocker = block(nodes.id(other), 2)
    kill_process(waited)
    assert waited.read_text("/word") == "kept"
    assert node_of(nodes, waited) == other
    ray.kill(blocker)
    waited.close()

    # Its node dies under it, and under an unnamed one.
    blocker = block(nodes.id(other), 4)
    unnamed = box.create()
    assert node_of(nodes, unnamed) == home
    ray.kill(blocker)
    home_id = nodes.id(home)
    with ThreadPoolExecutor(2) as pool:
        verbs = [pool.submit(each.exec, "sleep 100") for each in (named, unnamed)]
        eventually(lambda: all(each.inspect().running_calls for each in (named, unnamed)))
        nodes.kill(home)
        for verb in verbs:
            with pytest.raises(SandboxLostError, match=f"its node {home_id} died") as caught:
                verb.result(60)
            assert "Open another session." in str(caught.value)
    for lost in (named, unnamed):
        with pytest.raises(SandboxLostError, match=f"its node {home_id} died"):
            lost.exec("true")
    again = box.named("stays")
    assert node_of(nodes, again) == other
    assert not again.exists("/word")
    assert [each.sandbox_id for each in connect().list_sandboxes()] == ["stays"]
    assert Registry().list_revivals() == []
    again.close()
    eventually(lambda: not Registry().list_leases(), 40)


def visits(nodes: Nodes, name: str) -> int:
    """Count the actors of sessions that were on a node."""
    return sum(
        each.class_name == "SandboxActor" and each.node_id == nodes.id(name)
        for each in ray_api.actor_seats()
    )


def test_a_node_without_an_engine_is_passed_over(nodes: Nodes, sandbox: Define) -> None:
    """Also one that would be the first choice; and not looked at again for a while."""
    nowhere = {"DOCKER_HOST": "unix:///none/docker.sock"}
    labels = {"apothic.io/country": "AQ", "apothic.io/cost-per-hour-usd": "0.1"}
    nodes.add_offer("dry", environment=nowhere, labels=labels)
    second = {**labels, "apothic.io/cost-per-hour-usd": "0.2"}
    nodes.add_offer("also-dry", environment=nowhere, labels=second)
    nodes.add_offer("wet", labels={**labels, "apothic.io/cost-per-hour-usd": "9"})
    try:
        box = sandbox(geolocation="AQ")
        with box.create() as session:
            assert node_of(nodes, session) == "wet"
            assert visits(nodes, "dry") == visits(nodes, "also-dry") == 1
            with box.create() as second, box.named("third") as third:
                assert node_of(nodes, second) == node_of(nodes, third) == "wet"
                third.close()
            assert visits(nodes, "dry") == visits(nodes, "also-dry") == 1
        eventually(lambda: not Registry().list_seats().get(nodes.id("dry")))
        nodes.kill("wet")
        for _ in range(2):
            with pytest.raises(SandboxStartError, match=r"no Docker socket /none/docker\.sock"):
                box.create()
            with pytest.raises(SandboxStartError, match=r"no Docker socket /none/docker\.sock"):
                box.named("fourth")
    finally:
        nodes.forget("dry")
        nodes.forget("also-dry")
        nodes.forget("wet")
