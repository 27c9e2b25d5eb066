"""What is the engine for tests' own: its beginning and end, and what one process makes of the rest."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from apothic import App, Image, Secret, Volume, backend, enter, exit, method
from apothic.errors import (
    ConnectionFailedError,
    HandleError,
    InstanceClosedError,
    InstanceNotFoundError,
    InstanceStartError,
)
from apothic.testing import FakeControlPlane, fake_engine
from tests.support import eventually

app = App("fake")
ENDED: list[str] = []


@app.cls()
class Counter:
    def __init__(self, name: str = "") -> None:
        self.name = name
        self.count = 0

    @method()
    def add(self, n: int = 1) -> int:
        self.count += n
        return self.count

    @method()
    def wait(self, path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)

    @method()
    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    @method()
    def items(self) -> Iterator[int]:
        yield from range(10**6)

    @exit()
    def down(self) -> None:
        ENDED.append(self.name)


@pytest.fixture(autouse=True)
def _no_threads_are_left() -> Iterator[None]:
    ENDED.clear()
    before = set(threading.enumerate())
    yield
    eventually(
        lambda: all(
            thread.name.startswith(("apothic-aio", "apothic-scale-down"))
            for thread in set(threading.enumerate()) - before
        )
    )


def test_the_end_closes_everything_side_by_side(tmp_path: Path) -> None:
    began = time.monotonic()
    with fake_engine() as engine:
        boxes = [Counter.named(f"n{number}", f"n{number}") for number in range(5)]
        boxes.append(Counter.new("new"))
        jobs = [box.wait.spawn(str(tmp_path / "gate")) for box in boxes]
        stream = boxes[0].items.remote_gen()
        eventually(lambda: all(box.inspect().running_calls for box in boxes))
        opener = threading.Timer(0.5, (tmp_path / "gate").touch)  # while all of them are closing
        opener.start()
    assert sorted(ENDED) == ["n0", "n1", "n2", "n3", "n4", "new"]
    assert all(job.get() is None for job in jobs)
    assert time.monotonic() - began < 8
    assert engine.list_instances() == []
    with pytest.raises(InstanceClosedError):
        next(stream)
    with pytest.raises(InstanceClosedError):
        boxes[0].add.remote()
    opener.join()


def test_nothing_starts_after_the_end() -> None:
    with fake_engine() as engine:
        box = Counter.named("a")
    late = App("there", client=engine).cls()(Counter.local_cls)
    with pytest.raises(ConnectionFailedError, match="disconnected"):
        late.new()
    with pytest.raises(InstanceNotFoundError):
        late.attach(box.handle.model_copy(update={"app": "there"}))
    engine.disconnect()  # idempotent


def test_the_engine_before_comes_back_even_after_an_error() -> None:
    def raise_within() -> None:
        with fake_engine() as inner:
            assert backend.connect() is inner
            Counter.new("lost")
            raise KeyError

    with fake_engine() as outer:
        with pytest.raises(KeyError):
            raise_within()
        assert backend.connect() is outer
        assert ENDED == ["lost"]


def test_every_engine_is_a_cluster_of_its_own() -> None:
    with fake_engine():
        handle = Counter.named("a").handle
        Secret.create("TOKEN", "x")
        App("deployed").deploy()
    with fake_engine() as engine:
        assert engine.list_apps() == engine.list_secrets() == []
        with pytest.raises(HandleError, match="cluster"):
            Counter.attach(handle)
        assert Counter.named("a").add.remote() == 1


def test_two_engines_at_once() -> None:
    with fake_engine() as one, fake_engine() as two:
        first = App("fake", client=one).cls()(Counter.local_cls).named("a")
        second = App("fake", client=two).cls()(Counter.local_cls).named("a")
        assert first.add.remote(5) == 5
        assert second.add.remote() == 1


def test_an_engine_can_be_handed_in_without_being_in_place() -> None:
    engine = FakeControlPlane()
    try:
        mine = App("mine", client=engine).cls()(Counter.local_cls)
        assert mine.new().add.remote() == 1
        assert len(engine.list_instances()) == 1
    finally:
        engine.disconnect()
    assert ENDED == [""]


def test_the_object_itself_can_be_looked_at() -> None:
    with fake_engine(), Counter.new("x") as counter:
        counter.add.remote(3)
        assert counter.actor.count == 3


def test_killing_what_does_not_live() -> None:
    with fake_engine() as engine:
        handle = Counter.new().handle
        Counter.close_handle(handle)
        with pytest.raises(InstanceNotFoundError):
            engine.kill(handle)


def test_variables_are_set_while_somebody_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "before")
    image = Image.debian_slim().env(FAKE_MODE="image", FAKE_OTHER="1")
    with fake_engine():
        service = App("env").cls(image=image)(Counter.local_cls)
        with service.new() as one:
            assert one.variable.remote("FAKE_MODE") == "image"
            with service.new():
                pass
            assert os.environ["FAKE_OTHER"] == "1"
        assert os.environ["FAKE_MODE"] == "before"
        assert "FAKE_OTHER" not in os.environ


def test_a_start_that_fails_undoes_what_it_had_set() -> None:
    class Fails:
        @enter()
        def up(self) -> None:
            raise KeyError(os.environ["TOKEN"])

        @method()
        def m(self) -> None: ...

    with fake_engine():
        secret = Secret.create("TOKEN", "x")
        with pytest.raises(InstanceStartError):
            App("env").cls(secrets=[secret])(Fails).new()
        assert "TOKEN" not in os.environ


def test_mount_paths_that_are_taken(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    free = tmp_path / "free"
    with fake_engine():

        def service(path: Path, name: str) -> object:
            volumes = {str(path): Volume.cloud(name)}
            return App("mounts").cls(volumes=volumes)(Counter.local_cls).new()

        with pytest.raises(InstanceStartError, match="exists and is not ours"):
            service(taken, "v")
        first = service(free, "v")
        second = service(free, "v")
        with pytest.raises(InstanceStartError, match="in use for 'v'"):
            service(free, "w")
        first.close()
        assert free.is_symlink()
        second.close()
        assert not os.path.lexists(free)
    assert sorted(tmp_path.iterdir()) == [taken]


def test_sleeping_outside_calls_is_untouched() -> None:
    plain = time.sleep
    with fake_engine(), fake_engine():
        with pytest.raises(ValueError, match="non-negative"):
            time.sleep(-1)
        with pytest.raises(TypeError):
            time.sleep("1")  # type: ignore[arg-type]
        time.sleep(0)
    assert time.sleep is plain


def test_it_loads_neither_ray_nor_docker() -> None:
    code = (
        "import sys, apothic.testing as t\n"
        "with t.fake_engine(): pass\n"
        "print([m for m in ('ray', 'docker', 'ray_backend') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_process_without_a_connection_loads_instances_and_connects_at_first_use() -> None:
    with fake_engine() as engine, Counter.new("far") as box:
        data = pickle.dumps([box, box])
        backend.use_client(None)
        try:
            first, second = pickle.loads(data)
            assert first is second
            assert first.handle == box.handle
            assert not ray.is_initialized()
        finally:
            backend.use_client(engine)
        assert "not attached" in repr(first)
        assert first.add.remote(2) == 2
        assert "not attached" not in repr(first)
