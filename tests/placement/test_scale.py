"""Ten thousand nodes and two hundred offers, in the time that they may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from ray_backend.placement.demand import Plan
from ray_backend.placement.live import Placement
from ray_backend.placement.live import place as place_on
from tests.placement.nodes import place
from tests.placement.scale import (
    ASKED,
    CHOOSY,
    PLACING_S,
    PLAN_S,
    cluster,
    partly_free,
    title,
    unlabelled,
    view_of_a_hundred_nodes,
)

T = TypeVar("T")

ROUNDS = 100


def takes_at_most(limit_s: float, function: Callable[[], T]) -> T:
    """See that the best of several runs is within the limit, and give its result.

    Whatever else the machine does can only make a run longer, so one that is short enough proves
    that the function is. The time is that of the thread, which goes on only while it runs.
    """
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        result = function()
        best = min(best, time.thread_time() - start)
        if best <= limit_s:
            return result
    raise AssertionError(f"the best of {ROUNDS} runs took {best:.4f} s, above {limit_s} s")


@pytest.fixture(scope="module")
def nodes() -> list[dict[str, Any]]:
    return cluster(10_000, 200)


@pytest.mark.parametrize("constraints", ASKED, ids=title)
@pytest.mark.parametrize("busy", [False, True])
def test_a_plan_over_ten_thousand_nodes_is_quick(
    nodes: list[dict[str, Any]], constraints: dict[str, Any], busy: bool
):
    free = partly_free(nodes) if busy else None
    found = takes_at_most(PLAN_S, lambda: place(nodes, free, **constraints))
    assert isinstance(found, Plan)


def test_nodes_without_any_label_are_no_slower():
    plain = unlabelled(10_000)
    takes_at_most(PLAN_S, lambda: place(plain, gpu="A100", min_cpu_cores=9))


def test_a_plan_over_a_hundred_nodes_costs_little():
    few = cluster(100, 20)
    takes_at_most(PLACING_S, lambda: place(few, gpu="A100", max_cost_per_hour_usd=2))


def test_placing_on_a_hundred_nodes_adds_little_to_a_creation():
    """All that a creation does beyond asking Ray: plan with what is free and what is registered."""
    view = view_of_a_hundred_nodes()

    def creation() -> Placement:
        found = place_on(view, CHOOSY)
        found.ray_options()
        return found

    assert takes_at_most(PLACING_S, creation).choice.room
