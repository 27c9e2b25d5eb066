"""`SandboxSession`: one workspace, with files and programs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apothic.backend import ExecOutcome, SandboxRef
from apothic.errors import (
    InvalidOptionError,
    SerializationError,
)
from apothic.exec_request import exec_request, exec_result
from apothic.exec_stream import SandboxExecStream
from apothic.sandbox_values import (
    SandboxExecResult,
    SandboxHandle,
    SandboxSessionInfo,
)
from apothic.session_arguments import env_bytes, env_text, find_codec, mode_for, path_bytes, to_text
from apothic.session_calls import PART_BYTES, SessionCalls
from apothic.steps import Steps, awaited, verb
from apothic.twins import Twin, twin
from apothic.values import CloseReport

if TYPE_CHECKING:
    from apothic.sandbox import Sandbox

__all__ = ["MAX_OUTPUT_BYTES", "SandboxExecStream", "SandboxSession", "SandboxSessionAio"]

MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""How much of each of an exec's streams is kept unless ``max_output_bytes`` says otherwise."""

METHOD_NAMES = (
    "inspect", "pwd", "get_env", "chdir", "update_env", "set_env", "unset_env", "exists", "listdir",
    "mkdir", "read_text", "write_text", "read_bytes", "write_bytes", "upload_file", "download_file",
    "exec", "exec_stream", "close",
)  # fmt: skip
"""The verbs of every session."""


class SandboxSession:
    """A workspace: a container on the cluster, or with `Sandbox.local` this machine.

    Relative paths are against the session's working directory, which every exec starts in; both it and
    the session's variables are the same for all clients of a session. Names of files that are no UTF-8
    come and go with surrogate escapes, as Python has them everywhere. With ``with`` the session is
    closed at the end. It can be passed to other remote calls and pickles to its handle.

    Every verb raises `SandboxClosedError` once the session is closed, `SandboxLostError` when its
    container, engine or node died, and `PendingTasksExceededError` at more than ``max_pending_tasks``
    verbs of this process at once. Verbs of files raise a `SandboxFileError` that is also the builtin
    error of its kind.
    """

    def __init__(self, sandbox: Sandbox, ref: SandboxRef, *, local: bool = False) -> None:
        """Wrap a reference; made by the verbs of `Sandbox`."""
        self._sandbox = sandbox
        self._ref = ref
        self._local = local
        self._calls = SessionCalls(
            ref,
            label=f"{sandbox.label} {ref.handle.sandbox_id!r}",
            max_pending=sandbox.options.max_pending_tasks,
        )

    # -- properties ----------------------------------------------------------------------------

    @property
    def sandbox(self) -> Sandbox:
        """The definition."""
        return self._sandbox

    @property
    def local(self) -> bool:
        """Whether it works on this machine, with no isolation."""
        return self._local

    @property
    def closed(self) -> bool:
        """Whether it was closed through this object."""
        return self._calls.closed

    @property
    def id(self) -> str:
        """Its id within the definition."""
        return self._ref.handle.sandbox_id

    @property
    def handle(self) -> SandboxHandle:
        """Where it is, for `Sandbox.attach` in any job of the cluster; a local one is no use there."""
        return self._ref.handle

    @property
    def handle_json(self) -> str:
        """The handle as JSON."""
        return self.handle.model_dump_json()

    @property
    def method_names(self) -> tuple[str, ...]:
        """Names of the verbs."""
        return METHOD_NAMES

    @property
    def actor(self) -> Any:
        """The engine's own handle: on Ray the actor handle."""
        return self._ref.native

    @property
    def aio(self) -> SandboxSessionAio:
        """The async twins of the verbs."""
        return SandboxSessionAio(self)

    # -- looking -------------------------------------------------------------------------------

    def has_method(self, name: str) -> bool:
        """Tell whether there is a verb of this name."""
        return name in METHOD_NAMES

    def inspect(self) -> SandboxSessionInfo:
        """Ask how it is; answered also while verbs are running."""
        self._calls.check_open()
        return self._ref.inspect()

    # -- directory and variables -----------------------------------------------------------------

    @verb
    def pwd(self) -> Steps[str]:
        """Give the working directory."""
        return to_text((yield from self._calls.ask("pwd")))

    @verb
    def get_env(self) -> Steps[dict[str, str]]:
        """Give the environment that an exec sees."""
        return env_text((yield from self._calls.ask("get_env")))

    @verb
    def chdir(self, path: str) -> Steps[str]:
        """Change the working directory; ``..`` is taken as a shell's ``cd`` does.

        Returns:
            The new one, absolute.

        Raises:
            SandboxFileNotFoundError: there is nothing at the path.
            SandboxNotADirectoryError: it is no directory.
            SandboxError: with the session's variables it is more than is kept, see `update_env`.
        """
        return to_text((yield from self._calls.ask("chdir", path_bytes(path))))

    @verb
    def update_env(
        self, values: dict[str, Any] | None = None, /, **kwargs: Any
    ) -> Steps[dict[str, str]]:
        """Set variables for later execs; values are converted with ``str``. All take effect, or none.

        A session on the cluster keeps up to 1 MiB of them, written as JSON with its working directory;
        those of image and secrets do not count. Write larger values to a file.

        Args:
            values: variables; None as a value removes one, also one that the image sets.
            **kwargs: likewise; they win.

        Returns:
            The environment that an exec now sees.

        Raises:
            InvalidOptionError: a name is no variable's, or a value holds a NUL.
            SandboxError: the session's variables would be more than is kept.
        """
        changes = {**env_bytes(values), **env_bytes(kwargs)}
        return env_text((yield from self._calls.ask("update_env", changes)))

    def set_env(self, **kwargs: Any) -> dict[str, str]:
        """Do what `update_env` does with keywords, with its limit and its errors."""
        return self.update_env(kwargs)

    @verb
    def unset_env(self, *names: str) -> Steps[dict[str, str]]:
        """Remove variables; one that is not set is no error.

        Returns:
            The environment that an exec now sees.

        Raises:
            InvalidOptionError: a name is no variable's.
            SandboxError: the session's variables would be more than is kept, see `update_env`: a
                name that was removed is kept as well.
        """
        changes = env_bytes(dict.fromkeys(names))
        return env_text((yield from self._calls.ask("update_env", changes)))

    # -- files -----------------------------------------------------------------------------------

    @verb
    def exists(self, path: str = ".") -> Steps[bool]:
        """Tell whether something is at a path; a link that leads nowhere is nothing."""
        found: bool = yield from self._calls.ask("exists", path_bytes(path))
        return found

    @verb
    def listdir(self, path: str = ".") -> Steps[list[str]]:
        """Give the names in a directory, sorted.

        Raises:
            SandboxFileNotFoundError: there is nothing at the path.
            SandboxNotADirectoryError: it is no directory.
        """
        return [to_text(name) for name in (yield from self._calls.ask("listdir", path_bytes(path)))]

    @verb
    def mkdir(self, path: str, *, parents: bool = True, exist_ok: bool = True) -> Steps[str]:
        """Make a directory.

        Args:
            path: where.
            parents: make missing ones on the way.
            exist_ok: a directory that is there already will do.

        Returns:
            Its absolute path.

        Raises:
            SandboxFileExistsError: something is there that will not do.
            SandboxFileNotFoundError: a directory on the way is missing, without ``parents``.
        """
        return to_text(
            (yield from self._calls.ask("mkdir", path_bytes(path), bool(parents), bool(exist_ok)))
        )

    @verb
    def read_bytes(self, path: str) -> Steps[bytes]:
        """Give the contents of a file.

        Raises:
            SandboxFileNotFoundError: there is nothing at the path.
            SandboxIsADirectoryError: it is a directory.
        """
        return (yield from self._calls.read(path_bytes(path)))

    @verb
    def read_text(self, path: str, *, encoding: str = "utf-8") -> Steps[str]:
        """Give the contents of a file as text; line ends stay as they are.

        Raises:
            SandboxFileNotFoundError: there is nothing at the path.
            SandboxIsADirectoryError: it is a directory.
            UnicodeDecodeError: the contents are not in this encoding.
            InvalidOptionError: there is no such encoding.
        """
        codec = find_codec(encoding)
        return codec.decode((yield from self._calls.read(path_bytes(path))))[0]

    @verb
    def write_bytes(
        self,
        path: str,
        content: bytes | bytearray | memoryview,
        *,
        append: bool = False,
        make_parents: bool = False,
    ) -> Steps[str]:
        """Write a file. One that exists keeps mode, owner and links.

        When it is cut off midway, a new file is removed; over what was there is then the beginning of
        the new content.

        Args:
            path: where.
            content: what.
            append: write after what is there.
            make_parents: make missing directories on the way.

        Returns:
            Its absolute path.

        Raises:
            SandboxFileNotFoundError: its directory is missing.
            SandboxIsADirectoryError: it is a directory.
            SandboxNoSpaceError: the disk is full. What was there is whole where the file system can
                reserve space: ext4, XFS, Btrfs, tmpfs, overlays of them.
        """
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise InvalidOptionError(
                f"content of type {type(content).__name__} is not valid: write_bytes takes bytes, "
                f"bytearray or memoryview. Use write_text for text."
            )
        return (yield from self._calls.write(path_bytes(path), content, append, make_parents))

    @verb
    def write_text(
        self,
        path: str,
        content: str,
        *,
        encoding: str = "utf-8",
        append: bool = False,
        make_parents: bool = False,
    ) -> Steps[str]:
        """Write a file as `write_bytes` does; line ends stay as they are.

        Raises:
            UnicodeEncodeError: the text cannot be in this encoding; nothing was written.
            InvalidOptionError: there is no such encoding, or content is no text.
        """
        if not isinstance(content, str):
            raise InvalidOptionError(
                f"content of type {type(content).__name__} is not valid: write_text takes a str. "
                f"Use write_bytes for bytes."
            )
        data = find_codec(encoding).encode(content)[0]
        return (yield from self._calls.write(path_bytes(path), data, append, make_parents))

    def upload_file(
        self, local_path: str | Path, remote_path: str, *, make_parents: bool = False
    ) -> str:
        """Copy a file from this machine into the session, in constant memory.

        When it is cut off midway, a new file is removed; over what was there is then the beginning of
        the new content.

        Args:
            local_path: a file here.
            remote_path: a file there; one that exists keeps mode, owner and links.
            make_parents: make missing directories there.

        Returns:
            The absolute path there.

        Raises:
            OSError: the local file cannot be read; the builtin error of its kind.
            SandboxFileError: the remote one cannot be written; a full disk is as for `write_bytes`.
        """
        path = path_bytes(remote_path)
        with open(local_path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            if size <= PART_BYTES:
                first = source.read(PART_BYTES + 1)
                if len(first) <= PART_BYTES:  # else it has grown meanwhile
                    return self._write_whole(path, first, make_parents)
                source.seek(0)

            def parts() -> Iterator[bytes]:
                while part := source.read(PART_BYTES):
                    yield part

            return self._upload(path, parts(), size, make_parents)

    @verb
    def _write_whole(self, path: bytes, data: bytes, make_parents: bool) -> Steps[str]:
        return to_text((yield from self._calls.ask("write", path, data, False, bool(make_parents))))

    @verb
    def _upload(
        self, path: bytes, parts: Iterator[bytes], size: int, make_parents: bool
    ) -> Steps[str]:
        return (yield from self._calls.send_parts(path, parts, size, False, make_parents))

    def download_file(
        self, remote_path: str, local_path: str | Path, *, make_parents: bool = False
    ) -> Path:
        """Copy a file of the session to this machine, in constant memory.

        The local file appears whole or not at all: it is written beside its place and put there at
        the end. One that existed keeps its mode.

        Args:
            remote_path: a file there.
            local_path: a file here; a link is followed.
            make_parents: make missing directories here.

        Returns:
            The local path, as given.

        Raises:
            SandboxFileError: the remote file cannot be read.
            OSError: the local one cannot be written; the builtin error of its kind.
        """
        path = path_bytes(remote_path)
        given = Path(local_path)
        target = Path(os.path.realpath(given))
        if target.is_dir():
            raise IsADirectoryError(21, "Is a directory; name the file in it", str(given))
        if make_parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f".{target.name[:64]}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as sink:
                self._download(path, sink.write)
                os.chmod(beside, mode_for(target))
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            raise
        return given

    @verb
    def _download(self, path: bytes, write: Callable[[bytes], object]) -> Steps[None]:
        data = yield from self._calls.ask("read", path, PART_BYTES)
        if data is not None:
            write(data)
            return
        yield from self._calls.stream_to(path, write)

    # -- execs -----------------------------------------------------------------------------------

    @verb
    def exec(
        self,
        command: str | list[str] | tuple[str, ...],
        *,
        shell: bool = False,
        cwd: str | None = None,
        env: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        stdin: bytes | str | None = None,
        user: str | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> Steps[SandboxExecResult]:
        """Run a program to its end and give its result. Ending with other than 0 is a result too.

        What the program leaves behind in the background goes on running.

        Args:
            command: an argument vector; or a string, which is split into one as a shell splits
                words, with nothing expanded.
            shell: hand the string to ``/bin/sh -c`` instead.
            cwd: where it starts; relative to the session's working directory.
            env: variables for it alone, over the session's; None as a value removes one.
            timeout_s: seconds until it is killed if it runs still; by default the sandbox's
                ``timeout_s``.
            stdin: its whole input, text as UTF-8; without it, ``/dev/null``.
            user: whom it runs as: ``name``, ``uid``, ``name:group`` or ``uid:gid``.
            max_output_bytes: how much of each stream is kept; the rest is dropped, with
                ``truncated`` set in the result.

        Raises:
            ExecTimeoutError: it ran longer than ``timeout_s``. It and all that it had started, also
                in the background, is dead; its output so far is in ``.result``.
            SandboxFileNotFoundError: ``cwd`` is missing.
            ExecStartError: it could not be started: too many arguments, no such user, no processes
                left. (A missing program gives 127, one that is not executable 126.)
            InvalidOptionError: an argument breaks its rule.
        """
        request, data = exec_request(
            command, shell, cwd, env, timeout_s, stdin, user, max_output_bytes,
            default_timeout_s=self._sandbox.options.timeout_s,
        )  # fmt: skip
        outcome: ExecOutcome = yield from self._calls.ask("exec", request, data)
        return exec_result(request, outcome, outcome.stdout, outcome.stderr, self._memory_mb)

    def exec_stream(
        self,
        command: str | list[str] | tuple[str, ...],
        *,
        shell: bool = False,
        cwd: str | None = None,
        env: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        stdin: bytes | str | None = None,
        user: str | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> SandboxExecStream:
        """Start a program and give its output as it is written, then an ``exit`` event.

        It starts at once. It is held up while its output is not taken. Leaving a ``with`` block,
        `SandboxExecStream.close`, or dropping the iterator kills the program and all it started.

        Args:
            command: as for `exec`, and so are the others.
            shell: as for `exec`.
            cwd: as for `exec`.
            env: as for `exec`.
            timeout_s: as for `exec`; the iterator raises `ExecTimeoutError`. It is for the program,
                not for who takes its output: what was held up so long has run too long, what had
                ended in time has not, however late the rest of its output is taken.
            stdin: as for `exec`.
            user: as for `exec`.
            max_output_bytes: how much of each stream the result at the end holds; events come all.

        Raises:
            InvalidOptionError: an argument breaks its rule.
        """
        request, data = exec_request(
            command, shell, cwd, env, timeout_s, stdin, user, max_output_bytes,
            default_timeout_s=self._sandbox.options.timeout_s,
        )  # fmt: skip
        self._calls.enter()
        try:
            return SandboxExecStream(self._ref, self._calls, request, data, self._memory_mb)
        except BaseException:
            self._calls.leave()
            raise

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> CloseReport:
        """End its programs and remove what it worked in; idempotent.

        Verbs are refused from here on. One that failed, or was interrupted, can be called again.
        """
        if not self._calls.close():
            return CloseReport(closed=False, note="it was closed before")
        try:
            return self._ref.close()
        except BaseException:
            self._calls.close_failed()
            raise

    @property
    def _memory_mb(self) -> int | None:
        """The limit that a result names, of a session that has one."""
        return None if self._local else self._sandbox.options.memory_mb

    def __enter__(self) -> SandboxSession:
        """Give the session."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    async def __aenter__(self) -> SandboxSession:
        """Give the session."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        await self.aio.close()

    def __reduce__(self) -> tuple[Callable[[str], SandboxSession], tuple[str]]:
        """Travel as the handle; the other side attaches."""
        if self._local:
            raise SerializationError(
                f"{self!r} cannot travel: it is part of this process. Use create or named for a "
                f"session that others can reach."
            )
        return _from_handle, (self.handle_json,)

    def __repr__(self) -> str:
        """Name the definition and the session, and say where it works."""
        where = ", on this machine without isolation" if self._local else ""
        state = "closed" if self.closed else "open"
        return f"<apothic.SandboxSession {self._sandbox.label} {self.id!r} ({state}{where})>"


class SandboxSessionAio(Twin[SandboxSession]):
    """Async twins of `SandboxSession`: calls are awaited natively, on no thread."""

    __slots__ = ()

    inspect: Final = twin(SandboxSession.inspect)
    pwd: Final = awaited(SandboxSession.pwd)
    get_env: Final = awaited(SandboxSession.get_env)
    chdir: Final = awaited(SandboxSession.chdir)
    update_env: Final = awaited(SandboxSession.update_env)
    unset_env: Final = awaited(SandboxSession.unset_env)
    exists: Final = awaited(SandboxSession.exists)
    listdir: Final = awaited(SandboxSession.listdir)
    mkdir: Final = awaited(SandboxSession.mkdir)
    read_text: Final = awaited(SandboxSession.read_text)
    write_text: Final = awaited(SandboxSession.write_text)
    read_bytes: Final = awaited(SandboxSession.read_bytes)
    write_bytes: Final = awaited(SandboxSession.write_bytes)
    exec: Final = awaited(SandboxSession.exec)
    # These also work on files of this machine, which would hold up the loop.
    upload_file: Final = twin(SandboxSession.upload_file)
    download_file: Final = twin(SandboxSession.download_file)
    close: Final = twin(SandboxSession.close)

    async def set_env(self, **kwargs: Any) -> dict[str, str]:
        """Do what `update_env` does with keywords."""
        return await self.update_env(kwargs)

    def exec_stream(
        self,
        command: str | list[str] | tuple[str, ...],
        *,
        shell: bool = False,
        cwd: str | None = None,
        env: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        stdin: bytes | str | None = None,
        user: str | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> SandboxExecStream:
        """Do what `SandboxSession.exec_stream` does; iterate with ``async for``."""
        return self._target.exec_stream(
            command,
            shell=shell,
            cwd=cwd,
            env=env,
            timeout_s=timeout_s,
            stdin=stdin,
            user=user,
            max_output_bytes=max_output_bytes,
        )


def _from_handle(handle_json: str) -> SandboxSession:
    from apothic.sandbox import session_from_handle

    return session_from_handle(handle_json)
