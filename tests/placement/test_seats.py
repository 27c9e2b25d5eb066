"""Who holds the room, and whether an actor that waits has its room already."""

from __future__ import annotations

from typing import Any

from apothic.constraints import PlacementConstraints
from ray_backend.names import NAMESPACE
from ray_backend.placement.demand import plan
from ray_backend.placement.live import ClusterView
from ray_backend.placement.seats import holders, may_be_starting
from ray_backend.ray_api import ActorSeat
from tests.placement.nodes import GIB, node, node_id


def seat(name: str = "app:Model:a%2Fb", on: str = "g", **changes: Any) -> ActorSeat:
    return ActorSeat(
        **{
            "actor_id": name,
            "name": name,
            "namespace": NAMESPACE,
            "class_name": "Shell",
            "state": "ALIVE",
            "node_id": node_id(on),
            "seated": True,
            "resources": {"CPU": 1.0, "GPU": 1.0},
            "label_selector": {},
            "runtime_env": {},
            "unschedulable": False,
            "death": "",
            "end_unix_ms": 0,
            **changes,
        }
    )


NODES = [node("g", gpus=2, gpu="T4"), node("c")]


def test_holders_are_those_with_room_on_the_nodes_that_would_do():
    found = plan(PlacementConstraints.check(gpu="T4"), cpu=1, memory_mb=1024, nodes=NODES)
    seats = [
        seat(),
        seat("app:Model:elsewhere", on="c"),
        seat("app:~shell:box"),
        seat("app:Model:dead", state="DEAD"),
        seat("app:Model:queues", seated=False, state="PENDING_CREATION"),
        seat("apothic-manager-v1", resources={}),
        seat("", namespace="other", class_name="Trainer"),
        seat("theirs", namespace="other", class_name="Trainer"),
    ]
    assert holders(found, seats) == [
        "Ray actor Trainer",
        "Ray actor Trainer 'theirs'",
        "app.Model 'a/b'",
        "app.shell 'box'",
    ]


def view(**free: float) -> ClusterView:
    full = {"CPU": 8.0, "memory": 32.0 * GIB, "GPU": 2.0, "accelerator_type:T4": 1.0}
    return ClusterView(NODES, {node_id("g"): {**full, **free}})


WAITS = seat("app:Model:w", seated=False, state="PENDING_CREATION")


def test_what_nobody_accounts_for_may_be_its_own():
    assert may_be_starting(WAITS, view(CPU=7.0, GPU=1.0), [WAITS])
    assert may_be_starting(WAITS, view(CPU=6.0, GPU=0.0), [WAITS, seat()])


def test_it_queues_where_others_hold_all_that_is_used():
    others = [seat("app:Model:1"), seat("app:Model:2")]
    assert not may_be_starting(WAITS, view(CPU=6.0, GPU=0.0), [WAITS, *others])
    assert not may_be_starting(WAITS, view(), [WAITS])
    gone = seat("app:Model:w", on="gone", seated=False, state="PENDING_CREATION")
    assert not may_be_starting(gone, view(), [gone])


def test_where_nothing_is_known_it_is_given_time():
    assert may_be_starting(WAITS, ClusterView(NODES, None), [WAITS])
