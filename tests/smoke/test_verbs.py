"""One test a verb, on a real cluster; also run on the oldest supported Ray."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from apothic import App, Cls, Secret, enter, exit, method
from apothic.errors import (
    ConflictError,
    HandleError,
    InstanceClosedError,
    InstanceStartError,
    PendingTasksExceededError,
    RemoteError,
    SerializationError,
)
from ray_backend.manager import instance_names

pytestmark = [pytest.mark.ray, pytest.mark.multiversion]

app = App("smoke")


class OddError(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} against {right}")
        self.left = left


@app.cls(cpu=0, memory_mb=10, max_pending_tasks=5, tags=["t"], metadata={"m": 1})
class Box:
    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.db = sqlite3.connect(":memory:")

    @enter()
    def up(self) -> None:
        self.db.execute("create table seen (value)")

    @method()
    def add(self, n: int = 1) -> int:
        self.db.execute("insert into seen values (?)", (n,))
        self.value += n
        return self.value

    @method()
    def thread(self) -> int:
        return threading.get_ident()

    @method()
    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    @method()
    def fail(self, how: str) -> None:
        if how == "odd":
            raise OddError(1, 2)
        if how == "exit":
            raise SystemExit(3)
        if how == "unpicklable":
            error = ValueError("holds a lock")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error
        raise KeyError(how)

    @method()
    def lock(self) -> object:
        return threading.Lock()

    @method()
    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    @method()
    def secret(self) -> str | None:
        return os.environ.get("SMOKE_SECRET")

    @exit()
    def down(self) -> None:
        self.db.close()  # raises on any other thread


@app.cls(cpu=0, memory_mb=10, concurrent_requests=4)
class Aio:
    @method()
    async def add(self, a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    @method()
    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i


@app.cls(cpu=0, memory_mb=10)
class Broken:
    @enter()
    def up(self) -> None:
        raise OddError(3, 4)

    @method()
    def m(self) -> None: ...


def test_named_and_its_equals(ray_cluster: str) -> None:
    one = Box.named("one", 5)
    assert one.add.remote(2) == 7
    assert Box.named("one").add.remote() == 8
    with pytest.raises(ConflictError, match="other constructor arguments"):
        Box.named("one", 6)
    assert Cls.from_handle(one.handle_json).add.remote() == 9
    assert one.inspect().named
    report = one.close()
    assert [hook.name for hook in report.hooks] == ["down"]
    assert report.failed_hooks == ()
    assert not one.close().closed
    with pytest.raises(InstanceClosedError):
        one.add.remote()


def test_new_bind_remote_partial(ray_cluster: str) -> None:
    with Box.new(1) as new, Box.bind(2) as bound, Box.partial(3).remote() as remote:
        assert [i.add.remote() for i in (new, bound, remote)] == [2, 3, 4]
        assert Box.bind(2).add.remote() == 4
        assert len(instance_names()) == 3


def test_errors_come_as_themselves(ray_cluster: str) -> None:
    with Box.new() as box:
        with pytest.raises(OddError, match="1 against 2") as caught:
            box.fail.remote("odd")
        assert caught.value.left == 1
        assert "raise OddError(1, 2)" in str(caught.value.__cause__)
        with pytest.raises(KeyError, match="key"):
            box.fail.remote("key")
        with pytest.raises(RemoteError, match=r"builtins\.SystemExit: 3"):
            box.fail.remote("exit")
        with pytest.raises(RemoteError, match="holds a lock"):
            box.fail.remote("unpicklable")
        with pytest.raises(SerializationError):
            box.lock.remote()
        with pytest.raises(SerializationError, match="argument #1"):
            box.add.remote(threading.Lock())
        assert box.add.remote() == 1


def test_failing_start_leaves_nothing(ray_cluster: str) -> None:
    for start in (Broken.new, lambda: Broken.named("b"), Broken.remote):
        with pytest.raises(InstanceStartError) as caught:
            start()
        assert isinstance(caught.value.__cause__, OddError)


def test_streams(ray_cluster: str) -> None:
    with Box.new() as box, Aio.new() as aio:
        assert list(box.count.remote_gen(600)) == list(range(600))
        assert list(aio.count.remote_gen(600)) == list(range(600))
        for inst in (box, aio):
            with inst.count.remote_gen(10**9) as items:
                assert next(iter(items)) == 0
        assert box.add.remote() == 1
        assert aio.add.remote(1, 2) == 3


def test_async_twins(ray_cluster: str) -> None:
    async def walk() -> None:
        async with await Aio.aio.new() as aio:
            assert await aio.add.aio.remote(1, 2) == 3
            jobs = [aio.add.spawn(i, i) for i in range(10)]
            assert await asyncio.gather(*jobs) == [2 * i for i in range(10)]
            assert [i async for i in aio.count.aio.remote_gen(3)] == [0, 1, 2]

    asyncio.run(walk())


def test_pending_limit_and_map(ray_cluster: str) -> None:
    with Box.new() as box:
        jobs = [box.nap.spawn(0.5) for _ in range(5)]
        with pytest.raises(PendingTasksExceededError, match="max_pending_tasks=5"):
            box.add.remote()
        for job in jobs:
            job.get()
        assert box.add.map([1] * 20) == list(range(1, 21))


def test_look_up(ray_cluster: str) -> None:
    first = app.deploy()
    assert app.deploy() == first
    box = Cls.from_name("smoke", "Box")
    assert box.remote_only
    assert box.parameter_names == ("value",)
    assert box.tags == ("t",)
    with box.new(4) as inst:
        assert inst.add.remote() == 5
    with pytest.raises(HandleError):
        Box.attach({"app": "smoke"})


def test_secret(ray_cluster: str) -> None:
    Secret.set("SMOKE_SECRET", "hush")
    plain = Box.local_cls
    assert plain is not None
    with_secret = app.cls(name="Sec", cpu=0, memory_mb=10, secrets=[Secret("SMOKE_SECRET")])(plain)
    with with_secret.new() as inst:
        assert inst.secret.remote() == "hush"
        assert "hush" not in repr(inst.inspect()) + inst.handle_json
    Secret("SMOKE_SECRET").delete()
