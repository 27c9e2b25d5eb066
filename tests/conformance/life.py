"""Closing, hooks, surroundings and the async twins."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apothic import (
    App,
    Secret,
    Volume,
)
from apothic.backend import InstanceRef, StartRequest, connect
from apothic.errors import (
    ArgumentError,
    ConflictError,
    InstanceClosedError,
    InstanceStartError,
    RemoteError,
)
from tests.conformance.exceptions import OddError
from tests.conformance.subjects import (
    HOOKED_LIFE,
    SMALL,
    AsyncBox,
    Box,
    Conformance,
    Hooked,
    KeepsFiles,
    Pool,
    ReadsEnvironment,
    lines,
)
from tests.support import eventually


class Life(Conformance):
    """Closing, hooks, surroundings and the async twins."""

    # -- the end -------------------------------------------------------------------------------

    def test_closing(self, log: Path) -> None:
        box = Box.new(0, str(log))
        report = box.close()
        assert report.closed
        assert [hook.name for hook in report.hooks] == ["down"]
        assert report.hooks[0].error is None
        assert report.interrupted_calls == 0
        assert box.closed
        assert not box.close().closed
        for use in (box.add.remote, box.add.spawn, box.inspect, lambda: list(box.count(1))):
            with pytest.raises(InstanceClosedError, match="closed"):
                use()
        assert lines(log) == ["init", "enter", "exit"]

    def test_closed_by_another(self) -> None:
        box = Box.new()
        Box.attach(box.handle).close()
        for use in (box.add.remote, lambda: box.add.spawn().get(), lambda: list(box.count(1))):
            with pytest.raises(InstanceClosedError, match="closed"):
                use()

    def test_closing_one_object_of_a_binding(self, log: Path) -> None:
        one, same = Box.bind(0, str(log)), Box.bind(0, str(log))
        assert one.add.remote() == 1
        assert same.add.remote() == 2
        assert one.close().closed
        assert (one.closed, same.closed) == (True, False)
        with pytest.raises(InstanceClosedError, match="this process closed it"):
            one.add.remote()
        assert same.add.remote() == 1  # another instance
        same.close()
        assert lines(log) == ["init", "enter", "exit"] * 2

    def test_never_started(self) -> None:
        box = Box.bind(uuid.uuid4().int)
        assert not box.close().closed
        with pytest.raises(InstanceClosedError):
            box.add.remote()

    def test_closing_lets_running_calls_finish(self, tmp_path: Path, log: Path) -> None:
        gate = tmp_path / "gate"
        box = Box.new(0, str(log))
        job = box.hold.spawn(str(gate))
        eventually(lambda: lines(log)[-1] == "hold")
        with ThreadPoolExecutor(1) as threads:
            closing = threads.submit(box.close)
            gate.touch()
            assert closing.result().interrupted_calls == 0
        assert job.get()
        assert lines(log) == ["init", "enter", "hold", "exit"]

    def test_hooks_run_in_order_each_even_if_another_failed(self, log: Path) -> None:
        Hooked.new(str(log)).close()
        assert lines(log) == HOOKED_LIFE
        log.unlink()
        report = Hooked.new(str(log), "a_down").close()
        assert lines(log) == HOOKED_LIFE
        assert [hook.name for hook in report.hooks] == ["a_down", "z_last", "base_down"]
        (failed,) = report.failed_hooks
        assert failed.name == "a_down"
        assert failed.error == "OddError: 1 against 2"
        assert "raise OddError(1, right=2)" in (failed.traceback or "")

    def test_async_hooks(self, log: Path) -> None:
        with AsyncBox.new(str(log)) as box:
            assert box.double.remote(1) == 2
        assert lines(log) == ["enter", "exit"]

    # -- surroundings --------------------------------------------------------------------------

    def test_secrets_are_variables_of_the_instance(self) -> None:
        key = f"CONFORMANCE_{uuid.uuid4().hex.upper()}"
        secret = Secret.create(key, "hunter2")
        reader = App("conformance").cls(**SMALL, secrets=[secret])(ReadsEnvironment)
        try:
            with pytest.raises(ConflictError, match=key):
                Secret.create(key, "other")
            assert secret in Secret.list()
            with reader.new(key) as one:
                assert one.seen.remote() == ("hunter2", "hunter2")
                Secret.set(key, "swordfish")
                assert one.seen.remote()[0] == "hunter2"
                assert "hunter2" not in f"{one!r}{one.handle_json}{one.inspect()!r}"
        finally:
            secret.delete()
        assert key not in os.environ
        with pytest.raises(InstanceStartError, match=key):
            reader.new(key)

    def test_volumes_outlive_instances(self, tmp_path: Path) -> None:
        volume = Volume.vast_local(f"conformance-{uuid.uuid4().hex}", size_gb=1)
        path = str(tmp_path / "deep" / "data")
        mounted = App("conformance").cls(**SMALL, volumes={path: volume})(KeepsFiles)
        with mounted.new(path) as one:
            one.write.remote("kept")
        assert not os.path.lexists(path)
        with mounted.new(path) as two:
            assert two.read.remote() == "kept"
        volume.delete()
        assert volume.name not in [found.name for found in Volume.list()]

    # -- async twins ---------------------------------------------------------------------------

    def test_async_twins(self, name: str, log: Path) -> None:
        async def scenario() -> None:
            async with await Box.aio.new(1) as box:
                assert await box.add.aio.remote(1) == 2
                assert await box.add.aio(1) == 3
                assert await (await box.add.aio.spawn()) == 4
                assert await box.add.spawn() == 5
                assert await (await box.add.aio.spawn()).aio.get() == 6
                assert await box.add.aio.map([1, 1]) == [7, 8]
                assert await box.echo.aio.starmap([(1,)]) == [((1,), {})]
                assert await box.add.aio.for_each([1]) is None
                assert [await job for job in await box.add.aio.spawn_map([1, 1])] == [10, 11]
                assert [item async for item in box.count.aio.remote_gen(3)] == [0, 1, 2]
                assert [item async for item in box.count.remote_gen(3)] == [0, 1, 2]
                assert [item async for item in box.count.aio(3)] == [0, 1, 2]
                assert (await box.aio.inspect()).state == "ready"
                for how, expected in (("odd", OddError), ("exit", RemoteError)):
                    with pytest.raises(expected):
                        await box.fail.aio.remote(how)
                with pytest.raises(ArgumentError):
                    await box.add.aio.remote(1, 2)
                attached = await Box.aio.attach(box.handle_json)
                assert await attached.add.aio.remote() == 12
                assert await asyncio.gather(*(box.echo.aio.remote(n) for n in range(10))) == [
                    ((n,), {}) for n in range(10)
                ]
            async with await Box.aio.named(name, 2) as named:
                assert await named.add.aio.remote() == 3
            assert not (await Box.aio.close_named(name)).closed
            async with await Box.aio.remote(0, str(log)) as shared:
                assert lines(log) == ["init", "enter"]
                assert (await Box.aio.bind(0, str(log))).id == shared.id
            async with await Box.partial(5).aio.new() as five:
                assert await five.add.aio.remote() == 6
                assert (await Box.aio.close_handle(five.handle)).closed
            async with await AsyncBox.aio.local() as local:
                assert await local.double(4) == 8

        asyncio.run(scenario())

    def test_no_container_is_opened_on_the_event_loop(
        self, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, opened_on = connect(), list[int]()
        start, gate = client.start, tmp_path / "gate"

        def start_and_note(request: StartRequest) -> InstanceRef:
            opened_on.append(threading.get_ident())
            return start(request)

        async def scenario() -> None:
            async with Pool.bind(0, str(log)) as pool:
                jobs = [await pool.hold.aio.spawn(str(gate)) for _ in range(2)]
                gate.touch()
                assert len({await job for job in jobs}) == 2
            assert threading.get_ident() not in opened_on
            assert len(opened_on) == 2

        monkeypatch.setattr(client, "start", start_and_note)
        asyncio.run(scenario())

    def test_calls_that_overlap_in_one_loop(self) -> None:
        async def scenario() -> list[int]:
            async with await AsyncBox.aio.new() as box:
                return list(await asyncio.gather(*(box.double.aio.remote(n) for n in range(30))))

        assert asyncio.run(scenario()) == [2 * n for n in range(30)]
