"""`LocalWorkspace`: this machine as a workspace."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import marshal
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import override

from apothic.errors import SandboxClosedError, SandboxError, SandboxLostError, SandboxStartError
from apothic.local_session import supervisor
from apothic.local_session.files import LocalReader, LocalWriter, finished
from apothic.local_session.process import LocalProcess, Pipes
from apothic.workspace import (
    Command,
    FileReader,
    FileStat,
    FileWriter,
    Process,
    StartFailure,
    StartStage,
    Workspace,
)

__all__ = ["LocalWorkspace"]

_CLOSE_WAIT_S = 30.0


class LocalWorkspace(Workspace):
    """Files and programs of this machine; a supervisor process starts and ends the programs."""

    def __init__(self) -> None:
        """Start the supervisor, and make a directory that ends with it.

        Raises:
            SandboxStartError: this machine refuses a process or a directory.
        """
        if not sys.executable:
            raise SandboxStartError(
                "a local session needs a Python interpreter to start programs with, and sys.executable "
                "is empty here. Set it to one."
            )
        ours, theirs = socket.socketpair()
        try:
            self.directory: str = tempfile.mkdtemp(prefix="apothic-local-")
            with theirs:
                self._supervisor = subprocess.Popen(
                    [
                        sys.executable, "-I", "-S", str(Path(supervisor.__file__)),
                        str(theirs.fileno()), self.directory,
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    start_new_session=True,  # Ctrl-C is for this process
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise SandboxStartError(f"a local session could not be opened: {error}.") from error
        ours.setblocking(False)
        self._control = ours
        self._sending = asyncio.Lock()
        self._processes: set[LocalProcess] = set()
        self._environ = dict(os.environb)
        self._state = b""
        self._closed = False

    @override
    async def environ(self) -> Mapping[bytes, bytes]:
        return self._environ

    @override
    async def spawn(self, command: Command) -> Process:
        self._check_open()
        try:
            pipes = Pipes(stdin=command.stdin is not None)
        except OSError as error:
            raise StartFailure(StartStage.OTHER, error.errno or errno.EIO) from None
        process = LocalProcess(pipes, command.stdin, lambda: self._closed, self._processes.discard)
        self._processes.add(process)
        payload = marshal.dumps((list(command.argv), command.cwd, dict(command.env), command.user))
        try:
            # Shielded: half a request would be the end of the session.
            await asyncio.shield(self._send(payload, pipes))
        except asyncio.CancelledError:
            await process.kill(0, discard_output=True)
            process.detach()
            raise
        except OSError as error:
            process.abandon()
            self._check_open()
            raise SandboxLostError(
                f"the supervisor of a local session is gone ({error}): it was killed. Open another."
            ) from None
        return process

    async def _send(self, payload: bytes, pipes: Pipes) -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            try:
                await self._send_head(supervisor.LENGTH.pack(len(payload)), pipes.theirs)
            finally:
                pipes.close_theirs()
            await loop.sock_sendall(self._control, payload)

    async def _send_head(self, head: bytes, fds: list[int]) -> None:
        while True:
            try:
                sent = socket.send_fds(self._control, [head], fds)
            except BlockingIOError:  # other requests fill the socket
                await _writable(self._control)
                continue
            if sent < len(head):
                await asyncio.get_running_loop().sock_sendall(self._control, head[sent:])
            return

    @override
    async def stat(self, path: bytes) -> FileStat:
        self._check_open()
        found = await finished(lambda: os.stat(path))
        return FileStat(found.st_mode, found.st_size)

    @override
    async def listdir(self, path: bytes) -> list[bytes]:
        self._check_open()
        return await finished(lambda: os.listdir(path))

    @override
    async def mkdir(self, path: bytes, *, parents: bool, exist_ok: bool) -> None:
        self._check_open()
        await finished(lambda: _make_directory(path, parents, exist_ok))

    @override
    async def open_reader(self, path: bytes) -> FileReader:
        self._check_open()
        return await finished(lambda: LocalReader(path), LocalReader.drop)

    @override
    async def open_writer(
        self, path: bytes, *, append: bool, make_parents: bool, size: int | None
    ) -> FileWriter:
        self._check_open()
        return await finished(
            lambda: LocalWriter(path, append=append, make_parents=make_parents, size=size),
            LocalWriter.drop,
        )

    @override
    async def load_state(self) -> bytes:
        return self._state

    @override
    async def save_state(self, state: bytes) -> None:
        self._state = state

    @override
    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.let_go()
        try:
            await finished(lambda: self._supervisor.wait(_CLOSE_WAIT_S))
        except subprocess.TimeoutExpired:
            raise SandboxError(
                f"programs of a local session are not dead {_CLOSE_WAIT_S:g} s after they were killed: "
                f"process {self._supervisor.pid} goes on trying."
            ) from None
        finally:
            for process in list(self._processes):
                process.abandon()
            self._processes.clear()
            self._control.close()

    def let_go(self) -> None:
        """Have the supervisor end everything, without waiting; from any thread."""
        with contextlib.suppress(OSError):
            # Also where another process has a copy of the socket, made by a fork.
            self._control.shutdown(socket.SHUT_RDWR)

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxClosedError("the local session is closed. Open another.")


def _make_directory(path: bytes, parents: bool, exist_ok: bool) -> None:
    if parents:
        with contextlib.suppress(FileExistsError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not (exist_ok and os.path.isdir(path)):
            raise


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock)
