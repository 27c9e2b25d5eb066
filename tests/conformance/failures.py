"""Exceptions, failed starts, time limits and cancelling."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from apothic import (
    App,
)
from apothic.errors import (
    FunctionTimeoutError,
    InstanceStartError,
    JobCancelledError,
    RemoteError,
    RemoteTraceback,
    WaitTimeoutError,
)
from tests.conformance.subjects import (
    FAILURES,
    SMALL,
    STAND_INS,
    AsyncBox,
    Box,
    Conformance,
    FailsToStart,
    Hasty,
    HastyAsync,
    Hooked,
    OddError,
    lines,
)
from tests.support import eventually


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

    @pytest.mark.parametrize(("how", "type_name", "message"), STAND_INS)
    def test_exceptions_that_cannot_travel(self, how: str, type_name: str, message: str) -> None:
        with Box.new() as box, AsyncBox.new() as async_box:
            functions = [box.fail, async_box.sync_fail]
            if how != "stop":  # Python itself turns it into RuntimeError in a coroutine
                functions.append(async_box.fail)
            for function in functions:
                with pytest.raises(RemoteError) as caught:
                    function.remote(how)
                assert caught.value.type_name == type_name
                assert caught.value.message == message
                assert "in fail" in caught.value.traceback
            assert box.add.remote() == 1
            assert async_box.triple.remote(1) == 3

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

    def test_a_start_that_ends_the_process(self) -> None:
        failing = App("conformance").cls(**SMALL)(FailsToStart)
        for how in ("exit", "stop", "interrupt"):
            with pytest.raises(InstanceStartError) as caught:
                failing.new(how)
            assert isinstance(caught.value.__cause__, RemoteError)

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
