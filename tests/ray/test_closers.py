"""Several who close an instance, and one who starts another under its name."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from apothic import App, exit, method
from ray_backend.leases import PINNED
from ray_backend.manager_link import ManagerLink
from ray_backend.names import NAMESPACE
from ray_backend.registry import Registry
from tests.support import eventually

app = App("closers")


@app.cls(cpu=0, memory_mb=10)
class Slow:
    def __init__(self, log: str = "") -> None:
        self.log = log

    @method()
    def answer(self) -> int:
        return 42

    @exit()
    def leave(self) -> None:
        if self.log:
            Path(self.log).touch()
            time.sleep(1)


def actor_id_of(name: str) -> str:
    return ray.get_actor(name, namespace=NAMESPACE)._actor_id.hex()


def test_a_late_closer_leaves_the_next_its_lease(ray_cluster: str):
    """It closes an instance that is gone, while somebody is about to make another of the name."""
    manager, name = ManagerLink(), "closers:Slow:late"
    first = Slow.named("late")
    actor_id = actor_id_of(name)
    assert first.close().closed
    record: dict[str, Any] = {"app": "closers", "cls": "Slow", "named": True, "spec_digest": "x"}
    assert manager.ask(lambda each: each.acquire.remote(name, PINNED, record))
    assert not manager.close(name, actor_id).closed
    assert Registry().get_lease(name) is not None
    second = Slow.named("late")
    assert not manager.close(name, actor_id).closed
    assert second.answer.remote() == 42
    assert second.close().closed


def test_two_closers_at_once_stop_it_once(ray_cluster: str, tmp_path: Path):
    """And who starts another as soon as the first is told of the end keeps it."""
    manager, name = ManagerLink(), "closers:Slow:twice"
    for number in range(5):
        log = tmp_path / f"left-{number}"
        Slow.named("twice", str(log))
        actor_id = actor_id_of(name)
        with ThreadPoolExecutor(3) as threads:
            closers = [threads.submit(manager.close, name, actor_id)]
            eventually(log.exists)
            closers += [threads.submit(manager.close, name, id) for id in (actor_id, None)]
            assert closers[0].result().closed
            again = Slow.named("twice")
            assert [each.result().closed for each in closers[1:]] == [False, False]
        assert Registry().get_lease(name) is not None
        assert again.answer.remote() == 42
        assert again.close().closed
