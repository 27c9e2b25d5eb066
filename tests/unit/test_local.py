"""Instances in this process: on which thread their hooks run, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from typing import Any

import pytest

from apothic import App, LocalClassInstance, enter, exit, method

app = App("local")


@app.cls()
class Keeper:
    """Has a connection, which works on the thread that made it and on no other."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    @enter()
    def connect(self) -> None:
        self.db = sqlite3.connect(":memory:")
        self.db.execute("create table seen (value)")

    @method()
    def add(self, value: int) -> int:
        return self.db.execute("insert into seen values (?)", (value,)).rowcount

    @exit()
    def disconnect(self) -> None:
        self.db.close()
        self.ended.append("db")


@app.cls()
class Loops:
    """Notes the loop that each of its hooks runs on."""

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []

    @enter()
    async def up(self) -> None:
        self.loops.append(asyncio.get_running_loop())

    @method()
    async def here(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @exit()
    async def down(self) -> None:
        await asyncio.sleep(0)
        self.loops.append(asyncio.get_running_loop())


@app.cls()
class Ends:
    """Its exit hooks do as they are told; they run from the last to the first."""

    def __init__(self, last: BaseException, middle: BaseException | None = None) -> None:
        self.last = last
        self.middle = middle
        self.ended: list[str] = []

    @method()
    def ping(self) -> None:
        pass

    @exit()
    def first(self) -> None:
        self.ended.append("first")

    @exit()
    async def second(self) -> None:
        self.ended.append("second")
        if self.middle is not None:
            raise self.middle

    @exit()
    def third(self) -> None:
        self.ended.append("third")
        raise self.last


@app.cls()
class Waits:
    """Its last exit hook waits until it is cancelled."""

    def __init__(self) -> None:
        self.waits = asyncio.Event()
        self.ended: list[str] = []

    @method()
    def ping(self) -> None:
        pass

    @exit()
    def first(self) -> None:
        self.ended.append("first")

    @exit()
    async def last(self) -> None:
        self.waits.set()
        await asyncio.Event().wait()


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "apothic-loop"}


def test_async_with_keeps_hooks_on_the_calling_thread() -> None:
    async def scenario() -> list[str]:
        async with Keeper.local() as keeper:
            assert keeper.add(1) == keeper.add.remote(2) == 1
        return list(keeper.obj.ended)

    assert asyncio.run(scenario()) == ["db"]


@pytest.mark.parametrize("verb", [Keeper.aio.local, Keeper.partial().aio.local])
def test_aio_local_enters_on_the_calling_thread(verb: Any) -> None:
    async def scenario() -> list[str]:
        async with await verb() as keeper:
            assert keeper.add(1) == 1
            assert await keeper.add.aio.remote(2) == 1
        return list(keeper.obj.ended)

    assert asyncio.run(scenario()) == ["db"]


def test_aio_hooks_are_awaited_on_the_callers_loop() -> None:
    async def scenario() -> None:
        instance = await Loops.aio.local()
        assert (await instance.aio.close()).closed
        assert instance.obj.loops == [asyncio.get_running_loop()] * 2
        assert not (await instance.aio.close()).closed

    before = _threads()
    asyncio.run(scenario())
    assert _threads() == before


def test_async_hooks_of_one_instance_have_one_loop() -> None:
    async def scenario() -> LocalClassInstance:
        async with (
            Loops.local() as instance
        ):  # made by the verb that waits, ended by one that awaits
            pass
        return instance

    one, two = asyncio.run(scenario()).obj.loops
    assert one is two


@pytest.mark.parametrize("last", [ValueError("late"), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("middle", [None, SystemExit(4)])
@pytest.mark.parametrize("awaited", [False, True])
def test_failing_exit_hooks_are_reported_and_keep_none_from_running(
    last: BaseException,
    middle: BaseException | None,
    awaited: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def scenario() -> LocalClassInstance:
        async with Ends.local(last, middle) as instance:
            pass
        return instance

    if awaited:
        instance = asyncio.run(scenario())
    else:
        with Ends.local(last, middle) as instance:
            pass
    assert instance.obj.ended == ["third", "second", "first"]
    printed = capsys.readouterr().err
    assert "exit hook third of local.Ends (local) failed" in printed
    assert f"{type(last).__name__}" in printed
    assert ("exit hook second of local.Ends" in printed) == (middle is not None)
    assert "hook first" not in printed
    assert "instance.py" not in printed  # the frames are the user's


def test_close_reports_failing_hooks() -> None:
    report = Ends.local(ValueError("late")).close()
    assert [hook.error for hook in report.hooks] == ["ValueError: late", None, None]
    trace = report.failed_hooks[0].traceback
    assert trace is not None
    assert "raise self.last" in trace


@pytest.mark.parametrize("awaited", [False, True])
def test_an_interrupt_goes_on_after_the_last_hook(awaited: bool) -> None:
    instance = Ends.local(KeyboardInterrupt())
    before = _threads()

    async def scenario() -> None:
        with pytest.raises(KeyboardInterrupt):
            await instance.aio.close()

    if awaited:
        asyncio.run(scenario())
    else:
        with pytest.raises(KeyboardInterrupt):
            instance.close()
    assert instance.obj.ended == ["third", "second", "first"]
    assert instance.closed
    assert _threads() == before


def test_cancelling_aio_close_goes_on_after_the_last_hook() -> None:
    async def scenario() -> list[str]:
        instance = await Waits.aio.local()
        closing = asyncio.create_task(instance.aio.close())
        await instance.obj.waits.wait()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        return list(instance.obj.ended)

    assert asyncio.run(scenario()) == ["first"]


def test_a_failing_enter_hook_leaves_no_thread() -> None:
    @app.cls()
    class Broken:
        @enter()
        async def up(self) -> None:
            raise SystemExit(3)

        @method()
        def ping(self) -> None:
            pass

    before = _threads()
    with pytest.raises(SystemExit):
        Broken.local()
    with pytest.raises(SystemExit):
        asyncio.run(Broken.aio.local())
    assert _threads() == before
