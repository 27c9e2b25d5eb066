"""What the conformance suites share: classes and fixtures.

The classes may run in another process: they speak to the tests through results and files alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from apothic import (
    App,
    ClassInstance,
    Cls,
    Retries,
    enter,
    exit,
    method,
)
from apothic.errors import InstanceClosedError
from ray_backend.actors.gate import AsyncStreamGate
from tests.conformance.exceptions import Trap, fail

SMALL: dict[str, Any] = {"cpu": 0, "memory_mb": 10}

app = App("conformance")


# -- what the classes share ------------------------------------------------------------------------


def note(path: str | None, word: str) -> None:
    """Add a line to a log file."""
    if path is not None:
        with open(path, "a") as file:
            file.write(f"{word}\n")


def wait_for(path: str) -> None:
    """Wait until a file is there."""
    while not os.path.exists(path):
        time.sleep(0.005)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


# -- classes -------------------------------------------------------------------------------------


@app.cls(**SMALL, max_pending_tasks=20, tags=["t"], metadata={"m": 1})
class Box:
    """A box of numbers."""

    def __init__(self, value: int = 0, log: str | None = None) -> None:
        self.value = value
        self.log = log
        self.id = uuid.uuid4().hex
        note(log, "init")

    @enter()
    def up(self) -> None:
        note(self.log, "enter")

    @exit()
    def down(self) -> None:
        note(self.log, "exit")

    @property
    def double(self) -> int:
        return 2 * self.value

    def helper(self) -> int:
        return self.value

    @method(tags=["sum"])
    def add(self, n: int = 1, /, *, times: int = 1) -> int:
        """Add up."""
        self.value += n * times
        return self.value

    @method()
    def who(self) -> str:
        return self.id

    @method()
    def nap(self, seconds: float) -> float:
        note(self.log, "nap")
        time.sleep(seconds)
        return seconds

    @method()
    def hold(self, path: str) -> str:
        """Note that it runs, then wait for a file."""
        note(self.log, "hold")
        wait_for(path)
        return self.id

    @method()
    def fail(self, how: str) -> None:
        fail(how)

    @method()
    def fail_midway(self, how: str) -> Iterator[int]:
        yield 1
        fail(how)

    @method()
    def let_through(self) -> None:
        """Fail with what a call of another instance would."""
        note(self.log, "let-through")
        error = InstanceClosedError("another one is closed.")
        error.refused = True
        raise error

    @method()
    def echo(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    @method()
    def state(self) -> Any:
        return self.value

    @method()
    def states(self) -> Iterator[Any]:
        yield self.value
        yield self.value

    @method()
    def append(self, items: list[int]) -> list[int]:
        items.append(len(items))
        return items

    @method()
    def lock(self) -> Any:
        return threading.Lock()

    @method()
    def trap(self) -> Any:
        return Trap()

    @method()
    def count(self, n: int) -> Iterator[int]:
        try:
            for number in range(n):
                note(self.log, str(number))
                yield number
        finally:
            note(self.log, "finally")

    @method()
    def locks(self) -> Iterator[Any]:
        yield 1
        yield threading.Lock()

    @method()
    def call_other(self, other: Any, n: int) -> int:
        instance = other if isinstance(other, ClassInstance) else Cls.from_handle(other)
        return int(instance.add.remote(n))

    @method()
    def make(self, value: int) -> ClassInstance:
        return Box.named(f"made-{value}-{self.id}", value)

    @method()
    def __call__(self, n: int) -> int:
        return self.value * n


@app.cls(**SMALL, concurrent_requests=3)
class AsyncBox:
    def __init__(self, log: str | None = None) -> None:
        self.log = log
        self.threads = {"init": threading.get_ident()}

    @enter()
    async def up(self) -> None:
        await asyncio.sleep(0)
        note(self.log, "enter")

    @exit()
    async def down(self) -> None:
        await asyncio.sleep(0)
        note(self.log, "exit")

    @method()
    async def double(self, n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    @method()
    def triple(self, n: int) -> int:
        return 3 * n

    @method()
    async def nap(self, seconds: float) -> float:
        note(self.log, "nap")
        try:
            await asyncio.sleep(seconds)
        finally:
            note(self.log, "finally")
        return seconds

    @method()
    def sync_nap(self, seconds: float) -> float:
        note(self.log, "nap")
        time.sleep(seconds)
        return seconds

    @method()
    async def meet(self, mine: str, other: str) -> bool:
        note(mine, "here")
        while not os.path.exists(other):
            await asyncio.sleep(0.005)
        return True

    @method()
    async def fail(self, how: str) -> None:
        await asyncio.sleep(0)
        fail(how)

    @method()
    def sync_fail(self, how: str) -> None:
        fail(how)

    @method()
    async def count(self, n: int) -> AsyncIterator[int]:
        try:
            for number in range(n):
                yield number
                await asyncio.sleep(0)
        finally:
            note(self.log, "finally")

    @method()
    def sync_count(self, n: int) -> Iterator[int]:
        try:
            yield from range(n)
        finally:
            note(self.log, "finally")

    @method()
    async def fail_midway(self, how: str) -> AsyncIterator[int]:
        yield 1
        fail(how)


@app.cls(**SMALL)
class Plain:
    """No hooks."""

    @method()
    def one(self) -> int:
        return 1


@app.cls(**SMALL)
class Threaded:
    """Everything that it does is on the thread that made its connection, or sqlite3 refuses it."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.thread = threading.get_ident()

    @enter()
    def up(self) -> None:
        assert threading.get_ident() == self.thread
        self.db = sqlite3.connect(":memory:")
        self.db.execute("create table seen (value)")

    @method()
    def add(self, value: int) -> bool:
        self.db.execute("insert into seen values (?)", (value,))
        return threading.get_ident() == self.thread

    @method()
    def values(self) -> Iterator[int]:
        for (value,) in self.db.execute("select value from seen order by value"):
            yield value

    @exit()
    def down(self) -> None:
        note(self.log, str(self.db.execute("select count(*) from seen").fetchone()[0]))
        self.db.close()


@app.cls(**SMALL)
class ThreadedAsync(Threaded):
    """Does so beside an event loop."""

    @method()
    async def beside(self) -> bool:
        return threading.get_ident() != self.thread


class HookedBase:
    def __init__(self, log: str, broken: str = "") -> None:
        self.log = log
        self.broken = broken
        self.do("init")

    def do(self, word: str) -> None:
        note(self.log, word)
        if word == self.broken:
            fail("odd")

    @enter()
    def base_up(self) -> None:
        self.do("base_up")

    @exit()
    def base_down(self) -> None:
        self.do("base_down")

    @method()
    def ping(self) -> str:
        return "base"


@app.cls(**SMALL)
class Hooked(HookedBase):
    @enter()
    def z_first(self) -> None:
        self.do("z_first")

    @enter()
    async def a_second(self) -> None:
        self.do("a_second")

    @exit()
    def z_last(self) -> None:
        self.do("z_last")

    @exit()
    def a_down(self) -> None:
        self.do("a_down")

    def ping(self) -> str:  # keeps the mark of what it overrides
        return "child of " + super().ping()


@app.cls(**SMALL, timeout_s=1, retries=Retries(2, initial_delay=0.01))
class Flaky:
    def __init__(self, log: str) -> None:
        self.log = log

    @method()
    def hold(self, path: str) -> int:
        number = self.attempt()
        wait_for(path)
        return number

    def attempt(self) -> int:
        note(self.log, "try")
        with open(self.log) as file:
            return len(file.readlines())

    @method()
    def good_at(self, number: int) -> int:
        if self.attempt() < number:
            fail("odd")
        return number

    @method()
    def gives_up(self) -> None:
        self.attempt()
        fail("exit")

    @method()
    def slow(self) -> None:
        self.attempt()
        time.sleep(60)

    @method()
    def early(self) -> Iterator[int]:
        if self.attempt() < 2:
            fail("odd")
        yield 1

    @method()
    def late(self) -> Iterator[int]:
        self.attempt()
        yield 1
        fail("odd")


@app.cls(**SMALL, timeout_s=1)
class Hasty(Box):
    @method()
    def spin(self) -> None:
        while True:
            pass

    @method()
    def stuck(self, seconds: int) -> None:
        ctypes.CDLL(None).sleep(seconds)  # no Python code in which it could be interrupted


@app.cls(**SMALL, concurrent_requests=2, max_pending_tasks=20)
class Wide(Hasty):
    @method()
    def step(self, what: str, path: str) -> None:
        """Sleep in native code, hold on, or fail once another step is in native code."""
        if what == "stuck":
            note(path, "stuck")
            self.stuck(4)
        elif what == "hold":
            self.hold(path)
        else:
            wait_for(path)
            fail("odd")


@app.cls(**SMALL, timeout_s=1)
class HastyAsync(AsyncBox):
    pass


@app.cls(**SMALL, concurrent_requests=2)
class Pair:
    @method()
    def meet(self, mine: str, other: str) -> bool:
        note(mine, "here")
        wait_for(other)
        return True


@app.cls(**SMALL, max_containers=2)
class Pool(Box):
    pass


@app.cls(**SMALL, max_pending_tasks=3)
class Narrow(Box):
    pass


@app.cls(**SMALL, concurrent_requests=2)
class Eager:
    """Makes items as fast as it is let, and tells how it stands."""

    def __init__(self) -> None:
        self.made = 0

    @method()
    def items(self, n: int) -> Iterator[int]:
        for number in range(n):
            self.made += 1
            yield number

    @method()
    def standing(self) -> tuple[bool, int]:
        """Tell whether a producer waits for its consumer, and how many items were made by then."""
        return waits_for_consumer(), self.made


@app.cls(**SMALL, concurrent_requests=2)
class EagerAsync(Eager):
    @method()
    async def items(self, n: int) -> AsyncIterator[int]:  # type: ignore[override]
        for number in range(n):
            self.made += 1
            yield number


def waits_for_consumer() -> bool:
    """Tell whether a thread or a coroutine of this process waits where producers are held back."""
    if any(type(each) is AsyncStreamGate and each._room <= 0 for each in gc.get_objects()):
        return True
    for frame in sys._current_frames().values():
        stack = []
        inner: FrameType | None = frame
        while inner is not None:
            stack.append((Path(inner.f_code.co_filename).name, inner.f_code.co_name))
            inner = inner.f_back
        held_back = ("gate.py", "admit") in stack or ("running.py", "put") in stack
        if held_back and stack[0] == ("threading.py", "wait"):
            return True
    return False


@app.cls(**SMALL, retries=Retries(2, initial_delay=0.01))
class RetriedBox(Box):
    pass


@app.cls(**SMALL, max_pending_tasks=2, retries=Retries(2, initial_delay=0.5))
class NarrowFlaky(Flaky):
    """Has room for two calls; an item of `fresh` fails once."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.seen: set[int] = set()

    @method()
    def fresh(self, item: int) -> int:
        if item not in self.seen:
            self.seen.add(item)
            fail("odd")
        return item


class ReadsEnvironment:
    def __init__(self, key: str) -> None:
        self.key = key
        self.first = os.environ[key]

    @method()
    def seen(self) -> tuple[str, str]:
        return self.first, os.environ[self.key]


class KeepsFiles:
    def __init__(self, path: str) -> None:
        self.file = Path(path, "file")

    @method()
    def write(self, text: str) -> None:
        self.file.write_text(text)

    @method()
    def read(self) -> str:
        return self.file.read_text()


HOOKED_LIFE = [
    "init",
    "base_up",
    "z_first",
    "a_second",
    "a_down",
    "z_last",
    "base_down",
]


class Conformance:
    """Tests of classes; inherit it and give the fixture `engine`."""

    @pytest.fixture(autouse=True)
    def _in_place(self, engine: object) -> None:
        """Have the engine of the inheriting class in place for every test."""

    def hasten_closing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have running calls get less time when their instance is closed, where that can be set."""

    @pytest.fixture
    def log(self, tmp_path: Path) -> Path:
        """Give the path of a log file that is not there yet."""
        return tmp_path / "log"

    @pytest.fixture
    def name(self) -> str:
        """Give an instance id that nobody has."""
        return f"id-{uuid.uuid4().hex}"
