"""`ExecRun`: one exec of a session, from waiting for its turn until nothing of it is left to do."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

from typing_extensions import Self

from apothic.backend import ExecOutcome
from apothic.errors import ExecStartError
from apothic.file_errors import file_error, shown
from apothic.workspace import (
    Command,
    OutputKind,
    Process,
    StartFailure,
    StartStage,
    Workspace,
)

__all__ = ["KILL_GRACE_S", "ExecRun", "KeptOutput"]

KILL_GRACE_S = 1.0
"""Seconds between SIGTERM and SIGKILL for what ran too long or is not wanted any more."""

_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR)
_NOT_EXECUTABLE = (errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.EISDIR, errno.ELOOP)


class ExecRun:
    """A program that is about to run; ``async with`` it, take its output, then look at `outcome`.

    Leaving the block before the end of the output, for whatever reason, kills the program and all
    that descends from it, and returns when that is dead, also where the task is cancelled again.
    """

    def __init__(
        self,
        workspace: Workspace,
        command: Callable[[], Command],
        *,
        timeout_s: float,
        slots: asyncio.Semaphore | None,
        label: str,
    ) -> None:
        """Prepare.

        Args:
            workspace: where it runs.
            command: gives what to start, once it is its turn.
            timeout_s: seconds, from its start on, after which it and all that it started is killed
                if it runs still; how long its output is taken does not count.
            slots: bounds how many run at once; None does not.
            label: names the session in messages.
        """
        self._workspace = workspace
        self._command = command
        self._timeout_s = timeout_s
        self._slots = slots
        self._label = label
        self._process: Process | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._expiring: asyncio.Task[None] | None = None
        self._outcome: ExecOutcome | None = None

    @property
    def outcome(self) -> ExecOutcome:
        """How it ended, without its output; after `next_output` gave None."""
        assert self._outcome is not None  # the output has ended
        return self._outcome

    async def next_output(self) -> tuple[OutputKind, bytes] | None:
        """Give the next piece of output; None at the end. The first call starts the program.

        A program that is missing or cannot be executed ends as in a shell: with 127 or 126, and a
        line on its stderr that says why.

        Raises:
            SandboxFileError: its directory cannot be one.
            ExecStartError: it could not be started for another reason.
        """
        if self._outcome is not None:
            return None
        command: Command | None = None
        try:
            process = self._process
            if process is None:
                command = self._command()
                process = self._process = await self._workspace.spawn(command)
                # Behind the start: the program runs meanwhile.
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._timeout_s, self._expire, process)
            if (piece := await process.next_output()) is not None:
                return piece
        except StartFailure as failure:
            self._let_go()
            assert command is not None  # only the first call raises it
            returncode, words = _not_started(failure, command, self._label)
            self._outcome = ExecOutcome(returncode)
            return "stderr", words
        self._stop_clock()
        if self._expiring is not None:
            await self._expiring  # until nothing is alive
        ended = process.exit
        self._let_go()
        self._outcome = ExecOutcome(
            returncode=ended.status if ended.status is not None else 128 + (ended.signal or 0),
            signal=ended.signal,
            duration_s=ended.duration_s,
            oom_killed=ended.oom_killed,
            timed_out=self._expired,
        )
        return None

    def _expire(self, process: Process) -> None:
        # Whether or not its output is being taken.
        self._expiring = asyncio.get_running_loop().create_task(self._kill_if_late(process))

    async def _kill_if_late(self, process: Process) -> None:
        # One that has ended in time only waits for who takes its output; what it left goes on.
        if not await process.has_ended():
            self._expired = True
            await process.kill(KILL_GRACE_S)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _let_go(self) -> None:
        """Have nothing to do with it any more: it has ended, or never was."""
        self._stop_clock()
        if self._process is not None:
            self._process.detach()
            self._process = None

    async def __aenter__(self) -> Self:
        """Wait for its turn."""
        if self._slots is not None:
            await self._slots.acquire()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill what has not ended, and let the next have its turn."""
        try:
            if self._process is not None:
                self._stop_clock()
                try:
                    await _to_its_end(self._process.kill(KILL_GRACE_S, discard_output=True))
                finally:
                    self._let_go()
        finally:
            if self._slots is not None:
                self._slots.release()


async def _to_its_end(killing: Coroutine[Any, Any, None]) -> None:
    """Await a kill; being cancelled meanwhile, however often, comes after it."""
    task = asyncio.ensure_future(killing)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    try:
        task.result()
    finally:
        if cancelled is not None:
            raise cancelled


class KeptOutput:
    """Output up to a limit; what comes beyond it is dropped."""

    def __init__(self, limit: int) -> None:
        """Keep up to so many bytes."""
        self._pieces: list[bytes] = []
        self._left = limit
        self.truncated: bool = False

    def add(self, data: bytes) -> None:
        """Take a piece."""
        if len(data) > self._left:
            self.truncated = True
            data = data[: self._left]
        if data:
            self._left -= len(data)
            self._pieces.append(data)

    def join(self) -> bytes:
        """Give what was kept."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


def _not_started(failure: StartFailure, command: Command, label: str) -> tuple[int, bytes]:
    """Give the result of a program that is missing or not executable; raise what is no result."""
    number = failure.errno
    program = command.argv[0]
    if failure.stage is StartStage.PROGRAM and number in _NOT_FOUND:
        where = b"" if b"/" in program else b" in PATH"
        return 127, b"%s: not found%s\n" % (program, where)
    if failure.stage is StartStage.PROGRAM and number in _NOT_EXECUTABLE:
        return 126, b"%s: cannot be executed: %s\n" % (program, os.strerror(number).encode())
    if failure.stage is StartStage.CWD:
        raise file_error(number, command.cwd)
    name = shown(program)
    if failure.stage is StartStage.USER:
        raise ExecStartError(
            f"{label}: user={shown(command.user)} cannot run {name}: {os.strerror(number)}. Name a "
            f"user that exists inside and that this session may become.",
            number,
        )
    remedy = {
        errno.E2BIG: "Pass less in arguments and variables, or use stdin or a file.",
        errno.EAGAIN: "The limit of processes is reached: end some.",
        errno.ENOMEM: "Memory is short: end some processes, or raise memory_mb.",
    }.get(number, "Look at what else runs in the session.")
    raise ExecStartError(
        f"{label}: {name} could not be started: {os.strerror(number)}. {remedy}", number
    )
