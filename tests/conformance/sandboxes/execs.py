"""Running programs: arguments, results, directory, variables, input, streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from apothic import Sandbox, SandboxSession
from apothic.errors import (
    ApothicError,
    ExecStartError,
    ExecTimeoutError,
    InvalidOptionError,
    PendingTasksExceededError,
    SandboxExecError,
    SandboxFileNotFoundError,
    SandboxNotADirectoryError,
)
from tests.conformance.sandboxes.base import SandboxSuite


class ExecConformance(SandboxSuite):
    def test_a_string_is_split_and_not_expanded(self, session: SandboxSession) -> None:
        result = session.exec("echo 'a  b' $HOME *")
        assert result.stdout == "a  b $HOME *\n"
        assert result.command == ("echo", "a  b", "$HOME", "*")
        assert result.ok
        assert result.check() is result
        assert result.duration_s > 0

    def test_a_list_is_the_argument_vector(self, session: SandboxSession, python: str) -> None:
        words = ["", "a b", "-n", "*", "ü\n", "\udcff"]
        code = "import sys, os; sys.stdout.buffer.write(b'|'.join(map(os.fsencode, sys.argv[1:])))"
        result = session.exec([python, "-c", code, *words])
        assert result.stdout_bytes == b"|a b|-n|*|\xc3\xbc\n|\xff"
        assert session.exec(("echo", "tuple")).stdout == "tuple\n"

    def test_a_shell_where_asked_for(self, session: SandboxSession) -> None:
        assert session.exec("echo $((1+2)) | tr 3 4; exit 5", shell=True).stdout == "4\n"
        assert session.exec("exit 5", shell=True).returncode == 5

    @pytest.mark.parametrize(
        "command", ["", "  ", [], [""], ["a", 1], "a\0b", ["a\0"], "echo 'open", None, 5, b"ls"]
    )
    def test_bad_commands_are_refused(self, session: SandboxSession, command: object) -> None:
        with pytest.raises(InvalidOptionError):
            session.exec(command)
        with pytest.raises(InvalidOptionError):
            session.exec_stream(command)

    def test_bad_arguments_are_refused(self, session: SandboxSession) -> None:
        for bad in (
            {"timeout_s": 0},
            {"timeout_s": float("inf")},
            {"cwd": ""},
            {"env": {"1A": "x"}},
            {"env": {"A": "x\0"}},
            {"env": {"A": b"x"}},
            {"env": ["A"]},
            {"stdin": 5},
            {"user": ""},
            {"max_output_bytes": -1},
        ):
            with pytest.raises(InvalidOptionError):
                session.exec("true", **bad)
        with pytest.raises(InvalidOptionError, match="shell"):
            session.exec(["echo", "x"], shell=True)

    def test_failing_is_a_result(self, session: SandboxSession) -> None:
        result = session.exec("echo out; echo err >&2; exit 3", shell=True)
        assert (result.returncode, result.ok, result.signal) == (3, False, None)
        assert (result.stdout, result.stderr) == ("out\n", "err\n")
        with pytest.raises(SandboxExecError, match="ended with 3") as caught:
            result.check()
        assert "err" in str(caught.value)
        assert caught.value.result is result

    def test_death_by_a_signal(self, session: SandboxSession) -> None:
        result = session.exec("kill -KILL $$", shell=True)
        assert (result.returncode, result.signal) == (137, 9)
        with pytest.raises(SandboxExecError, match="SIGKILL"):
            result.check()

    def test_a_program_may_exit_above_128(self, session: SandboxSession) -> None:
        result = session.exec("exit 137", shell=True)
        assert (result.returncode, result.signal) == (137, None)

    def test_a_missing_program(self, session: SandboxSession) -> None:
        for command in ("no-such-program x", "./no-such-program", "/no/such/program"):
            result = session.exec(command)
            assert result.returncode == 127
            assert command.split()[0] in result.stderr
            assert result.stdout == ""

    def test_a_program_that_cannot_be_executed(self, session: SandboxSession) -> None:
        session.write_text("plain", "echo hello\n")
        result = session.exec("./plain")
        assert result.returncode == 126
        assert "./plain" in result.stderr
        assert session.exec([session.mkdir("dir")]).returncode == 126

    def test_too_many_arguments(self, session: SandboxSession) -> None:
        with pytest.raises(ExecStartError, match="could not be started") as caught:
            session.exec(["true", "x" * 200_000])  # one argument has at most 128 KiB
        assert caught.value.errno is not None
        assert session.exec("echo on").stdout == "on\n"

    def test_directory_of_an_exec(self, session: SandboxSession) -> None:
        below = session.mkdir("below")
        assert session.exec("pwd").stdout.strip() == session.pwd()
        assert session.exec("pwd", cwd="below").stdout.strip() == below
        assert session.exec("pwd", cwd="/").stdout.strip() == "/"
        assert session.exec("pwd").stdout.strip() == session.pwd()
        with pytest.raises(SandboxFileNotFoundError, match="absent"):
            session.exec("pwd", cwd="absent")
        session.write_text("file", "")
        with pytest.raises(SandboxNotADirectoryError, match="file"):
            session.exec("pwd", cwd="file")

    def test_variables_of_an_exec(self, session: SandboxSession) -> None:
        session.set_env(A="session", B="session")
        shown = session.exec('echo "$A $B $C"', shell=True, env={"B": 2, "C": "line\n'\""})
        assert shown.stdout == "session 2 line\n'\"\n"
        assert session.exec('echo "${A-unset}"', shell=True, env={"A": None}).stdout == "unset\n"
        assert session.exec('echo "$A ${C-unset}"', shell=True).stdout == "session unset\n"

    def test_the_program_is_looked_up_in_the_path_of_the_exec(
        self, session: SandboxSession
    ) -> None:
        session.mkdir("bin")
        session.write_text("bin/tool", "#!/bin/sh\necho found\n")
        session.exec("chmod +x bin/tool").check()
        assert session.exec("tool").returncode == 127
        path = f"{session.pwd()}/bin:/usr/bin:/bin"
        assert session.exec("tool", env={"PATH": path}).stdout == "found\n"

    def test_input(self, session: SandboxSession) -> None:
        assert session.exec("cat", stdin="grüße\n").stdout == "grüße\n"
        assert session.exec("cat", stdin=b"\0\xff").stdout_bytes == b"\0\xff"
        assert session.exec("cat", stdin=b"").stdout_bytes == b""
        assert session.exec("cat").stdout_bytes == b""  # nothing to read, and no waiting

    def test_input_that_is_not_read(self, session: SandboxSession) -> None:
        assert session.exec("true", stdin=b"x" * 1_000_000).ok
        assert session.exec("head -c 3", stdin=b"abc" * 1_000_000).stdout == "abc"

    def test_text_of_what_is_no_text(self, session: SandboxSession) -> None:
        result = session.exec(r"printf 'a\377\000b'", shell=True)
        assert result.stdout_bytes == b"a\xff\0b"
        assert result.stdout == "a�\0b"

    def test_no_terminal_and_own_session(self, session: SandboxSession, python: str) -> None:
        code = "import os; print(os.isatty(1), os.getsid(0) == os.getpid() == os.getpgid(0))"
        assert session.exec([python, "-c", code]).stdout == "False True\n"

    def test_signals_are_as_a_program_expects(self, session: SandboxSession, python: str) -> None:
        code = (
            "import signal; print([s for s in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, "
            "signal.SIGHUP) if s in signal.pthread_sigmask(signal.SIG_BLOCK, [])])"
        )
        assert session.exec([python, "-c", code]).stdout == "[]\n"
        # Python ignores SIGPIPE for itself; a plain program must die of it.
        shown = session.exec("yes | head -n 1; true", shell=True, timeout_s=20)
        assert shown.stdout == "y\n"

    def test_no_descriptor_of_ours_inside(self, session: SandboxSession) -> None:
        shown = session.exec("ls /proc/self/fd", shell=True).stdout.split()
        assert set(shown) <= {"0", "1", "2", "3"}  # 3 is the directory that ls reads

    def test_many_at_once(self, session: SandboxSession) -> None:
        with ThreadPoolExecutor(20) as pool:
            results = list(
                pool.map(lambda n: session.exec(["sh", "-c", f"echo {n}; exit {n}"]), range(20))
            )
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]
        assert [result.returncode for result in results] == list(range(20))

    def test_one_exec_may_wait_for_another(self, session: SandboxSession) -> None:
        stream = session.exec_stream(
            "echo ready; until [ -e go ]; do sleep 0.05; done; echo gone", shell=True
        )
        assert next(stream).text == "ready\n"
        assert session.exec("touch go").ok
        assert [event.kind for event in stream] == ["stdout", "exit"]

    def test_limit_of_execs_at_once(self, define: Callable[..., Sandbox]) -> None:
        with self.open(define(concurrent_requests=2)) as session:
            session.chdir(session.mkdir("work"))
            script = "mkdir run.$$; ls -d run.* | wc -l; sleep 0.1; rmdir run.$$"
            with ThreadPoolExecutor(6) as pool:
                shown = list(pool.map(lambda _: session.exec(script, shell=True), range(6)))
            assert max(int(result.check().stdout) for result in shown) <= 2

    def test_limit_of_pending_verbs(self, define: Callable[..., Sandbox]) -> None:
        with self.open(define(max_pending_tasks=2)) as session:
            with (
                session.exec_stream("sleep 100"),
                session.exec_stream("sleep 100"),
                pytest.raises(PendingTasksExceededError, match="max_pending_tasks=2"),
            ):
                session.pwd()
            assert session.pwd()

    def test_the_limit_of_pending_verbs_is_each_sessions_own(
        self, define: Callable[..., Sandbox]
    ) -> None:
        sandbox = define(max_pending_tasks=1)
        with self.open(sandbox) as one, self.open(sandbox) as two:
            with one.exec_stream("sleep 100"):
                assert two.pwd()
                with two.exec_stream("sleep 100"):
                    for session in (one, two):
                        with pytest.raises(PendingTasksExceededError, match="max_pending_tasks=1"):
                            session.pwd()
                assert two.pwd()
            assert one.pwd()

    def test_output_limit(self, session: SandboxSession) -> None:
        result = session.exec("printf 12345; printf 123 >&2", shell=True, max_output_bytes=3)
        assert (result.stdout, result.stderr) == ("123", "123")
        assert (result.stdout_truncated, result.stderr_truncated) == (True, False)
        assert result.truncated
        assert session.exec("printf 123", max_output_bytes=3).truncated is False
        nothing = session.exec("printf 1", max_output_bytes=0)
        assert (nothing.stdout, nothing.truncated) == ("", True)

    # -- time -----------------------------------------------------------------------------------

    def test_timeout_keeps_what_came_before(self, session: SandboxSession) -> None:
        begin = time.monotonic()
        with pytest.raises(ExecTimeoutError, match=r"timeout_s=0\.5") as caught:
            session.exec("echo out; echo err >&2; sleep 100", shell=True, timeout_s=0.5)
        assert time.monotonic() - begin < 20
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, ApothicError)
        result = caught.value.result
        assert result is not None
        assert (result.stdout, result.stderr, result.signal) == ("out\n", "err\n", 15)
        assert session.exec("echo next").stdout == "next\n"

    def test_default_timeout_is_the_definitions(self, define: Callable[..., Sandbox]) -> None:
        with self.open(define(timeout_s=0.3)) as session:
            with pytest.raises(ExecTimeoutError, match=r"timeout_s=0\.3"):
                session.exec("sleep 100")
            assert session.exec("sleep 0.5", timeout_s=30).ok

    def test_output_of_the_grace_period_counts(self, session: SandboxSession) -> None:
        script = 'trap "echo bye; exit 7" TERM; echo on; while :; do sleep 0.05; done'
        with pytest.raises(ExecTimeoutError) as caught:
            session.exec(script, shell=True, timeout_s=0.5)
        assert caught.value.result is not None
        assert caught.value.result.stdout == "on\nbye\n"
        assert caught.value.result.returncode == 7

    # -- streams --------------------------------------------------------------------------------

    def test_a_stream_gives_events_as_they_come(self, session: SandboxSession) -> None:
        script = "echo 1; until [ -e go ]; do sleep 0.02; done; echo 2 >&2; exit 4"
        stream = session.exec_stream(script, shell=True)
        first = next(stream)
        assert (first.kind, first.text, first.data) == ("stdout", "1\n", b"1\n")
        session.write_text("go", "")
        rest = list(stream)
        assert [(event.kind, event.text) for event in rest] == [("stderr", "2\n"), ("exit", "")]
        result = rest[-1].result
        assert result is not None
        assert rest[-1].returncode == result.returncode == 4
        assert (result.stdout, result.stderr) == ("1\n", "2\n")
        with pytest.raises(StopIteration):
            next(stream)

    def test_a_stream_starts_by_itself(self, session: SandboxSession) -> None:
        with session.exec_stream("touch started; sleep 100", shell=True):
            deadline = time.monotonic() + 20
            while not session.exists("started"):
                assert time.monotonic() < deadline

    def test_a_character_split_between_pieces(self, session: SandboxSession) -> None:
        slow = 'for b in 303 274 342 202 254 342 202; do printf "\\\\$b"; sleep 0.05; done'
        events = list(session.exec_stream(slow, shell=True))
        assert len(events) > 3
        assert "".join(event.text for event in events) == "ü€�"
        assert b"".join(event.data for event in events) == "ü€".encode() + b"\xe2\x82"

    def test_a_stream_that_runs_too_long(self, session: SandboxSession) -> None:
        stream = session.exec_stream("echo out; sleep 100", shell=True, timeout_s=3)
        assert next(stream).text == "out\n"
        with pytest.raises(ExecTimeoutError) as caught:
            list(stream)
        assert caught.value.result is not None
        assert caught.value.result.stdout == "out\n"
        assert list(stream) == []

    def test_a_stream_of_a_missing_program(self, session: SandboxSession) -> None:
        events = list(session.exec_stream("no-such-program"))
        assert [event.kind for event in events] == ["stderr", "exit"]
        assert "no-such-program" in events[0].text
        assert events[1].returncode == 127

    def test_a_stream_in_a_missing_directory(self, session: SandboxSession) -> None:
        with pytest.raises(SandboxFileNotFoundError):
            list(session.exec_stream("true", cwd="absent"))

    def test_a_stream_with_input(self, session: SandboxSession) -> None:
        events = list(session.exec_stream("cat", stdin=b"x" * 300_000))
        assert b"".join(event.data for event in events) == b"x" * 300_000

    # -- async ----------------------------------------------------------------------------------

    def test_async_twins(self, session: SandboxSession) -> None:
        async def work() -> None:
            results = await asyncio.gather(*(session.aio.exec(["echo", str(n)]) for n in range(10)))
            assert [result.stdout for result in results] == [f"{n}\n" for n in range(10)]
            assert await session.aio.write_text("f", "text") == f"{session.pwd()}/f"
            assert await session.aio.read_text("f") == "text"
            assert await session.aio.listdir() == ["f"]
            assert (await session.aio.set_env(A=1))["A"] == "1"
            kinds = []
            async with session.aio.exec_stream("echo x") as stream:
                async for event in stream:
                    kinds.append(event.kind)
            assert kinds == ["stdout", "exit"]

        asyncio.run(work())
