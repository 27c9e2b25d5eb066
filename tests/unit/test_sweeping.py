"""When nodes are swept: the decision, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from ray_backend.sandbox.sweeping import INTERVAL_S, MAX_INTERVAL_S, SETTLE_S, NodeSweeper


class World:
    """Nodes, seats, leases and sweeps; a sweep ends when it is told how."""

    def __init__(self) -> None:
        self.now = 0.0
        self.leases: set[str] = set()
        self.seats: dict[str, set[str]] = {}
        self.nodes = {"a", "b"}
        self.begun: list[str] = []
        self.ended: dict[int, Exception | None] = {}
        self.sweeper = NodeSweeper(self, self, lambda: self.leases, lambda: self.now)

    # the store

    def list_seats(self) -> dict[str, set[str]]:
        return {node: set(names) for node, names in self.seats.items() if names}

    def leave_seat(self, node_id: str, actor_name: str) -> None:
        self.seats[node_id].discard(actor_name)

    def list_seen_nodes(self) -> Collection[str]:
        return list(self.seats)

    def forget_node(self, node_id: str) -> None:
        self.seats.pop(node_id, None)

    # the sweeps

    def live_nodes(self) -> Collection[str]:
        return self.nodes

    def begin(self, node_id: str) -> int:
        self.begun.append(node_id)
        return len(self.begun) - 1

    def done(self, task: Any) -> bool:
        return task in self.ended

    def result(self, task: Any) -> Sequence[str]:
        error = self.ended[task]
        if error is not None:
            raise error
        return ()

    # the test

    def end(self, error: Exception | None = None) -> None:
        self.ended[len(self.begun) - 1] = error
        self.sweeper.look()

    def after(self, seconds: float) -> int:
        """Let time pass, looking every second; give how many sweeps have begun."""
        before = len(self.begun)
        for _ in range(int(seconds)):
            self.now += 1
            self.sweeper.look()
        return len(self.begun) - before


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_without_seats(world: World):
    assert world.after(1000) == 0


def test_a_session_that_ended_is_swept_for_twice(world: World):
    world.seats = {"a": {"dead"}}
    world.sweeper.look()
    assert world.begun == ["a"]
    assert world.after(100) == 0  # one at a time, however long it takes
    world.end()
    assert world.seats == {"a": {"dead"}}
    assert world.after(SETTLE_S) == 1
    world.end()
    assert world.seats == {"a": set()}
    assert world.after(1000) == 0


def test_live_sessions_at_intervals(world: World):
    world.seats, world.leases = {"a": {"live"}}, {"live"}
    assert world.after(INTERVAL_S - 1) == 0
    assert world.after(2) == 1
    world.end()
    assert world.after(INTERVAL_S - 1) == 0
    assert world.after(2) == 1
    world.leases = set()  # it ends while a sweep runs, which does not count for it
    world.end()
    assert world.after(1) <= 1
    assert world.begun == ["a"] * 3
    world.end()
    assert world.after(SETTLE_S) == 1
    world.end()
    assert world.seats == {"a": set()}


def test_one_opened_again_keeps_its_seat(world: World):
    world.seats = {"a": {"named"}}
    world.sweeper.look()
    world.end()
    world.after(SETTLE_S)
    world.leases = {"named"}
    world.end()
    assert world.seats == {"a": {"named"}}


def test_failures_are_tried_again_ever_later(world: World):
    world.seats = {"a": {"dead"}, "b": {"live"}}
    world.leases = {"live"}
    world.nodes = {"a"}
    world.sweeper.look()
    waits = []
    for _ in range(9):
        world.end(RuntimeError("no engine"))
        waited = 0
        while not world.after(1):
            waited += 1
            assert waited <= MAX_INTERVAL_S
        waits.append(waited)
    assert waits == sorted(waits)
    assert waits[0] <= SETTLE_S
    assert waits[-1] >= MAX_INTERVAL_S - 2
    world.end()
    assert world.after(SETTLE_S) == 1
    world.end()
    assert not world.seats["a"]


def test_a_node_that_left(world: World):
    world.seats = {"a": {"dead"}, "c": {"dead"}}
    world.sweeper.look()
    assert world.begun == ["a"]
    assert world.seats == {"a": {"dead"}}
    world.nodes = set()
    world.end(RuntimeError("its node died"))
    world.sweeper.forget_dead_nodes()
    assert world.seats == {}
    assert world.after(1000) == 0
