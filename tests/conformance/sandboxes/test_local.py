"""The suites on `Sandbox.local`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from apothic import Sandbox, SandboxSession
from apothic.errors import (
    ExecStartError,
    ExecTimeoutError,
    HandleError,
    SandboxClosedError,
    SandboxLostError,
    SandboxNoSpaceError,
    SandboxPermissionError,
    SerializationError,
)
from apothic.local_session.files import LocalReader, LocalWriter, finished
from apothic.session_calls import PART_BYTES
from tests.conformance.sandboxes.base import Marked, SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import InterruptConformance, KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance
from tests.conformance.sandboxes.volumes_of_data import DataConformance
from tests.support import as_root, eventually, mounted, process_is_gone

__all__ = ["marked"]


class Local(SandboxSuite):
    @pytest.fixture
    def engine(self, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """See that nothing is left: no directory, descriptor, thread or process."""
        temporary = tmp_path_factory.mktemp("temporary")
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        before = open_files()
        threads = set(threading.enumerate())
        yield
        eventually(lambda: not list(temporary.iterdir()))
        eventually(lambda: len(open_files()) <= len(before))
        eventually(
            lambda: (
                not [
                    thread
                    for thread in set(threading.enumerate()) - threads
                    if not thread.name.startswith("apothic-aio")
                ]
            )
        )
        assert not children()

    @pytest.fixture
    def python(self) -> str:
        return sys.executable

    def open(self, sandbox: Sandbox, **kwargs: Any) -> SandboxSession:
        return sandbox.local(**kwargs)


def open_files() -> list[str]:
    return os.listdir("/proc/self/fd")


def write_until_closed(session: SandboxSession, source: Path, name: str) -> None:
    with contextlib.suppress(SandboxClosedError):
        session.upload_file(source, name)
        session.write_bytes(f"{name}-2", bytes(PART_BYTES))


def is_open(path: Path) -> bool:
    """Tell whether this process has a file open, also one that is gone."""
    found = set()
    for fd in open_files():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
    return str(path) in found


def children() -> list[int]:
    from apothic.local_session.supervisor import descendants

    return descendants(os.getpid())


class TestLocalExecs(Local, ExecConformance):
    pass


class TestLocalFiles(Local, FileConformance):
    pass


class TestLocalKills(Local, KillConformance, InterruptConformance):
    pass


class TestLocalSessions(Local, SessionConformance):
    pass


class TestLocalData(Local, DataConformance):
    pass


class TestLocalOnly(Local):
    def test_it_says_what_it_is(self, session: SandboxSession) -> None:
        assert session.local
        assert "without isolation" in repr(session)
        assert "no isolation" in (Sandbox.local.__doc__ or "")

    def test_it_works_in_a_directory_of_its_own(self, sandbox: Sandbox) -> None:
        with sandbox.local() as session:
            home = Path(session.pwd())
            session.write_text("file", "")
            assert (home / "file").exists()
            assert home.parent == Path(tempfile.gettempdir())
        assert not home.exists()

    def test_a_given_directory_stays(self, sandbox: Sandbox, tmp_path: Path) -> None:
        with sandbox.local(cwd=str(tmp_path / "made")) as session:
            session.write_text("file", "x")
        assert (tmp_path / "made" / "file").read_text() == "x"

    def test_nobody_else_can_have_it(self, sandbox: Sandbox, session: SandboxSession) -> None:
        with pytest.raises(SerializationError, match="local"):
            pickle.dumps(session)
        with pytest.raises(HandleError):
            sandbox.attach(session.handle)

    @pytest.mark.parametrize("how", ["drop", "end"])
    def test_background_processes_die_with_the_session(
        self, sandbox: Sandbox, python: str, how: str
    ) -> None:
        session = sandbox.local()
        pid = int(session.exec("setsid sleep 1000 >/dev/null & echo $!", shell=True).stdout)
        assert not process_is_gone(pid)
        if how == "drop":
            del session
            eventually(lambda: process_is_gone(pid))
        else:
            session.close()
            assert process_is_gone(pid)

    def test_nothing_survives_the_death_of_its_process(self, engine: None, tmp_path: Path) -> None:
        script = tmp_path / "owner.py"
        script.write_text(
            "import apothic, sys\n"
            "session = apothic.App('a').sandbox().local()\n"
            "print(session.exec('setsid sleep 1000 >/dev/null 2>&1 & echo $!', shell=True).stdout,"
            " session.pwd(), flush=True)\n"
            "sys.stdin.read()\n"
        )
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None):
            owner = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert owner.stdout is not None
            assert owner.stdin is not None
            pid, directory = int(owner.stdout.readline()), owner.stdout.readline().strip()
            assert not process_is_gone(pid)
            assert Path(directory).exists()
            if number is None:
                owner.stdin.close()
            else:
                owner.send_signal(number)
            owner.wait()
            eventually(partial(process_is_gone, pid))
            eventually(partial(lambda path: not path.exists(), Path(directory)))
            owner.stdin.close()
            owner.stdout.close()

    def test_what_is_left_open_does_not_hold_up_the_end(self, engine: None, tmp_path: Path) -> None:
        script = tmp_path / "owner.py"
        script.write_text(
            "import apothic\n"
            "session = apothic.App('a').sandbox().local()\n"
            "stream = session.exec_stream('echo x; sleep 1000', shell=True)\n"
            "print(next(stream).text, session.exec('echo $PPID', shell=True).stdout, session.pwd())\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=True
        )
        assert done.stderr == ""
        directory = Path(done.stdout.split()[-1])
        eventually(lambda: not directory.exists())

    def test_a_forks_end_is_not_the_sessions(self, session: SandboxSession) -> None:
        child = os.fork()
        if child == 0:
            try:
                session._ref._end()  # type: ignore[attr-defined]  # as a collection would
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert session.exec("echo on").stdout == "on\n"

    def test_a_keeper_killed_from_inside(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        code = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)"
        with pytest.raises(SandboxLostError):
            session.exec([python, "-c", code, marked.token])
        assert session.exec("echo on").stdout == "on\n"

    def test_memory_is_bounded_while_output_has_no_end(
        self, session: SandboxSession, python: str
    ) -> None:
        code = "import os\nwhile True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)"
        tracemalloc.start()
        try:
            with pytest.raises(ExecTimeoutError) as caught:
                session.exec([python, "-c", code], timeout_s=2, max_output_bytes=1_000_000)
            assert tracemalloc.get_traced_memory()[1] < 16_000_000
        finally:
            tracemalloc.stop()
        assert caught.value.result is not None
        assert len(caught.value.result.stdout_bytes) == 1_000_000
        assert caught.value.result.truncated

    @pytest.mark.parametrize("old", [None, b"old" * PART_BYTES])
    def test_close_leaves_nothing_of_an_upload(
        self, sandbox: Sandbox, tmp_path: Path, old: bytes | None
    ) -> None:
        path, size = tmp_path / "file", 3 * PART_BYTES
        if old is not None:
            path.write_bytes(old)
        session = sandbox.local(cwd=str(tmp_path))

        def parts() -> Iterator[bytes]:
            yield b"n" * PART_BYTES
            eventually(lambda: path.read_bytes().startswith(b"n" * PART_BYTES))
            assert is_open(path)
            assert session.close().closed
            assert not is_open(path)
            yield b"n" * PART_BYTES

        with pytest.raises(SandboxClosedError, match="closed"):
            session._upload(b"file", parts(), size, False)
        if old is None:
            assert not path.exists()
        else:
            assert path.read_bytes() == b"n" * PART_BYTES + old[PART_BYTES:]

    def test_close_while_files_are_written(self, sandbox: Sandbox, tmp_path: Path) -> None:
        """Each is there whole, or it is not there."""
        source = tmp_path / "source"
        source.write_bytes(os.urandom(6 * PART_BYTES))
        for round_number in range(8):
            place = tmp_path / f"round-{round_number}"
            session = sandbox.local(cwd=str(place))
            with ThreadPoolExecutor(4) as pool:
                writing = [
                    pool.submit(write_until_closed, session, source, name) for name in "abcd"
                ]
                if round_number % 2:
                    eventually(partial(os.listdir, place))
                session.close()
                for each in writing:
                    each.result()
            for found in place.iterdir():
                assert found.read_bytes() in (source.read_bytes(), bytes(PART_BYTES))
                assert not is_open(found)

    def test_a_full_disk_leaves_the_old_content(self, sandbox: Sandbox, tmp_path: Path) -> None:
        old, source = os.urandom(300_000), tmp_path / "source"
        source.write_bytes(bytes(PART_BYTES + 1))
        with (
            mounted("tmpfs", tmp_path / "disk", "size=1m") as disk,
            sandbox.local(cwd=str(disk)) as session,
        ):
            session.write_bytes("file", old)
            for path in ("file", "new"):
                for write in (
                    lambda path: session.upload_file(source, path),
                    lambda path: session.write_bytes(path, bytes(2_000_000)),
                    lambda path: session.write_bytes(path, bytes(2_000_000), append=True),
                ):
                    with pytest.raises(SandboxNoSpaceError, match=f"/{path}'"):
                        write(path)
                    assert (disk / "file").read_bytes() == old
                    assert session.listdir() == ["file"]
            session.write_bytes("new", bytes(500_000))  # what was reserved is free again
            session.write_bytes("file", b"more", append=True)
            assert (disk / "file").read_bytes() == old + b"more"

    def test_a_disk_that_reserves_nothing(self, sandbox: Sandbox, tmp_path: Path) -> None:
        with (
            mounted("ramfs", tmp_path / "disk") as disk,
            sandbox.local(cwd=str(disk)) as session,
        ):
            for append in (False, True):
                session.write_bytes("file", b"some", append=append)
            session.write_bytes("file", bytes(PART_BYTES + 1), append=True)
            assert (disk / "file").read_bytes() == b"somesome" + bytes(PART_BYTES + 1)

    def test_an_abort_waits_for_the_write_that_it_ends(self, engine: None) -> None:
        """The descriptor would be another file's by then."""

        async def work() -> None:
            ours, theirs = os.openpty()
            path = os.ttyname(theirs).encode()
            writer = LocalWriter(path, append=False, make_parents=False, size=None)
            writing = asyncio.create_task(writer.write(bytes(3 << 20)))
            while not select.select([ours], [], [], 0)[0]:
                await asyncio.sleep(0.001)
            aborting = asyncio.create_task(writer.abort())
            await asyncio.sleep(0)
            assert is_open(Path(os.fsdecode(path)))
            os.close(theirs)
            while not aborting.done():  # until then a step of the write goes on
                if select.select([ours], [], [], 0.01)[0]:
                    with contextlib.suppress(OSError):  # nobody has the other end any more
                        os.read(ours, 1 << 16)
                await asyncio.sleep(0)
            with pytest.raises(OSError, match="cancel") as caught:
                await writing
            assert caught.value.errno == errno.ECANCELED
            assert not is_open(Path(os.fsdecode(path)))
            with pytest.raises(OSError, match="cancel") as caught:
                await writer.finish()
            assert caught.value.errno == errno.ECANCELED
            os.close(ours)

        asyncio.run(asyncio.wait_for(work(), 60))

    @pytest.mark.parametrize("times", [1, 3])
    def test_what_is_opened_for_nobody_is_closed(
        self, engine: None, tmp_path: Path, times: int
    ) -> None:
        async def work() -> None:
            old, new = tmp_path / "old", tmp_path / "new"
            old.write_text("x")
            before = asyncio.all_tasks()
            going, may_open = threading.Semaphore(0), threading.Event()

            def open_reader() -> LocalReader:
                going.release()
                may_open.wait()
                return LocalReader(os.fsencode(old))

            def open_writer() -> LocalWriter:
                going.release()
                may_open.wait()
                return LocalWriter(os.fsencode(new), append=False, make_parents=False, size=10)

            tasks = [
                asyncio.create_task(finished(open_reader, LocalReader.drop)),
                asyncio.create_task(finished(open_writer, LocalWriter.drop)),
            ]
            for _ in tasks:
                while not going.acquire(blocking=False):
                    await asyncio.sleep(0.001)
            for _ in range(times):
                for task in tasks:
                    task.cancel()
                await asyncio.sleep(0)
            may_open.set()
            for task in tasks:
                with pytest.raises(asyncio.CancelledError):
                    await task
            while asyncio.all_tasks() - before:
                await asyncio.sleep(0.001)
            assert not is_open(old)
            assert not is_open(new)
            assert old.exists()
            assert not new.exists()

        asyncio.run(asyncio.wait_for(work(), 60))

    @as_root
    def test_another_user(self, session: SandboxSession) -> None:
        assert session.exec("id -un", user="nobody", cwd="/").stdout == "nobody\n"
        assert session.exec("id -u", user="1234", cwd="/").stdout == "1234\n"
        assert session.exec("id -g", user="1234:4321", cwd="/").stdout == "4321\n"
        with pytest.raises(ExecStartError, match="no-such-user"):
            session.exec("id", user="no-such-user")
        with pytest.raises(SandboxPermissionError):
            session.exec("id", user="nobody")  # the session's directory is not theirs
