"""Processes that die, or have to be replaced."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apothic import ClassInstance
from apothic.errors import (
    FunctionTimeoutError,
    InstanceClosedError,
    InstanceLostError,
    InstanceNotFoundError,
)
from tests.conformance.subjects import Box, Conformance, Flaky, Hasty, lines
from tests.support import eventually


class Losses(Conformance):
    """Processes that die, or have to be replaced."""

    def kill(self, instance: ClassInstance) -> None:
        """End the instance's process as ``kill -9`` does, and wait until that is known."""
        raise NotImplementedError

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

    def test_a_bound_call_that_a_closing_interrupts_is_not_run_again(
        self, log: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.hasten_closing(monkeypatch)
        with Box.bind(1, str(log)) as box, ThreadPoolExecutor(2) as threads:
            running = threads.submit(box.nap.remote, 600)
            eventually(lambda: lines(log)[-1] == "nap")
            waiting = threads.submit(box.add.remote)
            eventually(lambda: box._target.in_flight == 2)
            assert Box.close_handle(box.handle).interrupted_calls == 1
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
