from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import (
    CLUSTER,
    NAMESPACE,
    OWNER,
    RAYLET,
    SESSION,
    OwnerLabels,
    RayletId,
)
from ray_backend.sandbox.engine.link import LinkOffer
from ray_backend.sandbox.engine.sweep import is_doomed, sweep
from tests.docker.support import BUSYBOX, new_owner, spec_of, start_python
from tests.support import as_root, read_line, running

ALIVE = RayletId(1, 2, 3)
DEAD = RayletId(4, 5, 6)


@pytest.mark.parametrize(
    ("cluster", "namespace", "session", "raylet", "doomed"),
    [
        ("ours", "ns", "live", ALIVE, False),
        ("ours", "ns", "dead", ALIVE, True),
        ("ours", "ns", "live", DEAD, False),
        ("ours", "ns", "dead", DEAD, True),
        ("ours", "ns", "", ALIVE, False),
        ("ours", "ns", "", DEAD, True),
        ("ours", "other", "dead", DEAD, False),
        ("other", "ns", "dead", ALIVE, False),
        ("other", "ns", "live", DEAD, True),
        ("other", "ns", "", DEAD, True),
        ("other", "other", "dead", DEAD, False),
    ],
)
def test_decision(cluster: str, namespace: str, session: str, raylet: RayletId, doomed: bool):
    owner = OwnerLabels(cluster, namespace, raylet, session, "actor")
    assert OwnerLabels.from_labels(owner.as_labels()) == owner
    found = is_doomed(
        owner,
        cluster_id="ours",
        namespace="ns",
        live_sessions=["live"],
        raylet_alive=lambda one: one == ALIVE,
    )
    assert found is doomed


def test_labels_that_are_not_all_ours():
    labels = OwnerLabels("c", "n", ALIVE, "s", "a").as_labels()
    for name in (CLUSTER, NAMESPACE, RAYLET, SESSION, OWNER):
        assert OwnerLabels.from_labels({k: v for k, v in labels.items() if k != name}) is None
    for raylet in ("", "1:2", "0:2:3", "1:2:3:4", "a:b:c", "-1:2:3"):
        assert OwnerLabels.from_labels({**labels, RAYLET: raylet}) is None


def test_raylet_id():
    mine = RayletId.of_process(os.getpid())
    assert RayletId.parse(str(mine)) == mine
    assert mine.is_alive()
    assert not RayletId(mine.pid, mine.start_ticks + 1, mine.namespace).is_alive()  # pid reused
    assert RayletId(mine.pid, mine.start_ticks + 1, 1).is_alive()  # not for us to tell
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = RayletId.of_process(ended.pid)
    assert other.is_alive()
    ended.communicate()
    assert not other.is_alive()
    with pytest.raises(ProcessLookupError):
        RayletId.of_process(ended.pid)


@pytest.fixture
def dead_raylet() -> RayletId:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    raylet = RayletId.of_process(process.pid)
    process.communicate()
    return raylet


def test_on_the_engine(engine: Engine, owner: OwnerLabels, dead_raylet: RayletId):
    """Containers of every row, running and not; foreign ones with labels much like ours."""
    mine, theirs = owner.cluster, new_owner().cluster
    created: dict[str, str] = {}

    def make(name: str, whose: OwnerLabels, *, start: bool = False, drop: str = "") -> None:
        labels = {key: value for key, value in whose.as_labels().items() if key != drop}
        container = engine.create_container(spec_of(whose, keep=True, labels=labels))
        created[name] = container.id
        if start:
            engine.start(container.id)

    try:
        make("live", new_owner("live", cluster=mine), start=True)
        make("live of a dead raylet", new_owner("live", cluster=mine, raylet=dead_raylet))
        make("dead running", new_owner("dead", cluster=mine), start=True)
        make("dead created", new_owner("dead", cluster=mine))
        make("other cluster alive", new_owner("dead", cluster=theirs), start=True)
        make("other cluster dead", new_owner("x", cluster=theirs, raylet=dead_raylet), start=True)
        make(
            "other namespace",
            new_owner("x", cluster=theirs, namespace="other", raylet=dead_raylet),
        )
        make("foreign", new_owner("dead", cluster=mine), start=True, drop=OWNER)
        created["plain"] = engine.api.create_container(
            BUSYBOX, "sleep 100", labels={SESSION: "dead", "com.example": mine}
        )["Id"]
        asked = []

        def live() -> list[str]:
            asked.append(1)
            return ["live"]

        swept = sweep(engine, live, mine, "tests")
        gone = {name for name, container in created.items() if engine.inspect(container) is None}
        assert gone == {"dead running", "dead created", "other cluster dead"}
        assert len(swept.containers) == 3
        assert len(asked) > 1
        assert sweep(engine, live, mine, "tests").containers == ()
    finally:
        for container in created.values():
            engine.remove(container)


def test_a_lease_that_comes_meanwhile(engine: Engine, owner: OwnerLabels):
    """Between the listing and the removal the session became live: it stays."""
    container = engine.create_container(spec_of(owner, keep=True))
    answers = [["session-1"]]
    try:
        sweep(engine, lambda: answers[-1], owner.cluster, "tests")
        assert engine.inspect(container.id) is not None
    finally:
        engine.remove(container.id)


OFFER = """
from ray_backend.sandbox.engine.link import LinkOffer
offer = LinkOffer()
print(offer.directory, flush=True)
input()
"""


@as_root
def test_links_of_the_dead(
    engine: Engine, owner: OwnerLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A process that is killed leaves its directory; those of the living and of others stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {"TMPDIR": str(tmp_path)}
    with (
        contextlib.closing(LinkOffer()) as mine,
        running(start_python(OFFER, env=environment)) as living,
        running(start_python(OFFER, env=environment)) as killed,
    ):
        kept, left = (Path(read_line(process, "")) for process in (living, killed))
        killed.kill()
        killed.wait()
        strangers = tmp_path / f"{left.name}-strangers"
        strangers.mkdir()
        os.chown(strangers, 1234, 1234)
        assert os.listdir(left) == os.listdir(kept) == ["s"]
        assert sweep(engine, list, owner.cluster, "tests").links == (str(left),)
        assert {path.name for path in tmp_path.iterdir()} == {
            kept.name,
            strangers.name,
            Path(mine.directory).name,
        }
