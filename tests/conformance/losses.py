"""Processes that die, or have to be replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apothic import ClassInstance, CloseReport
from apothic.backend import connect
from apothic.errors import (
    FunctionTimeoutError,
    InstanceClosedError,
    InstanceLostError,
    InstanceNotFoundError,
)
from tests.conformance.subjects import Box, Conformance, Flaky, Hasty, RetriedBox, lines
from tests.support import eventually


def close_elsewhere(instance: ClassInstance) -> CloseReport:
    """Close an instance as another process would: no object of this one is told."""
    return connect().attach(instance.handle).close()


def first_item(box: ClassInstance) -> int:
    return int(next(box.states.remote_gen()))


async def first_awaited_item(box: ClassInstance) -> int:
    async for item in box.states.remote_gen():
        return int(item)
    raise AssertionError("no item")


VERBS: dict[str, Callable[[ClassInstance], int]] = {
    "remote": lambda box: box.state.remote(),
    "spawn": lambda box: box.state.spawn().get(),
    "map": lambda box: box.echo.map([1])[0][0][0],
    "aio.remote": lambda box: asyncio.run(box.state.aio.remote()),
    "remote_gen": first_item,
    "async for": lambda box: asyncio.run(first_awaited_item(box)),
}
"""What gives 1 with a fresh box of 1, by every way that there is to a replica."""


class Losses(Conformance):
    """Processes that die, or have to be replaced."""

    def kill(self, instance: ClassInstance) -> None:
        """End the instance's process as ``kill -9`` does, and wait until that is known."""
        raise NotImplementedError

    def closing_is_known(self, instance: ClassInstance) -> None:
        """Wait until this process knows that an instance was closed elsewhere."""

    def test_a_named_instance_comes_back(self, name: str, log: Path, tmp_path: Path) -> None:
        box = Box.named(name, 1, str(log))
        assert box.add.remote(5) == 6
        running = box.hold.spawn(str(tmp_path / "never"))
        eventually(lambda: lines(log)[-1] == "hold")
        self.kill(box)
        with pytest.raises(InstanceLostError, match="lost"):
            running.get()
        assert box.add.remote(5) == 6  # constructed again, with the same arguments
        assert lines(log) == ["init", "enter", "hold", "init", "enter"]
        info = box.inspect()
        assert (info.state, info.restarts) == ("ready", 1)
        assert Box.attach(box.handle).add.remote() == 7
        assert [hook.name for hook in box.close().hooks] == ["down"]
        assert lines(log)[-1] == "exit"

    def test_another_instance_is_lost(self, log: Path) -> None:
        box = Box.new(1, str(log))
        handle = box.handle
        self.kill(box)
        for use in (box.add.remote, box.inspect, lambda: box.add.spawn().get()):
            with pytest.raises(InstanceLostError, match="lost"):
                use()
        with pytest.raises(InstanceNotFoundError, match="does not live"):
            Box.attach(handle)
        assert not box.close().hooks
        assert lines(log) == ["init", "enter"]

    def test_a_bound_instance_is_replaced(self, log: Path) -> None:
        with Box.bind(1, str(log)) as box:
            assert box.add.remote() == 2
            self.kill(box)
            with pytest.raises(InstanceLostError):
                box.add.remote()
            assert box.add.remote() == 2
        assert lines(log) == ["init", "enter", "init", "enter", "exit"]

    @pytest.mark.parametrize("verb", sorted(VERBS))
    def test_every_verb_finds_the_next_replica(self, log: Path, verb: str) -> None:
        with Box.bind(1, str(log)) as box:
            assert box.add.remote() == 2
            self.kill(box)
            with pytest.raises(InstanceLostError):
                VERBS[verb](box)
            assert VERBS[verb](box) == 1
            close_elsewhere(box)
            self.closing_is_known(box)
            assert VERBS[verb](box) == 1  # it was refused, so that it can run elsewhere
        assert lines(log).count("init") == 3

    @pytest.mark.parametrize("verb", sorted(VERBS))
    def test_retries_go_to_the_next_replica(self, log: Path, verb: str) -> None:
        with RetriedBox.bind(1, str(log)) as box:
            assert box.add.remote() == 2
            self.kill(box)
            assert VERBS[verb](box) == 1
        assert lines(log).count("init") == 2

    def test_a_bound_call_that_a_closing_interrupts_is_not_run_again(
        self, log: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.hasten_closing(monkeypatch)
        with Box.bind(1, str(log)) as box, ThreadPoolExecutor(2) as threads:
            running = threads.submit(box.nap.remote, 600)
            eventually(lambda: lines(log)[-1] == "nap")
            waiting = threads.submit(box.add.remote)
            eventually(lambda: box._target.in_flight == 2)
            assert close_elsewhere(box).interrupted_calls == 1
            with pytest.raises(InstanceClosedError, match="interrupted") as caught:
                running.result()
            assert not caught.value.refused
            assert waiting.result() == 2  # it had not begun: another instance runs it
            assert lines(log).count("nap") == 1
        assert lines(log).count("enter") == 2

    def test_what_another_instance_refused_is_not_run_again(self, log: Path) -> None:
        with Box.bind(1, str(log)) as box:
            who = box.who.remote()
            with pytest.raises(InstanceClosedError, match="another"):
                box.let_through.remote()
            assert lines(log)[-1] == "let-through"
            assert lines(log).count("let-through") == 1
            assert box.who.remote() == who

    def test_retries_cover_a_loss(self, name: str, log: Path, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        with Flaky.named(name, str(log)) as flaky:
            job = flaky.hold.spawn(str(gate))
            eventually(lambda: lines(log) == ["try"])
            self.kill(flaky)
            eventually(lambda: lines(log) == ["try", "try"])
            gate.touch()
            assert job.get() == 2

    def test_a_call_stuck_in_native_code_costs_the_process(self, log: Path) -> None:
        with Hasty.new(1, str(log)) as box:
            assert box.add.remote() == 2
            stuck, queued = box.stuck.spawn(4), box.add.spawn()
            with pytest.raises(FunctionTimeoutError, match="lost") as caught:
                stuck.get()
            assert caught.value.state_lost
            with pytest.raises(InstanceLostError):
                queued.get()
            assert box.add.remote() == 2
            assert box.inspect().restarts == 1
        assert lines(log) == ["init", "enter", "init", "enter", "exit"]
