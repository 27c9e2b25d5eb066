"""Calls, generators, threads, limits and retries."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from apothic import ClassInstance, Cls, Job, pools
from apothic.errors import (
    ArgumentError,
    FunctionTimeoutError,
    MethodNotFoundError,
    PendingTasksExceededError,
    RemoteError,
    SerializationError,
    UsageError,
)
from ray_backend.actors.gate import AHEAD
from tests.conformance.exceptions import OddError
from tests.conformance.subjects import (
    AsyncBox,
    Box,
    Conformance,
    Eager,
    EagerAsync,
    Flaky,
    Narrow,
    NarrowFlaky,
    Pair,
    Pool,
    Threaded,
    ThreadedAsync,
    lines,
)
from tests.support import eventually


def gone(kept: weakref.ref[Any]) -> bool:
    gc.collect()
    return kept() is None


class Calls(Conformance):
    """Calls, generators, threads, limits and retries."""

    # -- calls ---------------------------------------------------------------------------------

    def test_calls(self) -> None:
        with Box.new(2) as box:
            assert box.add(1) == 3
            assert box.add.remote(1, times=2) == 5
            assert box(10) == 50
            job = box.add.spawn()
            assert isinstance(job, Job)
            assert job.get() == job.get(timeout_s=10) == 6
            assert job.done()
            assert job.status == "succeeded"
            assert box.echo.remote(1, [2], a={"b": None}) == ((1, [2]), {"a": {"b": None}})

    def test_arguments_and_results_are_copies(self) -> None:
        with Box.new() as box:
            mine = [5]
            assert box.append.remote(mine) == [5, 1]
            assert mine == [5]
        with Box.new(mine) as keeps:
            mine.append(6)
            keeps.state.remote().append(7)
            first, second = keeps.states.remote_gen()
            first.append(8)
            assert second == keeps.state.remote() == [5]

    def test_what_cannot_travel_is_named(self) -> None:
        with Box.new() as box:
            with pytest.raises(SerializationError, match=r"argument #1 of type lock"):
                box.add.remote(threading.Lock())
            with pytest.raises(SerializationError, match=r"argument times of type lock"):
                box.add.remote(times=threading.Lock())
            with pytest.raises(SerializationError, match="lock"):
                box.lock.remote()
            assert box.add.remote() == 1
        with pytest.raises(SerializationError, match="lock"):
            Box.new(threading.Lock())

    def test_bad_calls_are_refused_before_they_are_sent(self) -> None:
        with Box.new() as box:
            for args, kwargs in (((1, 2), {}), ((), {"n": 1}), ((), {"often": 1})):
                for verb in (box.add.remote, box.add.spawn):
                    with pytest.raises(ArgumentError, match=r"Box\.add: .* Its signature is"):
                        verb(*args, **kwargs)
            with pytest.raises(MethodNotFoundError, match="property"):
                _ = box.double
            with pytest.raises(MethodNotFoundError, match="function of the class"):
                _ = box.helper
            with pytest.raises(MethodNotFoundError, match="has no remote method 'ad'"):
                _ = box.ad
            for call in (box.count.remote, box.count.spawn):
                with pytest.raises(UsageError, match="remote_gen"):
                    call(1)
            with pytest.raises(UsageError, match=r"\.remote"):
                box.add.remote_gen()
            for call in (Box.add.remote, Box.add.spawn, Box.add):
                with pytest.raises(UsageError, match=r"Box\.bind"):
                    call(1)
            info = box.inspect()
            assert (info.running_calls, info.finished_calls) == (0, 0)

    def test_map_and_its_kin_pace_themselves(self) -> None:
        with Box.new() as box:
            assert box.add.map([1] * 50) == list(range(1, 51))  # more than max_pending_tasks
            assert box.echo.starmap([(1, 2), (), (3,)]) == [((1, 2), {}), ((), {}), ((3,), {})]
            assert box.add.for_each(iter([1, 1])) is None
            jobs = box.add.spawn_map([1] * 30)
            assert [job.get() for job in jobs] == list(range(53, 83))

    def test_map_raises_the_first_error_in_order(self) -> None:
        with Box.new() as box:
            with pytest.raises(OddError):
                box.fail.map(["odd", "plain", "odd"])
            assert box.add.remote() == 1

    # -- generators ----------------------------------------------------------------------------

    def test_generators(self) -> None:
        with Box.new() as box, AsyncBox.new() as async_box:
            assert list(box.count.remote_gen(1000)) == list(range(1000))  # more than any buffer
            assert list(box.count(3)) == [0, 1, 2]
            assert list(box.count.remote_gen(0)) == []
            assert list(async_box.count.remote_gen(1000)) == list(range(1000))
            assert list(async_box.sync_count.remote_gen(3)) == [0, 1, 2]

    @pytest.mark.parametrize("cls", [Eager, EagerAsync])
    def test_a_producer_is_held_back_by_a_consumer_that_does_not_read(self, cls: Cls) -> None:
        # One that waits for its consumer makes nothing, so that the count stands without being watched.
        with cls.new() as eager, eager.items.remote_gen(2000) as stream:
            eventually(lambda: eager.standing.remote() == (True, AHEAD + 1))
            taken = [next(stream) for _ in range(AHEAD)]
            eventually(lambda: eager.standing.remote() == (True, 2 * AHEAD + 1))
            assert [*taken, *stream] == list(range(2000))
            assert eager.standing.remote() == (False, 2000)

    @pytest.mark.parametrize("leave", ["break", "close", "drop", "with"])
    def test_leaving_a_generator_early_runs_its_finally(self, log: Path, leave: str) -> None:
        many = 100_000
        with Box.new(0, str(log)) as box:
            stream = box.count.remote_gen(many)
            assert next(stream) == 0
            if leave == "close":
                stream.close()
                stream.close()
            elif leave == "with":
                with stream:
                    assert next(stream) == 1
            elif leave == "break":
                for _ in stream:
                    break
            del stream
            eventually(lambda: lines(log)[-1] == "finally")
            assert len(lines(log)) < many
            assert box.add.remote() == 1

    def test_leaving_an_async_generator_early(self, log: Path) -> None:
        async def first(function: Any) -> int:
            items = function.aio.remote_gen(100_000)
            async for item in items:
                await items.aclose()
                return int(item)
            raise AssertionError("no item")

        def ends(number: int) -> bool:
            return lines(log).count("finally") == number

        with AsyncBox.new(str(log)) as box:
            for number, function in enumerate((box.count, box.sync_count), 1):
                assert asyncio.run(first(function)) == 0
                eventually(partial(ends, number))

    @pytest.mark.parametrize("cls", [Box, AsyncBox])
    def test_a_generator_that_fails_gives_its_items_first(self, cls: Cls) -> None:
        with cls.new() as box:
            for how, expected in (("odd", OddError), ("exit", RemoteError)):
                stream = box.fail_midway.remote_gen(how)
                assert next(stream) == 1
                with pytest.raises(expected):
                    next(stream)
                with pytest.raises(StopIteration):
                    next(stream)

    def test_an_item_that_cannot_travel(self) -> None:
        with Box.new() as box:
            stream = box.locks.remote_gen()
            assert next(stream) == 1
            with pytest.raises(SerializationError, match="lock"):
                next(stream)

    # -- threads and limits ----------------------------------------------------------------------

    @pytest.mark.parametrize("cls", [Threaded, ThreadedAsync])
    def test_everything_sync_runs_on_one_thread(self, log: Path, cls: Cls) -> None:
        with cls.new(str(log)) as box:
            if cls.name == "ThreadedAsync":
                assert box.beside.remote()
            with ThreadPoolExecutor(4) as threads:
                assert all(threads.map(box.add.remote, range(20)))
            assert list(box.values.remote_gen()) == list(range(20))
            report = box.close()
        assert report.failed_hooks == ()
        assert lines(log) == ["20"]

    @pytest.mark.parametrize("cls", [Pair, AsyncBox])
    def test_calls_run_side_by_side(self, tmp_path: Path, cls: Cls) -> None:
        one, two = str(tmp_path / "one"), str(tmp_path / "two")
        with cls.new() as pair:
            jobs = [pair.meet.spawn(one, two), pair.meet.spawn(two, one)]
            assert [job.get() for job in jobs] == [True, True]

    def test_one_at_a_time_in_the_order_of_submission(self) -> None:
        with Box.new() as box:
            jobs = [box.add.spawn() for _ in range(20)]
            assert [job.get() for job in jobs] == list(range(1, 21))

    def test_pending_calls_are_limited_exactly(self, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with Narrow.new() as box:
            jobs = [box.hold.spawn(str(gate)) for _ in range(3)]
            for verb in (box.add.spawn, box.add.remote, lambda: box.count.remote_gen(1)):
                with pytest.raises(PendingTasksExceededError, match="max_pending_tasks=3"):
                    verb()
            gate.touch()
            for job in jobs:
                job.get()
            assert box.add.remote() == 1

    def test_all_objects_of_an_instance_share_its_limit(self, name: str, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with Narrow.named(name) as box:
            again: list[Callable[[], ClassInstance]] = [
                lambda: Narrow.named(name),
                lambda: Narrow.attach(box.handle),
                lambda: Cls.from_handle(box.handle_json),
                lambda: pickle.loads(pickle.dumps(box)),
            ]
            for reach in again[:3]:
                reach().hold.spawn(str(gate))  # neither object nor job is kept
            gc.collect()
            for reach in again:
                with pytest.raises(PendingTasksExceededError, match="max_pending_tasks=3"):
                    reach().add.spawn()
            gate.touch()
            assert box.add.map([1] * 5) == [1, 2, 3, 4, 5]

    def test_all_objects_of_a_binding_share_its_pool(
        self, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pools, "IDLE_S", 0.001)
        gate = tmp_path / "gate"
        idle = Pool.bind(0, str(log))
        jobs = [Pool.bind(0, str(log)).hold.spawn(str(gate)) for _ in range(2)]
        eventually(lambda: lines(log).count("hold") == 2)  # so there are two containers
        shared = idle._target.pool
        second = Pool.attach(shared.replicas[1].ref.handle)
        shared.scale_down()
        assert "exit" not in lines(log)
        gate.touch()
        assert len({job.get() for job in jobs}) == 2
        shared.scale_down()
        assert second.add.remote() == 1  # it is idle, but somebody has it
        assert "exit" not in lines(log)
        del second
        gc.collect()
        eventually(lambda: lines(log).count("exit") == 1)
        idle.close()

    def test_nothing_is_kept_of_an_instance_that_nobody_has(self, name: str) -> None:
        def use(box: ClassInstance) -> weakref.ref[Any]:
            box.add.spawn()
            pool = weakref.ref(box._target.pool)
            box.close()
            return pool

        for pool in (use(Box.named(name)), use(Box.bind())):
            eventually(partial(gone, pool))

    # -- retries -------------------------------------------------------------------------------

    def test_retries(self, log: Path) -> None:
        with Flaky.new(str(log)) as flaky:
            assert flaky.good_at.remote(3) == 3
            assert len(lines(log)) == 3
            log.unlink()
            assert flaky.good_at.spawn(2).get() == 2
            assert len(lines(log)) == 2
            for verb in (flaky.good_at.remote, lambda n: flaky.good_at.spawn(n).get()):
                log.unlink()
                with pytest.raises(OddError):
                    verb(9)
                assert len(lines(log)) == 3
            log.unlink()
            with pytest.raises(RemoteError):
                flaky.gives_up.remote()
            assert len(lines(log)) == 3

    @pytest.mark.parametrize("verb", ["remote", "spawn", "remote_gen"])
    def test_a_call_keeps_its_slot_between_its_attempts(
        self, log: Path, tmp_path: Path, verb: str
    ) -> None:
        gate = tmp_path / "gate"
        with NarrowFlaky.new(str(log)) as box, ThreadPoolExecutor(1) as threads:
            call: dict[str, Callable[[], int]] = {
                "remote": lambda: box.good_at.remote(3),
                "spawn": lambda: box.good_at.spawn(3).get(),
                "remote_gen": lambda: 2 + sum(box.early.remote_gen()),
            }
            fails = threads.submit(call[verb])
            eventually(lambda: lines(log) == ["try"])
            holds = box.hold.spawn(str(gate))
            eventually(lambda: lines(log) == ["try", "try"])  # so the first has ended
            with pytest.raises(PendingTasksExceededError):
                box.hold.spawn(str(gate))
            gate.touch()
            assert fails.result() == 3
            assert holds.get() == 2
            assert box.good_at.remote(1) == 1

    def test_map_of_calls_that_are_retried(self, log: Path) -> None:
        with NarrowFlaky.new(str(log)) as box:
            assert box.fresh.map(range(6)) == list(range(6))

    def test_a_call_that_ran_out_of_time_never_runs_again(self, log: Path) -> None:
        with Flaky.new(str(log)) as flaky:
            with pytest.raises(FunctionTimeoutError):
                flaky.slow.remote()
            with pytest.raises(FunctionTimeoutError):
                flaky.slow.spawn().get()
            assert len(lines(log)) == 2

    def test_generators_are_retried_until_an_item_came(self, log: Path) -> None:
        with Flaky.new(str(log)) as flaky:
            assert list(flaky.early.remote_gen()) == [1]
            assert len(lines(log)) == 2
            log.unlink()
            stream = flaky.late.remote_gen()
            assert next(stream) == 1
            with pytest.raises(OddError):
                next(stream)
            assert len(lines(log)) == 1
