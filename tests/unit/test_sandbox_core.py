"""`SessionCore` on a workspace that lives in memory: what no real one can be brought to do at will."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from typing_extensions import override

from apothic import session_core, uploads
from apothic.backend import ExecRequest
from apothic.errors import (
    ExecStartError,
    SandboxClosedError,
    SandboxError,
    SandboxLostError,
    SandboxNoSpaceError,
)
from apothic.session_core import SessionCore
from apothic.workspace import (
    Command,
    Exit,
    FileReader,
    FileStat,
    FileWriter,
    Process,
    StartFailure,
    StartStage,
    Workspace,
)


class Writer(FileWriter):
    def __init__(self, files: dict[bytes, bytes], path: bytes) -> None:
        self.files, self.path, self.data, self.over = files, path, b"", False

    @override
    async def write(self, data: bytes | memoryview) -> None:
        await asyncio.sleep(0)
        if b"full" in bytes(data):
            raise OSError(errno.ENOSPC, "full")
        self.data += bytes(data)

    @override
    async def finish(self) -> None:
        self.over = True
        self.files[self.path] = self.data

    @override
    async def abort(self) -> None:
        if not self.over:
            self.over = True
            self.files.pop(self.path, None)


class Slow(Writer):
    """A file whose disk takes what is written only when it is aborted."""

    def __init__(self, files: dict[bytes, bytes], path: bytes) -> None:
        super().__init__(files, path)
        self.writing = asyncio.Event()
        self.aborted = asyncio.Event()

    @override
    async def write(self, data: bytes | memoryview) -> None:
        self.writing.set()
        await self.aborted.wait()
        raise OSError(errno.ECANCELED, "aborted")

    @override
    async def abort(self) -> None:
        await super().abort()
        self.aborted.set()


class Stuck(Slow):
    """A file whose disk does not answer any more."""

    @override
    async def abort(self) -> None:
        await asyncio.Event().wait()


class Ended(Process):
    """A program that has ended already, or that failed to start."""

    def __init__(self, how: Exit | StartFailure) -> None:
        self.how = how
        self.detached = False

    @override
    async def next_output(self) -> None:
        if isinstance(self.how, StartFailure):
            raise self.how

    @property
    @override
    def exit(self) -> Exit:
        assert isinstance(self.how, Exit)
        return self.how

    @override
    async def has_ended(self) -> bool:
        return True

    @override
    async def kill(self, grace_s: float, *, discard_output: bool = False) -> None:
        raise AssertionError

    @override
    def detach(self) -> None:
        self.detached = True


class Held(Process):
    """A program that runs until it is killed, and takes its time to die."""

    def __init__(self, running: set[Held]) -> None:
        self.running = running
        self.dying = asyncio.Event()
        self.may_die = asyncio.Event()
        self.dead = asyncio.Event()
        self.detached = False
        running.add(self)

    @override
    async def next_output(self) -> None:
        await self.dead.wait()

    @property
    @override
    def exit(self) -> Exit:
        return Exit(None, 15, 1)

    @override
    async def has_ended(self) -> bool:
        return self.dead.is_set()

    @override
    async def kill(self, grace_s: float, *, discard_output: bool = False) -> None:
        self.dying.set()
        await self.may_die.wait()
        self.dead.set()
        self.running.discard(self)

    @override
    def detach(self) -> None:
        self.detached = True


class Memory(Workspace):
    def __init__(self, state: bytes = b"") -> None:
        self.files: dict[bytes, bytes] = {}
        self.writer: Callable[[dict[bytes, bytes], bytes], Writer] = Writer
        self.opened: list[Writer] = []
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.left: dict[bytes, bytes] | None = None
        self.made: list[bytes] = []
        self.state = state
        self.command: Command | None = None
        self.state_max: int | None = None
        self.next: Exit | StartFailure = Exit(0, None, 0.1)
        self.lost = False
        self.holding = False
        self.held: list[Held] = []
        self.running: set[Held] = set()

    async def environ(self) -> Mapping[bytes, bytes]:
        return {b"HOME": b"/root", b"PATH": b"/bin", b"TOKEN": b"image"}

    async def spawn(self, command: Command) -> Process:
        if self.lost:
            raise SandboxLostError("gone.")
        self.command = command
        if self.holding:
            held = Held(self.running)
            self.held.append(held)
            return held
        return Ended(self.next)

    async def stat(self, path: bytes) -> FileStat:
        return FileStat(0o40755, 0)

    async def listdir(self, path: bytes) -> list[bytes]:
        raise OSError(errno.EIO, "broken")

    async def mkdir(self, path: bytes, *, parents: bool, exist_ok: bool) -> None:
        self.made.append(path)

    async def open_reader(self, path: bytes) -> FileReader:
        raise OSError(errno.ENOENT, "")

    async def open_writer(
        self, path: bytes, *, append: bool, make_parents: bool, size: int | None
    ) -> FileWriter:
        self.files[path] = b""
        await self.may_open.wait()
        writer = self.writer(self.files, path)
        self.opened.append(writer)
        return writer

    async def load_state(self) -> bytes:
        return self.state

    async def save_state(self, state: bytes) -> None:
        await asyncio.sleep(0)
        if self.state_max is not None and len(state) > self.state_max:
            raise SandboxError("too much state.")
        self.state = state

    async def close(self) -> None:
        if self.left is None:
            self.left = dict(self.files)


def request(*argv: bytes, **more: Any) -> ExecRequest:
    return ExecRequest(argv or (b"true",), 10, 100, **more)


async def started(workspace: Memory, **more: Any) -> SessionCore:
    core = SessionCore(workspace, label="the session", **more)
    await core.start(b"/work", {b"OWN": b"1", b"TOKEN": None})
    return core


def test_state_survives_a_new_core() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        assert workspace.made == [b"/work"]
        await core.chdir(b"b\xff/..//c")
        await core.update_env({b"ODD": b"\xfe"})
        again = SessionCore(workspace, label="the session")
        await again.start(b"/ignored", {b"IGNORED": b"1"})
        assert workspace.made == [b"/work"]
        assert await again.pwd() == b"/work/c"
        env = await again.get_env()
        assert env == {b"HOME": b"/root", b"PATH": b"/bin", b"OWN": b"1", b"ODD": b"\xfe"}

    asyncio.run(work())


def test_secrets_stay_out_of_the_state() -> None:
    async def work() -> None:
        workspace = Memory()
        core = SessionCore(workspace, label="x", secrets={b"TOKEN": b"hunter2"})
        await core.start(b"/", {})
        await core.update_env({b"A": b"1"})
        assert (await core.get_env())[b"TOKEN"] == b"hunter2"
        assert b"hunter2" not in workspace.state

    asyncio.run(work())


def test_a_state_that_cannot_be_kept_takes_no_effect() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        workspace.state_max, state = len(workspace.state) + 20, workspace.state
        before = await core.get_env()
        with pytest.raises(SandboxError, match="too much"):
            await core.update_env({b"LARGE": b"x" * 100, b"OWN": None})
        with pytest.raises(SandboxError, match="too much"):
            await core.chdir(b"x" * 100)
        assert (await core.get_env(), await core.pwd()) == (before, b"/work")
        await core.exec(request(), None)
        assert workspace.command is not None
        assert (workspace.command.env, workspace.command.cwd) == (before, b"/work")
        assert workspace.state == state
        assert (await core.update_env({b"A": b"1"}))[b"A"] == b"1"

    asyncio.run(work())


def test_changes_at_once_are_all_kept() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        names = [b"N%d" % number for number in range(10)]
        changes = asyncio.gather(*[core.update_env({name: name}) for name in names])
        path = await core.chdir(b"below")
        seen = await changes
        assert all(env[name] == name for env, name in zip(seen, names, strict=True))
        again = SessionCore(workspace, label="x")
        await again.start(b"/", {})
        for each in (core, again):
            assert await each.pwd() == path == b"/work/below"
            assert set(names) < set(await each.get_env())

    asyncio.run(work())


def test_home_of_another_user_is_left_to_the_workspace() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        for own, user, home in (
            ({}, b"", b"/root"),
            ({}, b"joe", None),
            ({b"HOME": b"/own"}, b"joe", b"/own"),
        ):
            await core.exec(request(user=user, env=own), None)
            assert workspace.command is not None
            assert workspace.command.env.get(b"HOME") == home

    asyncio.run(work())


def test_how_a_program_ended() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        for how, code in ((Exit(3, None, 1), 3), (Exit(None, 15, 1), 143)):
            workspace.next = how
            assert (await core.exec(request(), None)).returncode == code
        workspace.next = Exit(None, 9, 1, oom_killed=True)
        assert (await core.exec(request(), None)).oom_killed
        for number, stage, expected in (
            (errno.ENOENT, StartStage.PROGRAM, 127),
            (errno.EACCES, StartStage.PROGRAM, 126),
            (errno.ENOEXEC, StartStage.PROGRAM, 126),
        ):
            workspace.next = StartFailure(stage, number)
            outcome = await core.exec(request(b"prog"), None)
            assert outcome.returncode == expected
            assert b"prog" in outcome.stderr
        for number, stage, text in (
            (errno.EINVAL, StartStage.USER, "user"),
            (errno.E2BIG, StartStage.PROGRAM, "stdin or a file"),
            (errno.EAGAIN, StartStage.OTHER, "limit of processes"),
            (errno.ENOMEM, StartStage.OTHER, "memory_mb"),
        ):
            workspace.next = StartFailure(stage, number)
            with pytest.raises(ExecStartError, match=text) as caught:
                await core.exec(request(b"prog"), None)
            assert caught.value.errno == number
        assert core.status().running_calls == 0

    asyncio.run(work())


# Slots. Each way to end an exec is followed by as many execs as there are slots, and one more.


async def settled() -> None:
    """Let everything go on that can: nothing here waits for more than a few turns of the loop."""
    for _ in range(20):
        await asyncio.sleep(0)


async def check_slots(core: SessionCore, workspace: Memory) -> None:
    """See that both slots are free, and that there is no third."""
    assert workspace.running == set()
    assert core.status().running_calls == 0
    workspace.holding = True
    del workspace.held[:]
    execs = [asyncio.create_task(core.exec(request(), None)) for _ in range(3)]
    await settled()
    assert len(workspace.held) == 2
    for task in execs:
        task.cancel()
    await settled()
    for held in workspace.held:
        held.may_die.set()
    assert len(await asyncio.gather(*execs, return_exceptions=True)) == 3
    assert workspace.running == set()


async def end_by_failing(core: SessionCore, workspace: Memory) -> None:
    workspace.holding = False
    for stage, number in ((StartStage.PROGRAM, errno.ENOENT), (StartStage.OTHER, errno.EAGAIN)):
        workspace.next = StartFailure(stage, number)
        with contextlib.suppress(ExecStartError):
            await core.exec(request(), None)
        with contextlib.suppress(ExecStartError):
            assert [item async for item in core.exec_stream(request(), None)]


async def end_by_loss(core: SessionCore, workspace: Memory) -> None:
    workspace.lost = True
    with pytest.raises(SandboxLostError):
        await core.exec(request(), None)
    workspace.lost = False


async def end_by_itself(core: SessionCore, workspace: Memory) -> None:
    workspace.holding, workspace.next = False, Exit(0, None, 0.1)
    await core.exec(request(), None)
    assert len([item async for item in core.exec_stream(request(), None)]) == 1


async def end_by_timeout(core: SessionCore, workspace: Memory) -> None:
    task = asyncio.create_task(core.exec(ExecRequest((b"x",), 0.001, 100), None))
    await settled()
    await workspace.held[-1].dying.wait()
    workspace.held[-1].may_die.set()
    assert (await task).timed_out


async def end_by_cancelling_during_a_timeout(core: SessionCore, workspace: Memory) -> None:
    task = asyncio.create_task(core.exec(ExecRequest((b"x",), 0.001, 100), None))
    await settled()
    await workspace.held[-1].dying.wait()
    task.cancel()
    await settled()
    assert not task.done()
    workspace.held[-1].may_die.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def end_by_closing_a_stream(core: SessionCore, workspace: Memory) -> None:
    workspace.holding, workspace.next = False, StartFailure(StartStage.PROGRAM, errno.ENOENT)
    stream = core.exec_stream(request(), None)
    assert (await stream.__anext__())[0] == "stderr"
    await stream.aclose()  # type: ignore[attr-defined]  # it is a generator


async def end_while_waiting(core: SessionCore, workspace: Memory) -> None:
    running = [asyncio.create_task(core.exec(request(), None)) for _ in range(2)]
    await settled()
    waiting = asyncio.create_task(core.exec(request(), None))
    await settled()
    assert len(workspace.running) == 2
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for task, held in zip(running, list(workspace.held), strict=True):
        held.may_die.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def end_by_cancelling(core: SessionCore, workspace: Memory) -> None:
    task = asyncio.create_task(core.exec(request(), None))
    await settled()
    task.cancel()
    await workspace.held[-1].dying.wait()
    assert not task.done()
    workspace.held[-1].may_die.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert workspace.held[-1].detached


async def end_by_cancelling_again_and_again(core: SessionCore, workspace: Memory) -> None:
    tasks = [asyncio.create_task(core.exec(request(), None)) for _ in range(2)]
    await settled()
    next_one = asyncio.create_task(core.exec(request(), None))
    for _ in range(3):
        tasks[0].cancel()
        await settled()
        assert not tasks[0].done()  # its program is not dead
        assert len(workspace.held) == 2  # so its slot is taken
    for task, held in zip(tasks, list(workspace.held), strict=True):
        held.may_die.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.detached
    await settled()
    workspace.held[-1].may_die.set()
    next_one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await next_one


@pytest.mark.parametrize(
    "end",
    [
        end_by_failing,
        end_by_loss,
        end_by_itself,
        end_by_timeout,
        end_by_cancelling_during_a_timeout,
        end_by_closing_a_stream,
        end_while_waiting,
        end_by_cancelling,
        end_by_cancelling_again_and_again,
    ],
)
def test_a_slot_is_free_again_once_the_program_is_dead(
    end: Callable[[SessionCore, Memory], Awaitable[None]],
) -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace, concurrent_requests=2)
        try:
            for _ in range(3):
                workspace.holding = True
                del workspace.held[:]
                await end(core, workspace)
            await check_slots(core, workspace)
        finally:
            for held in workspace.running:
                held.may_die.set()  # where the test has failed

    asyncio.run(asyncio.wait_for(work(), 30))


def test_parts_that_overtake_one_another() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        upload = await core.upload_begin(b"f", 9, False, False)
        await asyncio.gather(
            core.upload_part(upload, 6, b"ghi"),
            core.upload_part(upload, 3, b"def"),
            core.upload_part(upload, 0, b"abc"),
        )
        assert await core.upload_end(upload) == b"/work/f"
        assert workspace.files == {b"/work/f": b"abcdefghi"}
        with pytest.raises(SandboxError, match="no longer open"):
            await core.upload_part(upload, 9, b"j")

    asyncio.run(work())


def test_a_part_that_fails_fails_those_after_it() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        upload = await core.upload_begin(b"f", None, False, False)
        outcomes = await asyncio.gather(
            core.upload_part(upload, 4, b"late"),
            core.upload_part(upload, 0, b"full"),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [SandboxNoSpaceError] * 2
        await core.upload_abort(upload)
        await core.upload_abort(upload)
        assert workspace.files == {}

    asyncio.run(work())


def test_close_ends_what_is_being_written_first() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        begun = await core.upload_begin(b"begun", None, False, False)
        await core.upload_part(begun, 0, b"part")
        workspace.writer = Slow
        upload = await core.upload_begin(b"written", None, False, False)
        verbs = [
            asyncio.create_task(core.upload_part(upload, 4, b"late")),
            asyncio.create_task(core.upload_part(upload, 0, b"part")),
            asyncio.create_task(core.write(b"whole", b"content", False, False)),
        ]
        for number in (1, 2):
            while len(workspace.opened) <= number:
                await asyncio.sleep(0)
            slow = workspace.opened[number]
            assert isinstance(slow, Slow)
            await slow.writing.wait()
        await core.close()
        assert workspace.left == workspace.files == {}
        for outcome in await asyncio.gather(*verbs, return_exceptions=True):
            assert isinstance(outcome, SandboxClosedError)
            assert "the session" in str(outcome)
        with pytest.raises(SandboxClosedError):
            await core.upload_part(begun, 4, b"more")
        await core.upload_abort(begun)
        assert core.status().running_calls == 0

    asyncio.run(asyncio.wait_for(work(), 30))


def test_what_is_opened_while_the_session_is_closed() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        workspace.may_open.clear()
        verbs = [
            asyncio.create_task(core.upload_begin(b"upload", None, False, False)),
            asyncio.create_task(core.write(b"whole", b"content", False, False)),
        ]
        while len(workspace.files) < 2:
            await asyncio.sleep(0)
        await core.close()
        workspace.may_open.set()
        for outcome in await asyncio.gather(*verbs, return_exceptions=True):
            assert isinstance(outcome, SandboxClosedError)
        assert workspace.files == {}
        assert core._uploads == {}

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_disk_that_does_not_answer_holds_up_no_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_core, "CLOSE_WAIT_S", 0.01)

    async def work() -> None:
        workspace = Memory()
        workspace.writer = Stuck
        core = await started(workspace)
        await core.upload_begin(b"f", None, False, False)
        await core.close()
        assert workspace.left == {b"/work/f": b""}

    asyncio.run(asyncio.wait_for(work(), 30))


def test_an_upload_that_nobody_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "UPLOAD_IDLE_S", 0.01)

    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        await core.upload_begin(b"f", None, False, False)
        while workspace.files:
            await asyncio.sleep(0.001)

    asyncio.run(work())


def test_a_lost_workspace_and_a_closed_session() -> None:
    async def work() -> None:
        workspace = Memory()
        core = await started(workspace)
        with pytest.raises(SandboxError, match="/work"):
            await core.listdir(b".")
        workspace.lost = True
        with pytest.raises(SandboxLostError):
            await core.exec(request(), None)
        await core.close()
        await core.close()
        with pytest.raises(SandboxClosedError, match="the session"):
            await core.pwd()

    asyncio.run(work())
