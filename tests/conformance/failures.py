"""Exceptions, failed starts, time limits and cancelling."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from apothic import Cls
from apothic.errors import (
    FunctionTimeoutError,
    InstanceStartError,
    JobCancelledError,
    RemoteError,
    RemoteTraceback,
    WaitTimeoutError,
)
from apothic.values import HookResult
from tests.conformance.subjects import (
    FAILURES,
    STAND_INS,
    AsyncBox,
    Box,
    Conformance,
    Hasty,
    HastyAsync,
    Hooked,
    OddError,
    Raises,
    RaisesAsync,
    lines,
)
from tests.support import eventually

HOWS = [*(how for how, _, _ in FAILURES), *(how for how, _, _ in STAND_INS)]


def arrival(how: str, in_coroutine: bool) -> tuple[str, str]:
    """Give the type's full name and a part of the text of what a caller sees."""
    if how == "stop" and in_coroutine:
        # Python itself turns it into this in coroutines and generators.
        return "builtins.RuntimeError", "raised StopIteration"
    for name, kind, text in FAILURES:
        if name == how:
            return f"{kind.__module__}.{kind.__qualname__}", text
    return next((full, text) for name, full, text in STAND_INS if name == how)


def check_arrival(error: BaseException, how: str, in_coroutine: bool) -> None:
    """Check type, text and remote traceback of what a caller got."""
    kind, text = arrival(how, in_coroutine)
    if isinstance(error, RemoteError):
        assert (error.type_name, error.message) == (kind, text)
        trace = error.traceback
    else:
        assert f"{type(error).__module__}.{type(error).__qualname__}" == kind
        assert text in str(error)
        assert isinstance(error.__cause__, RemoteTraceback)
        trace = str(error.__cause__)
    assert "in fail" in trace
    if how == "cause":
        assert "3 against 4" in trace
        assert "direct cause" in trace


class Failures(Conformance):
    """Exceptions, failed starts, time limits and cancelling."""

    # -- exceptions ----------------------------------------------------------------------------

    @pytest.mark.parametrize(("how", "kind", "text"), FAILURES)
    def test_exceptions_arrive_as_themselves(self, how: str, kind: type, text: str) -> None:
        with Box.new() as box, AsyncBox.new() as async_box:
            for function in (box.fail, async_box.fail, async_box.sync_fail):
                with pytest.raises(kind) as caught:
                    function.remote(how)
                assert text in str(caught.value)
                assert isinstance(caught.value.__cause__, RemoteTraceback)
                trace = str(caught.value.__cause__)
                assert "in fail" in trace
                assert type(caught.value).__name__ in trace
                job = function.spawn(how)
                with pytest.raises(kind):
                    job.get()
                assert job.status == "failed"
                if how == "odd":
                    assert caught.value.left == 1
                    assert caught.value.right == 2
                    assert "raise OddError(1, right=2)" in trace  # the source line, wherever it ran
                if how == "cause":
                    assert "3 against 4" in trace
                    assert "direct cause" in trace
                if how == "note":
                    assert caught.value.__notes__ == ["look here"]
                if how == "os":
                    assert caught.value.filename == "lost.txt"
                if how == "group":
                    first, second = caught.value.exceptions
                    assert isinstance(first, ValueError)
                    assert isinstance(second, OddError)
            assert box.add.remote() == 1

    @pytest.mark.parametrize("cls", [Raises, RaisesAsync])
    def test_raised_by_methods_and_generators(self, cls: Cls) -> None:
        is_async = cls.name == "RaisesAsync"
        with cls.new() as inst:
            for how in HOWS:
                methods = [(inst.plain, is_async)]
                generators = [inst.generator]
                if is_async:
                    methods.append((inst.sync_plain, False))
                    generators.append(inst.sync_generator)
                for function, in_coroutine in methods:
                    with pytest.raises(Exception) as caught:  # noqa: PT011 - looked at below
                        function.remote(how)
                    check_arrival(caught.value, how, in_coroutine)
                for function, after in product(generators, (0, 2)):
                    stream = function.remote_gen(how, after)
                    assert [next(stream) for _ in range(after)] == list(range(after))
                    with pytest.raises(Exception) as caught:  # noqa: PT011
                        next(stream)
                    check_arrival(caught.value, how, True)
                assert inst.fine.remote() == "fine"

    @pytest.mark.parametrize("cls", [Raises, RaisesAsync])
    @pytest.mark.parametrize("where", ["construction", "enter"])
    def test_raised_by_the_start(self, cls: Cls, where: str) -> None:
        def start(how: str) -> BaseException:
            with pytest.raises(InstanceStartError) as caught:
                cls.new(where, how)
            return caught.value

        in_coroutine = where == "enter" and cls.name == "RaisesAsync"
        with ThreadPoolExecutor(4) as threads:
            for how, error in zip(HOWS, threads.map(start, HOWS), strict=True):
                assert error.__cause__ is not None
                assert arrival(how, in_coroutine)[1] in str(error), (how, str(error))
                check_arrival(error.__cause__, how, in_coroutine)

    @pytest.mark.parametrize("cls", [Raises, RaisesAsync])
    def test_raised_by_exit_hooks(self, cls: Cls) -> None:
        def close(how: str) -> HookResult:
            (hook,) = cls.new("exit", how).close().failed_hooks
            return hook

        with ThreadPoolExecutor(4) as threads:
            for how, hook in zip(HOWS, threads.map(close, HOWS), strict=True):
                kind, text = arrival(how, cls.name == "RaisesAsync")
                assert hook.error is not None
                assert hook.error.startswith(kind.rpartition(".")[2])
                assert text in hook.error
                assert "in fail" in (hook.traceback or "")

    @pytest.mark.parametrize("how", ["init", "base_up", "a_second"])
    def test_a_failed_start_leaves_nothing(self, how: str, name: str, log: Path) -> None:
        for start in (
            lambda: Hooked.new(str(log), how),
            lambda: Hooked.named(name, str(log), how),
            lambda: Hooked.remote(str(log), how),
            lambda: Hooked.bind(str(log), how).ping.remote(),
        ):
            log.unlink(missing_ok=True)
            with pytest.raises(InstanceStartError, match="1 against 2") as caught:
                start()
            assert isinstance(caught.value.__cause__, OddError)
            assert caught.value.__cause__.left == 1
            assert "raise OddError" in str(caught.value.__cause__.__cause__)
            assert lines(log)[-1] == how  # no exit hook ran
        assert not Hooked.close_named(name).closed
        with Hooked.named(name, str(log)) as free:
            assert free.ping.remote() == "child of base"

    # -- time ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("verb", ["nap", "spin"])
    def test_a_sync_call_that_takes_too_long(self, verb: str) -> None:
        with Hasty.new(4) as box:
            args = () if verb == "spin" else (60,)
            with pytest.raises(FunctionTimeoutError, match="timeout_s=1") as caught:
                getattr(box, verb).remote(*args)
            assert isinstance(caught.value, TimeoutError)
            assert not caught.value.state_lost
            assert box.add.remote() == 5  # the instance goes on, with what it had

    def test_an_async_call_that_takes_too_long(self, log: Path) -> None:
        with HastyAsync.new(str(log)) as box:
            for function in (box.nap, box.sync_nap):
                with pytest.raises(FunctionTimeoutError, match="timeout_s=1"):
                    function.remote(60)
            assert lines(log) == ["enter", "nap", "finally", "nap"]
            assert box.double.remote(1) == 2

    def test_a_limit_for_one_call(self) -> None:
        with Box.new() as box, Hasty.new() as hasty:
            with pytest.raises(FunctionTimeoutError, match=r"timeout_s=0\.2"):
                box.nap.remote(60, timeout_s=0.2)
            assert hasty.nap.remote(1.2, timeout_s=60) == 1.2

    def test_time_in_the_queue_does_not_count(self) -> None:
        with Hasty.new() as box:
            assert box.nap.map([0.4] * 4) == [0.4] * 4

    def test_waiting_can_end_before_the_call(self, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with Box.new() as box:
            job = box.hold.spawn(str(gate))
            with pytest.raises(WaitTimeoutError, match="goes on"):
                job.get(timeout_s=0.1)
            assert not job.done()
            assert job.status == "pending"
            gate.touch()
            assert job.get() == box.who.remote()

    # -- cancelling ----------------------------------------------------------------------------

    def test_cancelling_what_runs_and_what_waits(self, log: Path) -> None:
        with Box.new(0, str(log)) as box:
            running, waiting = box.nap.spawn(60), box.add.spawn(100)
            eventually(lambda: lines(log)[-1] == "nap")
            waiting.cancel()
            running.cancel()
            for job in (running, waiting):
                with pytest.raises(JobCancelledError, match="cancelled"):
                    job.get()
                assert job.status == "cancelled"
            assert box.add.remote() == 1
            done = box.add.spawn()
            assert done.get() == 2
            done.cancel()
            assert done.get() == 2

    def test_cancelling_the_task_that_awaits(self, log: Path) -> None:
        async def scenario() -> None:
            box = await AsyncBox.aio.new(str(log))
            task = asyncio.create_task(box.nap.aio.remote(60))
            while "nap" not in lines(log):
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while "finally" not in lines(log):
                await asyncio.sleep(0.005)
            assert await box.double.aio.remote(2) == 4
            await box.aio.close()

        asyncio.run(scenario())
