"""`SessionCore`: what every verb of a sandbox session does, on any `apothic.workspace.Workspace`.

A plain object on one event loop, with no engine in it. An engine's actor makes one and forwards to it
the verbs that `VERBS` and `STREAMS` name; a local session has one in this process. Their arguments and
results are `apothic.backend`'s: text is bytes here (names of files need not be text), one call of the
seam is one call here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import stat
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import NamedTuple

from apothic.backend import ExecOutcome, ExecRequest
from apothic.errors import (
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
)
from apothic.exec_run import ExecRun, KeptOutput
from apothic.file_errors import file_error, typed
from apothic.uploads import UPLOAD_IDLE_S, Upload
from apothic.workspace import (
    Command,
    FileWriter,
    OutputKind,
    Workspace,
)

__all__ = ["STREAMS", "VERBS", "SessionCore", "SessionStatus"]

VERBS = (
    "pwd", "get_env", "chdir", "update_env", "exists", "listdir", "mkdir", "read", "write",
    "upload_begin", "upload_part", "upload_end", "upload_abort", "exec",
)  # fmt: skip
"""Verbs that give one value."""

STREAMS = ("exec_stream", "read_stream")
"""Verbs that give several, as async iterators; closing one early ends what it does."""

READ_BYTES = 4 * 1024 * 1024
"""How much `read_stream` gives at once."""

CLOSE_WAIT_S = 10.0
"""Seconds that `SessionCore.close` waits for what is being written; a disk that does not answer must not
keep the programs alive."""


class SessionStatus(NamedTuple):
    """How a session is, for `SandboxRef.inspect`."""

    cwd: bytes
    running_calls: int
    finished_calls: int
    started_unix_s: float


class _Calls:
    """Counts the verbs that run, as a context of each; of a generator, it would show in their time."""

    __slots__ = ("finished", "running")

    def __init__(self) -> None:
        self.running = self.finished = 0

    def __enter__(self) -> None:
        self.running += 1

    def __exit__(self, *_: object) -> None:
        self.running -= 1
        self.finished += 1


class SessionCore:
    """One session: its working directory, its variables, its limits, and its verbs."""

    def __init__(
        self,
        workspace: Workspace,
        *,
        label: str,
        secrets: Mapping[bytes, bytes] | None = None,
        concurrent_requests: int = 1,
    ) -> None:
        """Wrap a workspace; `start` must come before any verb.

        Args:
            workspace: where it works.
            label: names the session in messages.
            secrets: variables of every exec, below the session's own.
            concurrent_requests: above 1, so many execs run at once and the others wait their turn.
                1 says nothing: as it is the default, it cannot mean that a program which another
                exec waits for would never start.
        """
        self._workspace = workspace
        self._label = label
        self._secrets = dict(secrets or {})
        limited = concurrent_requests > 1
        self._slots = asyncio.Semaphore(concurrent_requests) if limited else None
        self._base: dict[bytes, bytes] = {}
        self._own: dict[bytes, bytes | None] = {}
        self._env: dict[bytes, bytes] = {}  # both; not changed, but replaced
        self._cwd = b"/"
        self._saving = asyncio.Lock()
        self._uploads: dict[str, Upload] = {}
        self._writers: set[FileWriter] = set()  # those of no upload, or of one that is ending
        self._calls = _Calls()
        self._started_unix_s = time.time()
        self._closed = False

    # -- life ----------------------------------------------------------------------------------

    async def start(self, cwd: bytes, env: Mapping[bytes, bytes | None]) -> None:
        """Make ``cwd`` if it is missing and note both; a workspace that has a state keeps its own.

        Raises:
            SandboxFileError: ``cwd`` cannot be a directory.
        """
        self._base = {**await self._workspace.environ(), **self._secrets}
        state = await self._workspace.load_state()
        if state:
            self._adopt(*_unpack_state(state))
            return
        first = _join(b"/", cwd)
        if first != b"/":
            with typed(first):
                await self._workspace.mkdir(first, parents=True, exist_ok=True)
        async with self._saving:
            await self._save(first, dict(env))

    async def close(self) -> None:
        """End every program and the workspace; idempotent. Verbs that run fail as those that come.

        A new file that is not written to its end is removed first.
        """
        self._closed = True
        try:
            await self._abort_writes()
        finally:
            await self._workspace.close()

    async def _abort_writes(self) -> None:
        uploads, self._uploads = self._uploads, {}
        aborts = [upload.abort(self._closed_error()) for upload in uploads.values()]
        aborts += [writer.abort() for writer in self._writers]
        if aborts:
            together = asyncio.gather(*aborts, return_exceptions=True)
            await asyncio.wait({together}, timeout=CLOSE_WAIT_S)

    def status(self) -> SessionStatus:
        """Tell how it is."""
        return SessionStatus(
            self._cwd, self._calls.running, self._calls.finished, self._started_unix_s
        )

    # -- directory and variables -----------------------------------------------------------------

    async def pwd(self) -> bytes:
        """Give the working directory."""
        with self._call():
            return self._cwd

    async def get_env(self) -> dict[bytes, bytes]:
        """Give the environment that an exec sees."""
        with self._call():
            return dict(self._env)

    async def chdir(self, path: bytes) -> bytes:
        """Change the working directory; ``..`` is the directory that the path names, as in a shell."""
        with self._call():
            target = os.path.normpath(_join(self._cwd, path))
            # Two leading slashes are one, whatever POSIX allows them to mean.
            target = b"/" + target.lstrip(b"/")
            with typed(target):
                found = await self._workspace.stat(target)
            if not stat.S_ISDIR(found.mode):
                raise file_error(errno.ENOTDIR, target)
            async with self._saving:
                await self._save(target, self._own)
            return target

    async def update_env(self, values: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
        """Set variables, None removes one; give the environment that an exec now sees."""
        with self._call():
            async with self._saving:  # what another changes meanwhile must not be lost
                await self._save(self._cwd, {**self._own, **values})
            return dict(self._env)

    # -- files -----------------------------------------------------------------------------------

    async def exists(self, path: bytes) -> bool:
        """Tell whether something is at a path, at the end of its links."""
        with self._call():
            target = _join(self._cwd, path)
            try:
                with typed(target):
                    await self._workspace.stat(target)
            except SandboxFileError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    return False
                raise
            return True

    async def listdir(self, path: bytes) -> list[bytes]:
        """Give the names in a directory, sorted."""
        with self._call():
            target = _join(self._cwd, path)
            with typed(target):
                return sorted(await self._workspace.listdir(target))

    async def mkdir(self, path: bytes, parents: bool, exist_ok: bool) -> bytes:
        """Make a directory; give its absolute path."""
        with self._call():
            target = _join(self._cwd, path)
            with typed(target):
                await self._workspace.mkdir(target, parents=parents, exist_ok=exist_ok)
            return target

    async def read(self, path: bytes, limit: int) -> bytes | None:
        """Give a whole file of up to ``limit`` bytes; None when it is longer."""
        with self._call():
            target = _join(self._cwd, path)
            with typed(target):
                reader = await self._workspace.open_reader(target)
                try:
                    if await reader.size() > limit:
                        return None
                    pieces, size = [], 0
                    while size <= limit and (piece := await reader.read(limit + 1 - size)):
                        pieces.append(piece)
                        size += len(piece)
                finally:
                    await reader.close()
            if size > limit:
                return None
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_stream(self, path: bytes) -> AsyncIterator[bytes]:
        """Give a file in pieces; the same file throughout, whatever happens to its name."""
        with self._call():
            target = _join(self._cwd, path)
            with typed(target):
                reader = await self._workspace.open_reader(target)
            try:
                while True:
                    with typed(target):
                        piece = await reader.read(READ_BYTES)
                    if not piece:
                        break
                    yield piece
            finally:
                await reader.close()

    async def write(
        self, path: bytes, data: bytes | memoryview, append: bool, make_parents: bool
    ) -> bytes:
        """Write a whole file; give its absolute path."""
        with self._call():
            target = _join(self._cwd, path)
            with typed(target, writing=True):
                writer = await self._open_writer(target, append, make_parents, len(data))
                with self._aborted_by_close(writer):
                    try:
                        await writer.write(data)
                        await writer.finish()
                    finally:
                        await writer.abort()
            return target

    async def upload_begin(
        self, path: bytes, size: int | None, append: bool, make_parents: bool
    ) -> str:
        """Begin to write a file in parts; give the upload's id."""
        with self._call():
            target = _join(self._cwd, path)
            with typed(target, writing=True):
                writer = await self._open_writer(target, append, make_parents, size)
            upload_id = uuid.uuid4().hex
            self._uploads[upload_id] = Upload(target, writer, lambda: self._give_up(upload_id))
            return upload_id

    async def upload_part(self, upload_id: str, offset: int, data: bytes | memoryview) -> None:
        """Write the next part; one that overtook another waits for it."""
        with self._call():
            await self._upload(upload_id).write(offset, data)

    async def upload_end(self, upload_id: str) -> bytes:
        """End an upload; give the file's absolute path."""
        with self._call():
            upload = self._upload(upload_id)
            del self._uploads[upload_id]
            upload.timer.cancel()
            with typed(upload.path, writing=True), self._aborted_by_close(upload.writer):
                try:
                    await upload.writer.finish()
                finally:
                    await upload.writer.abort()
            return upload.path

    async def upload_abort(self, upload_id: str) -> None:
        """Give an upload up; a new file is removed. Idempotent."""
        upload = self._uploads.pop(upload_id, None)
        if upload is not None:
            await upload.abort()

    @contextlib.contextmanager
    def _aborted_by_close(self, writer: FileWriter) -> Iterator[None]:
        """Have `close` abort a writer that is about to finish, and tell so whoever waits for that."""
        self._writers.add(writer)
        try:
            yield
        except OSError:
            if self._closed:
                raise self._closed_error() from None
            raise
        finally:
            self._writers.discard(writer)

    async def _open_writer(
        self, path: bytes, append: bool, make_parents: bool, size: int | None
    ) -> FileWriter:
        writer = await self._workspace.open_writer(
            path, append=append, make_parents=make_parents, size=size
        )
        if self._closed:  # meanwhile, so that nobody else will abort it
            await writer.abort()
            raise self._closed_error()
        return writer

    # -- execs -----------------------------------------------------------------------------------

    async def exec(self, request: ExecRequest, stdin: bytes | memoryview | None) -> ExecOutcome:
        """Run a program to its end."""
        out, err = KeptOutput(request.max_output_bytes), KeptOutput(request.max_output_bytes)
        with self._call():
            async with self._run(request, stdin) as run:
                while (piece := await run.next_output()) is not None:
                    (out if piece[0] == "stdout" else err).add(piece[1])
                ended = run.outcome
                return ExecOutcome(
                    returncode=ended.returncode,
                    signal=ended.signal,
                    duration_s=ended.duration_s,
                    stdout=out.join(),
                    stderr=err.join(),
                    stdout_truncated=out.truncated,
                    stderr_truncated=err.truncated,
                    timed_out=ended.timed_out,
                    oom_killed=ended.oom_killed,
                )

    async def exec_stream(
        self, request: ExecRequest, stdin: bytes | memoryview | None
    ) -> AsyncIterator[tuple[OutputKind, bytes] | ExecOutcome]:
        """Run a program and give its output as it comes, then how it ended.

        Output is limited only by how fast it is taken. Closing the iterator kills the program.
        """
        with self._call():
            async with self._run(request, stdin) as run:
                while (piece := await run.next_output()) is not None:
                    yield piece
                yield run.outcome

    def _run(self, request: ExecRequest, stdin: bytes | memoryview | None) -> ExecRun:
        return ExecRun(
            self._workspace,
            lambda: self._command(request, stdin),
            timeout_s=request.timeout_s,
            slots=self._slots,
            label=self._label,
        )

    def _command(self, request: ExecRequest, stdin: bytes | memoryview | None) -> Command:
        env = self._env
        if request.user and b"HOME" in env and self._own.get(b"HOME") is None:
            # The base's is another user's; the workspace sets the right one.
            env = {name: value for name, value in env.items() if name != b"HOME"}
        return Command(
            argv=request.argv,
            cwd=self._cwd if request.cwd is None else _join(self._cwd, request.cwd),
            env=_overlaid(env, request.env) if request.env else env,
            user=request.user,
            stdin=stdin,
        )

    # -- inside ----------------------------------------------------------------------------------

    def _call(self) -> _Calls:
        if self._closed:
            raise self._closed_error()
        return self._calls

    def _closed_error(self) -> SandboxClosedError:
        return SandboxClosedError(f"{self._label} is closed. Open another session.")

    async def _save(self, cwd: bytes, own: dict[bytes, bytes | None]) -> None:
        """Have directory and variables take effect, once they are kept; holding `_saving`."""
        await self._workspace.save_state(_pack_state(cwd, own))
        self._adopt(cwd, own)

    def _adopt(self, cwd: bytes, own: dict[bytes, bytes | None]) -> None:
        self._cwd, self._own = cwd, own
        self._env = _overlaid(self._base, own)

    def _upload(self, upload_id: str) -> Upload:
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise SandboxError(
                f"{self._label}: the upload is no longer open: it was given up after "
                f"{UPLOAD_IDLE_S:g} s without a part, or the session was restarted. Begin again."
            )
        return upload

    def _give_up(self, upload_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self.upload_abort(upload_id))
        self._abandoning = task  # a task that nobody holds may be collected


def _join(cwd: bytes, path: bytes) -> bytes:
    """Make a path absolute. ``..`` stays, since only the kernel knows where links lead."""
    parts = [part for part in b"/".join((cwd, path)).split(b"/") if part not in (b"", b".")]
    if path.startswith(b"/"):
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    return b"/" + b"/".join(parts)


def _overlaid(
    base: Mapping[bytes, bytes], over: Mapping[bytes, bytes | None]
) -> dict[bytes, bytes]:
    result = dict(base)
    for name, value in over.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def _pack_state(cwd: bytes, own: Mapping[bytes, bytes | None]) -> bytes:
    def text(value: bytes) -> str:
        return value.decode("utf-8", "surrogateescape")

    env = {text(name): None if value is None else text(value) for name, value in own.items()}
    return json.dumps({"version": 1, "cwd": text(cwd), "env": env}).encode()


def _unpack_state(state: bytes) -> tuple[bytes, dict[bytes, bytes | None]]:
    def data(value: str) -> bytes:
        return value.encode("utf-8", "surrogateescape")

    found = json.loads(state)
    env = {
        data(name): None if value is None else data(value) for name, value in found["env"].items()
    }
    return data(found["cwd"]), env
