"""Programs of a local session, as its event loop sees them."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import signal
import termios
from collections.abc import Callable

from typing_extensions import override

from apothic.errors import SandboxClosedError, SandboxLostError
from apothic.local_session import supervisor
from apothic.workspace import Exit, OutputKind, Process, StartFailure, StartStage

__all__ = ["LocalProcess", "Pipes"]

READ_BYTES = 256 * 1024
_PIPE_BYTES = 1024 * 1024
_KILL_ROUND_S = 0.02
_STAGES = {
    supervisor.CWD: StartStage.CWD,
    supervisor.USER: StartStage.USER,
    supervisor.PROGRAM: StartStage.PROGRAM,
    supervisor.OTHER: StartStage.OTHER,
}


class Pipes:
    """The pipes between this process and one exec; ``theirs`` goes to the supervisor."""

    def __init__(self, *, stdin: bool) -> None:
        """Make them; each fd is closed by `close_theirs`, or by the process made of them."""
        self.ours: list[int] = []
        self.theirs: list[int] = []
        self.report: int
        self.stdin: int
        self.stdout: int
        self.stderr: int
        try:
            self.report = self._from_them()
            if stdin:
                theirs, self.stdin = os.pipe()
                self.theirs.append(theirs)
                self.ours.append(self.stdin)
                os.set_blocking(self.stdin, False)
            else:
                self.stdin = -1
                self.theirs.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            self.stdout = self._from_them()
            self.stderr = self._from_them()
        except BaseException:
            self.close_theirs()
            for fd in self.ours:
                os.close(fd)
            raise

    def _from_them(self) -> int:
        ours, theirs = os.pipe()
        self.ours.append(ours)
        self.theirs.append(theirs)
        os.set_blocking(ours, False)
        set_size = getattr(fcntl, "F_SETPIPE_SZ", None)
        if set_size is not None:
            with contextlib.suppress(OSError):  # the user's share of pipe memory is used up
                fcntl.fcntl(ours, set_size, _PIPE_BYTES)
        return ours

    def close_theirs(self) -> None:
        """Close the other ends, once the supervisor has them."""
        while self.theirs:
            os.close(self.theirs.pop())


class LocalProcess(Process):
    """One exec, with its keeper."""

    def __init__(
        self,
        pipes: Pipes,
        stdin: bytes | memoryview | None,
        closing: Callable[[], bool],
        ended: Callable[[LocalProcess], None],
    ) -> None:
        """Watch the pipes of an exec that the supervisor has been told of.

        Args:
            pipes: they are the process's from now on.
            stdin: its input.
            closing: whether the session is being closed.
            ended: called when nothing of it is alive and all of its pipes are closed.
        """
        self._loop = asyncio.get_running_loop()
        self._closing = closing
        self._ended = ended
        self._report = pipes.report
        self._readers: dict[int, OutputKind] = {pipes.stdout: "stdout", pipes.stderr: "stderr"}
        self._left: dict[int, int] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._detached = False
        self._buffer = b""
        self._keeper = self._group = 0
        self._exit: Exit | None = None
        self._failure: StartFailure | None = None
        self._gone = asyncio.Event()
        self._known = asyncio.Event()
        self._loop.add_reader(self._report, self._read_report)
        self._stdin = pipes.stdin
        self._input = memoryview(stdin or b"")
        if self._stdin >= 0:
            self._loop.add_writer(self._stdin, self._write_input)

    # -- what comes back -----------------------------------------------------------------------

    def _read_report(self) -> None:
        try:
            data = os.read(self._report, 4096)
        except BlockingIOError:
            return
        self._buffer += data
        while len(self._buffer) >= supervisor.REPORT.size:
            kind, first, second = supervisor.REPORT.unpack_from(self._buffer)
            self._buffer = self._buffer[supervisor.REPORT.size :]
            if kind == supervisor.STARTED:
                self._keeper, self._group = first, second
                self._known.set()
            elif kind == supervisor.FAILED:
                self._failure = StartFailure(_STAGES[first], second)
            elif kind == supervisor.EXITED:
                self._exit = _exit_of(first, second)
        if not data:
            self._loop.remove_reader(self._report)
            os.close(self._report)
            self._gone.set()
            self._known.set()
            if self._detached:
                self._finish_watch()
        self._notify()

    def _write_input(self) -> None:
        try:
            while self._input:
                self._input = self._input[os.write(self._stdin, self._input[: 1 << 20]) :]
        except BlockingIOError:
            return
        except OSError:
            pass  # it does not want more
        self._close_input()

    def _close_input(self) -> None:
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1
            self._input = memoryview(b"")

    @override
    async def next_output(self) -> tuple[OutputKind, bytes] | None:
        while True:
            over = self._exit is not None or self._gone.is_set()
            if over and self._failure is not None:
                raise self._failure
            if over and self._left is None:
                # What is in the pipes now is the program's; what comes later is somebody else's.
                self._left = {fd: _waiting(fd) for fd in self._readers}
            for fd, kind in list(self._readers.items()):
                piece = self._take(fd)
                if piece:
                    return kind, piece
            if over:
                self._close_input()
                self._check_how()
                return None
            await self._change()

    def _take(self, fd: int) -> bytes:
        limit = READ_BYTES
        if self._left is not None:
            limit = min(limit, self._left[fd])
            if not limit:
                return b""
        try:
            data = os.read(fd, limit)
        except BlockingIOError:
            return b""
        if self._left is not None:
            self._left[fd] -= len(data)
        if not data:
            del self._readers[fd]
            self._loop.remove_reader(fd)
            os.close(fd)
        return data

    async def _change(self) -> None:
        """Wait for output, or for a report."""
        self._wake = self._loop.create_future()
        for fd in self._readers:
            self._loop.add_reader(fd, self._notify)
        try:
            await self._wake
        finally:
            for fd in self._readers:
                self._loop.remove_reader(fd)
            self._wake = None

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _check_how(self) -> None:
        if self._closing():
            raise SandboxClosedError("the session was closed while a program ran; it was killed.")
        if self._exit is None:
            raise SandboxLostError(
                "the process that watches over a program was killed from inside or for lack of memory: "
                "how the program ended is not known."
            )

    @property
    @override
    def exit(self) -> Exit:
        assert self._exit is not None
        return self._exit

    # -- ending --------------------------------------------------------------------------------

    @override
    async def has_ended(self) -> bool:
        return self._exit is not None or self._gone.is_set()

    @override
    async def kill(self, grace_s: float, *, discard_output: bool = False) -> None:
        if discard_output:
            self._discard()
        self._close_input()
        await self._known.wait()
        deadline = self._loop.time() + grace_s
        if not self._gone.is_set() and grace_s > 0:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped process takes no other signal
        number, wait_s = signal.SIGKILL, grace_s
        while not self._gone.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gone.wait(), wait_s)
            if not self._gone.is_set() and self._loop.time() >= deadline:
                self._signal(signal.SIGSTOP)  # so that none starts another while the others die
                self._signal(number)
                wait_s = _KILL_ROUND_S

    def _signal(self, number: int) -> None:
        pids = supervisor.descendants(self._keeper)
        supervisor.send_signal(pids, number)
        if not os.path.exists("/proc/self") and self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, number)

    @override
    def detach(self) -> None:
        self._close_input()
        self._discard()

    def _discard(self) -> None:
        """Keep reading for those that hold the pipes, who would die of writing to a closed one."""
        if self._detached:
            return
        self._detached = True
        self._notify()
        for fd in self._readers:
            self._loop.add_reader(fd, self._throw_away, fd)
        self._finish_watch()

    def _throw_away(self, fd: int) -> None:
        if fd not in self._readers:
            return
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            del self._readers[fd]
            self._loop.remove_reader(fd)
            os.close(fd)
            self._finish_watch()

    def _finish_watch(self) -> None:
        if not self._readers and self._gone.is_set():
            self._ended(self)

    def abandon(self) -> None:
        """Close all pipes; the supervisor has ended."""
        self._close_input()
        for fd in list(self._readers):
            self._loop.remove_reader(fd)
            os.close(fd)
        self._readers.clear()
        if not self._gone.is_set():
            self._loop.remove_reader(self._report)
            os.close(self._report)
            self._gone.set()
            self._known.set()
        self._notify()


def _exit_of(status: int, duration_ns: int) -> Exit:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return Exit(None, -code, duration_ns / 1e9)
    return Exit(code, None, duration_ns / 1e9)


def _waiting(fd: int) -> int:
    """Tell how many bytes are in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]
