"""Exceptions, failed starts, time limits and cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from tests.conformance.exceptions import ENDS, FAILURES, HOWS, STAND_INS, OddError
from tests.conformance.raising import FAILS_TO_STOP, Raises, RaisesAsync
from tests.conformance.subjects import (
    AsyncBox,
    Box,
    Conformance,
    Hasty,
    HastyAsync,
    Hooked,
    NarrowFlaky,
    Wide,
    lines,
)
from tests.support import eventually


def arrival(how: str, in_coroutine: bool) -> tuple[str, str]:
    """Give the type's full name and a part of the text of what a caller sees."""
    if how == "stop" and in_coroutine:
        # Python itself turns it into this in coroutines and generators.
        return "builtins.RuntimeError", "raised StopIteration"
    return next((kind, text) for name, kind, text in (*FAILURES, *STAND_INS) if name == how)


def check_arrival(error: BaseException, how: str, in_coroutine: bool) -> None:
    """Check type, text, attributes and remote traceback of what a caller got."""
    kind, text = arrival(how, in_coroutine)
    if isinstance(error, RemoteError):
        assert (error.type_name, error.message) == (kind, text)
        trace = error.traceback
    else:
        assert f"{type(error).__module__}.{type(error).__qualname__}" == kind
        assert text in str(error)
        assert isinstance(error.__cause__, RemoteTraceback)
        trace = str(error.__cause__)
        assert kind.rpartition(".")[2] in trace
    assert "in fail" in trace
    trace.encode()
    if how == "odd":
        assert isinstance(error, OddError)  # the caller's own class
        assert (error.left, error.right) == (1, 2)
        assert "raise OddError(1, right=2)" in trace  # the source line, wherever it ran
    elif how == "local":
        assert isinstance(error, ValueError)
        assert error.code == 7
    elif how == "os":
        assert isinstance(error, FileNotFoundError)
        assert (error.errno, error.filename) == (2, "lost.txt")
    elif how == "cause":
        assert "3 against 4" in trace
        assert "direct cause" in trace
    elif how == "note":
        assert error.__notes__ == ["look here"]
    elif how == "group":
        first, second = error.exceptions
        assert isinstance(first, ValueError)
        assert isinstance(second, OddError)


def raised_by(call: Callable[[], object]) -> BaseException:
    """Give what a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - looked at by who asked
        call()
    return caught.value


class Failures(Conformance):
    """Exceptions, failed starts, time limits and cancelling."""

    # -- exceptions: one row of the table for each of HOWS -----------------------------------------

    @pytest.mark.parametrize("cls", [Raises, RaisesAsync])
    def test_raised_by_methods(self, cls: Cls, subtests: pytest.Subtests) -> None:
        with cls.new() as inst:
            functions = [(inst.plain, cls.name == "RaisesAsync")]
            if cls.name == "RaisesAsync":
                functions.append((inst.sync_plain, False))
            for how, (function, in_coroutine) in product(HOWS, functions):
                with subtests.test(how=how, method=function.name):
                    check_arrival(raised_by(partial(function.remote, how)), how, in_coroutine)
                    job = function.spawn(how)
                    check_arrival(raised_by(job.get), how, in_coroutine)
                    assert job.status == "failed"
                    assert inst.fine.remote() == "fine"

    @pytest.mark.parametrize("cls", [Raises, RaisesAsync])
    def test_raised_by_generators(self, cls: Cls, subtests: pytest.Subtests) -> None:
        with cls.new() as inst:
            functions = [inst.generator]
            if cls.name == "RaisesAsync":
                functions.append(inst.sync_generator)
            for how, function, after in product(HOWS, functions, (0, 2)):
                with subtests.test(how=how, method=function.name, after=after):
                    stream = function.remote_gen(how, after)
                    assert [next(stream) for _ in range(after)] == list(range(after))
                    check_arrival(raised_by(partial(next, stream)), how, True)
                    assert list(stream) == []
                    assert inst.fine.remote() == "fine"

    @pytest.mark.parametrize(
        ("cls", "where", "hows"),
        [
            (Raises, "construction", HOWS),
            (Raises, "enter", ENDS),
            (RaisesAsync, "construction", ENDS),
            (RaisesAsync, "enter", HOWS),
        ],
    )
    def test_raised_by_the_start(
        self, cls: Cls, where: str, hows: list[str], subtests: pytest.Subtests
    ) -> None:
        with ThreadPoolExecutor(4) as threads:
            errors = threads.map(lambda how: raised_by(partial(cls.new, where, how)), hows)
        in_coroutine = where == "enter" and cls.name == "RaisesAsync"
        for how, error in zip(hows, errors, strict=True):
            with subtests.test(how=how):
                assert isinstance(error, InstanceStartError)
                assert arrival(how, in_coroutine)[1] in str(error)
                str(error).encode()
                assert error.__cause__ is not None
                check_arrival(error.__cause__, how, in_coroutine)

    @pytest.mark.parametrize("cls", FAILS_TO_STOP)
    def test_raised_by_exit_hooks(self, cls: Cls, subtests: pytest.Subtests) -> None:
        hooks = cls.new().close().failed_hooks
        for how, hook in zip(HOWS, reversed(hooks), strict=True):
            with subtests.test(how=how):
                kind, text = arrival(how, cls.name.endswith("True"))
                assert hook.error is not None
                assert hook.error.startswith(kind.rpartition(".")[2])
                assert text in hook.error
                assert "in fail" in (hook.traceback or "")
                (hook.error + (hook.traceback or "")).encode()

    def test_a_failed_start_leaves_nothing(self, name: str, log: Path) -> None:
        starts: list[tuple[str, Callable[[str, str], object]]] = [
            ("init", partial(Hooked.named, name)),
            ("base_up", Hooked.new),
            ("a_second", Hooked.remote),
            ("a_second", lambda log, how: Hooked.bind(log, how).ping.remote()),
        ]
        for how, start in starts:
            log.unlink(missing_ok=True)
            error = raised_by(partial(start, str(log), how))
            assert isinstance(error, InstanceStartError)
            assert isinstance(error.__cause__, OddError)
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

    def test_a_map_that_fails_lets_running_calls_end(self, log: Path, tmp_path: Path) -> None:
        stuck, gate = tmp_path / "stuck", tmp_path / "gate"
        with Wide.new(1, str(log)) as box:
            who = box.who.remote()
            steps = [("fail", stuck), ("stuck", stuck), *[("hold", gate)] * 10]
            with pytest.raises(OddError):
                box.step.starmap((what, str(path)) for what, path in steps)

            def in_flight() -> int:
                box._target.pool.scale_down()  # which looks at each
                return box._target.in_flight

            # The stuck one, and one that began when the first had failed, if it was not cancelled yet.
            eventually(lambda: in_flight() <= 2)
            gate.touch()
            eventually(lambda: in_flight() == 0)
            assert lines(log).count("hold") <= 1
            assert box.who.remote() == who
            assert box.inspect().restarts == 0

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

    def test_who_stops_awaiting_a_call_with_retries_cancels_it_for_all(
        self, log: Path, tmp_path: Path
    ) -> None:
        async def scenario() -> None:
            with NarrowFlaky.new(str(log)) as box:
                job = box.hold.spawn(str(tmp_path / "never"))
                other = asyncio.ensure_future(job)
                while not lines(log):
                    await asyncio.sleep(0.005)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(job, 0.05)
                for outcome in (asyncio.wrap_future(job._call.future()), other):
                    with pytest.raises(JobCancelledError):
                        await outcome
                with pytest.raises(JobCancelledError):
                    job.get()
                assert job.status == "cancelled"
                assert box.good_at.remote(1) == 1  # what ran has ended
                assert lines(log) == ["try", "try"]

        asyncio.run(scenario())

    def test_a_future_of_a_call_with_retries_is_its_holders_alone(
        self, log: Path, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"
        with NarrowFlaky.new(str(log)) as box:
            job = box.hold.spawn(str(gate))
            assert job._call.future().cancel()
            gate.touch()
            assert job.get() == job._call.future().result() == 1
            assert job.status == "succeeded"
