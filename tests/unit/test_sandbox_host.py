"""`SandboxHost` on a workspace in memory: what it watches over while the session is there."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from typing_extensions import override

from apothic import App
from apothic.errors import SandboxLostError, SandboxNetworkError
from ray_backend.sandbox import actor, containers, host
from ray_backend.sandbox.containers import NodeSurroundings, SessionContainer
from ray_backend.sandbox.engine.images import ImageDefaults
from ray_backend.sandbox.engine.network import public_nodes
from ray_backend.sandbox.host import SandboxHost
from ray_backend.sandbox.plan import SandboxPlan
from tests.docker.support import new_owner
from tests.unit.test_sandbox_core import Memory


class Inside(Memory):
    async def wait_lost(self) -> SandboxLostError:
        return await asyncio.Future()


class Container(SessionContainer):
    """One that is there without an engine."""

    @override
    async def workspace(self, label: str, *, resync: bool) -> Any:
        return Inside()

    @override
    async def remove(self) -> None: ...


class Node:
    """A node: whether it has the container, the cluster's nodes, and what the packet filter blocks."""

    def __init__(self) -> None:
        self.addresses = ["10.0.0.1"]
        self.found = False
        self.opened_with: frozenset[str] = frozenset()
        self.failing: list[Exception] = []
        self.asked = 0
        self.set: list[list[str]] = []
        self.slow: threading.Event | None = None
        self.plan = plan_of("internet")

    def node_addresses(self) -> list[str]:
        self.asked += 1
        if self.failing:
            raise self.failing.pop()
        return self.addresses

    def set_rules(
        self, engine: object, owner: object, blocked: Callable[[], Sequence[str]]
    ) -> frozenset[str]:
        addresses = list(blocked())
        self.set.append(addresses)
        if self.slow is not None:
            assert self.slow.wait(10)
        return public_nodes(addresses)

    def container(self, public: frozenset[str] | None) -> Container:
        lacking: Any = None  # an engine, its stream
        return Container(
            lacking, "id", "name", lacking, None, ImageDefaults.__new__(ImageDefaults),
            new_owner(), None, self.plan.network == "internet", 64, public,
        )  # fmt: skip

    async def find(self, *args: object) -> Container | None:
        return self.container(None) if self.found else None

    async def open(self, *args: object, **more: object) -> Container:
        return self.container(self.opened_with)

    def host(self) -> SandboxHost:
        around = NodeSurroundings(
            owner=new_owner(),
            node_id="here",
            gpu_ids=(),
            fetch=lambda digest: b"",
            secret=lambda name: None,
            pin_volume=lambda name: "here",
            node_addresses=self.node_addresses,
        )
        return SandboxHost(self.plan, around)


def plan_of(network: Any) -> SandboxPlan:
    spec = App("app").sandbox(name="s", network=network).spec
    return SandboxPlan("a:~s:1", "c", "1", True, spec.model_dump_json(), b"/", pickle.dumps({}), "")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()
    monkeypatch.setattr(host, "find_container", node.find)
    monkeypatch.setattr(host, "open_container", node.open)
    monkeypatch.setattr(host, "NODES_LOOK_S", 0)
    monkeypatch.setattr(containers, "refresh_internet", node.set_rules)
    return node


async def looks(node: Node, count: int) -> None:
    """Wait until the cluster was asked so many times more, and all but the last are acted on."""
    goal = node.asked + count
    while node.asked < goal:
        await asyncio.sleep(0)


def test_a_node_that_joins_later_is_blocked_once(node: Node) -> None:
    async def live() -> None:
        session = node.host()
        await session.start()
        await looks(node, 3)
        node.addresses = ["10.0.0.1", "10.0.0.2"]  # private: closed in any case
        await looks(node, 3)
        assert node.set == []
        node.addresses = ["10.0.0.1", "8.8.4.4"]
        await looks(node, 5)
        assert node.set == [["10.0.0.1", "8.8.4.4"]]
        node.addresses = ["10.0.0.1"]
        await looks(node, 5)
        assert node.set[1:] == [["10.0.0.1"]]
        await session.stop()
        before = node.asked
        for _ in range(10):
            await asyncio.sleep(0)
        assert node.asked == before
        assert session.left_nothing

    asyncio.run(live())


def test_nothing_is_set_again_that_was_set_as_it_opened(node: Node) -> None:
    node.addresses = ["8.8.4.4"]
    node.opened_with = public_nodes(node.addresses)

    async def live() -> None:
        session = node.host()
        await session.start()
        await looks(node, 3)
        assert node.set == []
        await session.stop()

    asyncio.run(live())


def test_one_that_is_found_again_is_looked_after_at_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what the filter was set with, nor who has joined since."""
    monkeypatch.setattr(host, "NODES_LOOK_S", 1000)
    node.found = True

    async def live() -> None:
        session = node.host()
        await session.start()
        while not node.set:
            await asyncio.sleep(0)
        await session.stop()
        assert node.set == [["10.0.0.1"]]

    asyncio.run(live())


def test_a_failure_is_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.addresses = ["8.8.4.4"]

    async def live() -> None:
        session = node.host()
        node.failing = [SandboxNetworkError("no rules"), RuntimeError("the GCS is away")]
        await session.start()
        await looks(node, 6)
        assert node.set == [["8.8.4.4"]]
        assert session.state == "ready"
        await session.stop()
        assert not session.left_nothing  # the engine failed: a sweep is to look

    asyncio.run(live())


def test_the_end_waits_for_rules_that_are_being_set(node: Node) -> None:
    node.addresses = ["8.8.4.4"]
    node.slow = threading.Event()

    async def live() -> None:
        session = node.host()
        await session.start()
        while not node.set:
            await asyncio.sleep(0)
        stopping = asyncio.ensure_future(session.stop())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not stopping.done()
        assert node.slow is not None
        node.slow.set()
        await stopping
        assert session.state == "closed"

    asyncio.run(live())


def test_a_session_without_a_network_asks_for_no_nodes(node: Node) -> None:
    node.plan = plan_of("none")

    async def live() -> None:
        session = node.host()
        await session.start()
        for _ in range(10):
            await asyncio.sleep(0)
        await session.stop()

    asyncio.run(live())
    assert node.asked == 0


def test_dead_nodes_stay_blocked_but_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"NodeManagerAddress": address, "Alive": alive}
        for address, alive in (
            ("8.8.4.4", False),
            ("8.8.8.8", True),
            ("8.8.8.8", False),
            ("live.example", True),
            ("dead.example", False),
        )
    ]
    monkeypatch.setattr(actor, "live_nodes", lambda: nodes)
    assert actor._node_addresses() == ["8.8.4.4", "8.8.8.8", "live.example"]
