"""Room that is lost after planning, room that never comes, and nodes that die under an instance."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from apothic.errors import (
    InstanceClosedError,
    InstanceLostError,
    NoMatchingOfferError,
    PlacementTimeoutError,
)
from ray_backend import ray_api, readiness
from ray_backend.manager import instance_names
from tests.cluster.conftest import MIB, Nodes
from tests.support import eventually, threads_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Define = Callable[..., Any]


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setenv(readiness.PLACEMENT_TIMEOUT_VARIABLE, "2")
    return 2.0


def seat(inst: Any) -> ray_api.ActorSeat:
    found = ray_api.actor_seat(inst.actor._actor_id.hex())
    assert found is not None
    return found


@contextlib.contextmanager
def queued(nodes: Nodes, cls: Any) -> Iterator[Any]:
    """Start an instance where there is no room, and give its future once its actor queues."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cls.new)
        eventually(lambda: any(each.waits for each in ray_api.actor_seats("PENDING_CREATION")))
        yield future


def test_all_who_race_for_the_cheapest_find_room(nodes: Nodes, define: Define) -> None:
    """Seven start at once where seven GPUs are, two of them at the cheapest offer."""
    cls = define(min_vram_gb=15)
    with ThreadPoolExecutor(7) as pool, contextlib.ExitStack() as stack:
        found = list(pool.map(lambda _: stack.enter_context(cls.new()), range(7)))
        where = sorted(nodes.name(each.node.remote()) for each in found)
        assert where == ["bare", "bare", "large", "large", "small", "t4", "t4"]
        assert len(instance_names()) == 7


def test_what_queues_goes_where_room_comes_first(nodes: Nodes, define: Define) -> None:
    cls = define(gpu=["T4", "A100"], gpu_count=2)
    with cls.new() as first, contextlib.ExitStack() as stack:
        assert nodes.name(first.node.remote()) == "t4"
        second = stack.enter_context(cls.new())
        assert nodes.name(second.node.remote()) == "large"
        with queued(nodes, cls) as future:
            waiting = next(each for each in ray_api.actor_seats("PENDING_CREATION") if each.waits)
            assert "offer:t4" in waiting.resources  # the cheapest that could ever fit
            second.close()
            third = stack.enter_context(future.result(timeout=60))
            assert nodes.name(third.node.remote()) == "large"
        assert len(instance_names()) == 2


def test_who_waits_in_vain_is_told_who_holds_the_room(
    nodes: Nodes, define: Define, short_wait: float
) -> None:
    cls = define(gpu="T4", gpu_count=2)
    with cls.named("the-holder") as holder:
        began = time.monotonic()
        with pytest.raises(PlacementTimeoutError) as caught:
            cls.new()
        assert time.monotonic() - began < short_wait + 5
        assert "'the-holder'" in str(caught.value)
        assert "within 2 s" in str(caught.value)
        assert instance_names() == [f"{holder.handle.app}:Probe:the-holder"]
        holder.close()
    with cls.new() as inst:  # nothing of the one that gave up is left
        assert nodes.name(inst.node.remote()) == "t4"


def test_giving_up_on_what_somebody_else_made_leaves_it_alone(
    nodes: Nodes, define: Define, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = define(gpu="T4", gpu_count=2)
    with cls.new() as blocker, ThreadPoolExecutor(1) as pool:
        future = pool.submit(cls.named, "wanted")
        eventually(lambda: any(each.waits for each in ray_api.actor_seats("PENDING_CREATION")))
        eventually(lambda: threads_in("_wait_once"))  # with a limit of its own by now
        monkeypatch.setenv(readiness.PLACEMENT_TIMEOUT_VARIABLE, "1")
        with pytest.raises(PlacementTimeoutError):
            cls.named("wanted")
        monkeypatch.delenv(readiness.PLACEMENT_TIMEOUT_VARIABLE)
        blocker.close()
        with future.result(timeout=60) as inst:
            assert nodes.name(inst.node.remote()) == "t4"
            inst.close()


def test_closing_one_that_waits_takes_no_time(nodes: Nodes, define: Define) -> None:
    cls = define(gpu="T4", gpu_count=2)
    with cls.new(), ThreadPoolExecutor(1) as pool:
        future = pool.submit(cls.named, "waits")
        eventually(lambda: any(each.waits for each in ray_api.actor_seats("PENDING_CREATION")))
        began = time.monotonic()
        cls.close_named("waits")
        assert time.monotonic() - began < 5
        with pytest.raises(InstanceClosedError):
            future.result(timeout=60)


def test_a_named_instance_comes_back_on_another_node_of_its_offer(
    nodes: Nodes, define: Define
) -> None:
    for key in ("twin-1", "twin-2"):
        nodes.add_offer("twin", key=key, labels={"apothic.io/country": "AQ"})
    cls = define(geolocation="AQ")
    inst = cls.named("twin")
    first = nodes.name(inst.node.remote())
    other = {"twin-1": "twin-2", "twin-2": "twin-1"}[first]
    nodes.kill(first)
    assert nodes.name(eventually(lambda: call(inst), 60)) == other
    assert inst.inspect().restarts == 1
    inst.close()
    nodes.forget(other)


def call(inst: Any) -> str | None:
    """Call once; None where the call was lost with its node."""
    try:
        return str(inst.node.remote())
    except InstanceLostError:
        return None


@pytest.mark.parametrize("offer", [True, False], ids=["offer", "node-ids"])
def test_a_named_instance_whose_nodes_are_all_gone_comes_back_elsewhere(
    nodes: Nodes, define: Define, offer: bool
) -> None:
    """On a node that joins later, and with the arguments that it was made with."""
    from apothic import App, method

    app = App(f"later-{offer}")

    @app.cls(cpu=0, memory_mb=10, min_cpu_cores=20)
    class Keeper:
        def __init__(self, word: str) -> None:
            self.word = word

        @method()
        def where(self) -> tuple[str, str]:
            return self.word, str(ray.get_runtime_context().get_node_id())

    def ask(inst: Any) -> Any:
        with contextlib.suppress(InstanceLostError):
            return inst.where.remote()

    def add(name: str) -> None:
        if offer:
            nodes.add_offer(name, num_cpus=20)
        else:
            nodes.add(name, num_cpus=20)

    add("only")
    inst = Keeper.named("kept", "a word")
    assert inst.where.remote() == ("a word", nodes.id("only"))
    nodes.kill("only")
    add("later")
    assert eventually(lambda: ask(inst), 60) == ("a word", nodes.id("later"))
    assert Keeper.named("kept").where.remote() == ("a word", nodes.id("later"))
    assert len(instance_names()) == 1
    inst.close()
    nodes.forget("later")


def test_what_nothing_qualifies_for_any_more_is_told_so(
    nodes: Nodes, define: Define, short_wait: float
) -> None:
    nodes.add("brief", num_cpus=20, memory=256 * MIB)
    cls = define(min_cpu_cores=20, memory_mb=200)
    with cls.new() as inst, ThreadPoolExecutor(1) as pool:
        assert nodes.name(inst.node.remote()) == "brief"
        future = pool.submit(cls.new)
        eventually(lambda: any(each.waits for each in ray_api.actor_seats("PENDING_CREATION")))
        nodes.kill("brief")
        with pytest.raises(NoMatchingOfferError, match="min_cpu_cores"):
            future.result(timeout=60)
