"""The suites on `Sandbox.local`."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from apothic import Sandbox, SandboxSession
from apothic.errors import (
    ExecStartError,
    ExecTimeoutError,
    HandleError,
    SandboxLostError,
    SandboxPermissionError,
    SerializationError,
)
from tests.conformance.sandboxes.base import Marked, SandboxSuite, marked
from tests.conformance.sandboxes.execs import ExecConformance
from tests.conformance.sandboxes.files import FileConformance
from tests.conformance.sandboxes.kills import InterruptConformance, KillConformance
from tests.conformance.sandboxes.sessions import SessionConformance
from tests.conformance.sandboxes.volumes_of_data import DataConformance
from tests.support import as_root, eventually, process_is_gone

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

    @as_root
    def test_another_user(self, session: SandboxSession) -> None:
        assert session.exec("id -un", user="nobody", cwd="/").stdout == "nobody\n"
        assert session.exec("id -u", user="1234", cwd="/").stdout == "1234\n"
        assert session.exec("id -g", user="1234:4321", cwd="/").stdout == "4321\n"
        with pytest.raises(ExecStartError, match="no-such-user"):
            session.exec("id", user="no-such-user")
        with pytest.raises(SandboxPermissionError):
            session.exec("id", user="nobody")  # the session's directory is not theirs
