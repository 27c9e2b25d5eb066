"""Two creators of one name: whoever wins, all that is kept of the instance is the winner's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from apothic import App, method
from apothic.backend import StartRequest
from apothic.digests import digest_of
from ray_backend import launch as launching
from ray_backend.actors.plan import InstancePlan
from ray_backend.launch import INLINE_BYTES, launch
from ray_backend.placement.live import ClusterView
from ray_backend.sandbox.plan import SandboxPlan
from tests.placement.nodes import node
from tests.unit.memory_registry import MemoryRegistry

NAME = "launch:Box:one"
NODES = [node("1", gpus=1, gpu="H100")]

app = App("launch")


@app.cls(cpu=0, memory_mb=10, gpu="H100")
class Box:
    @method()
    def ping(self) -> None:
        pass


class Cluster:
    """Stands for Ray's actors: who comes first has the name."""

    def __init__(self) -> None:
        self.registry = MemoryRegistry()
        self.plans: dict[str, InstancePlan] = {}
        self.named: dict[str, Any] = {}

    def find(self, name: str) -> InstancePlan | None:
        return self.plans.get(name)

    def actor_class(self, *_: object) -> Cluster:
        return self

    def options(self, *, name: str, get_if_exists: bool = False, **options: object) -> Cluster:
        self.named = {"name": name, "get_if_exists": get_if_exists}
        return self

    def remote(self, plan: InstancePlan) -> InstancePlan:
        name = self.named["name"]
        if name in self.plans and not self.named["get_if_exists"]:
            raise ValueError(f"The name {name} is already taken.")
        return self.plans.setdefault(name, plan)

    def launch(self, arguments: bytes, meanwhile: Callable[[], object] = lambda: None) -> None:
        def view() -> ClusterView:
            meanwhile()
            return ClusterView(NODES)

        request = StartRequest(
            spec=Box.spec,
            instance_id="one",
            named=True,
            reuse=True,
            arguments=arguments,
            arguments_digest=digest_of(arguments),
        )
        launch(self.registry, request, NAME, Box.spec.digest, view)

    def loaded(self) -> bytes | None:
        """Give the arguments that the actor finds."""
        plan = self.plans[NAME]
        if plan.arguments is not None:
            return plan.arguments
        key = self.registry.arguments_key(plan.actor_name, plan.arguments_digest)
        return self.registry.get_blob(key)


@pytest.fixture(params=["driver", "client"])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    made.registry.put_lease(NAME, {})  # it comes before the actor
    monkeypatch.setattr(launching, "find_actor", made.find)
    monkeypatch.setattr(launching, "_actor_class", made.actor_class)
    monkeypatch.setattr(launching, "is_client_mode", lambda: request.param == "client")
    return made


@pytest.mark.parametrize("size", [1, INLINE_BYTES + 1])
def test_the_winners_arguments_and_plan_are_kept(cluster: Cluster, size: int) -> None:
    winner, loser = b"w" * size, b"l" * size
    cluster.launch(loser, meanwhile=lambda: cluster.launch(winner))
    assert cluster.loaded() == winner
    plan = cluster.plans[NAME]
    record = cluster.registry.get_revival(NAME)
    if record is None:
        assert plan.keeps_revival  # the actor itself stores it, where nobody is told who made it
        record = plan.revival(Box.spec.model_dump_json())
    kept, text = pickle.loads(record)
    assert kept == plan
    assert text == Box.spec.model_dump_json()


def test_nothing_is_kept_of_an_instance_that_was_forgotten(cluster: Cluster) -> None:
    arguments = b"a" * (INLINE_BYTES + 1)
    cluster.launch(b"l" + arguments, meanwhile=lambda: cluster.launch(arguments))
    other = cluster.registry.arguments_key(NAME + "1", "digest")
    cluster.registry.put_blob(other, b"of another")
    cluster.registry.forget_lease(NAME)
    assert cluster.registry.list_blobs() == [other]
    assert cluster.registry.list_revivals() == []


def test_a_name_that_was_freed_meanwhile_leaves_no_revival(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cluster.remote

    def make_and_close(plan: InstancePlan) -> InstancePlan:
        actor = made(plan)
        cluster.registry.forget_lease(NAME)
        return actor

    monkeypatch.setattr(cluster, "remote", make_and_close)
    cluster.launch(b"a")
    assert cluster.registry.list_revivals() == []


def test_arguments_are_swept_with_the_lease() -> None:
    registry = MemoryRegistry()
    keys = {registry.arguments_key(name, "0" * 64) for name in ("a:B:1", "a:B:2")}
    for key in keys:
        registry.put_blob(key, b"arguments")
    registry.put_lease("a:B:1", {})
    assert registry.sweep_blobs(registry.sweep_blobs(set())) == set()
    assert registry.list_blobs() == [registry.arguments_key("a:B:1", "0" * 64)]


def test_a_session_finds_its_own_variables() -> None:
    registry = MemoryRegistry()
    for digest in ("one", "two"):
        key = registry.arguments_key("a:~s:1", digest)
        registry.put_blob(key, pickle.dumps({b"WHO": digest.encode()}))

    def fetch(key: str) -> bytes:
        found = registry.get_blob(key)
        assert found is not None
        return found

    plan = SandboxPlan("a:~s:1", "c", "1", True, "", b"/", None, "two")
    assert plan.variables(fetch) == {b"WHO": b"two"}
