from __future__ import annotations

import errno
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import Stage
from ray_backend.sandbox.protocol import Exited, Output
from tests.sandbox_agent.harness import Agent, keepers, state, wait_until
from tests.support import as_root

PYTHON = sys.executable
MIB = 1 << 20


def python(code: str) -> list[str]:
    return [PYTHON, "-S", "-c", code]


def test_status_streams_and_signals(any_agent: Agent):
    ran = any_agent.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (ran.stdout, ran.stderr, ran.exit.status, ran.exit.signal) == (
        b"out\n",
        b"err\n",
        7,
        None,
    )
    assert not ran.exit.left_behind
    assert 0 < ran.exit.duration_s < 30
    ran = any_agent.run(["sh", "-c", "kill -SEGV $$"])
    assert (ran.exit.status, ran.exit.signal) == (None, signal.SIGSEGV)


def test_bytes_come_as_they_are(agent: Agent):
    every = bytes(range(256)) * 3
    assert agent.run(["cat"], stdin=every).stdout == every
    text = "é€😀".encode()
    octal = "".join(f"\\{byte:03o}" for byte in text)
    assert agent.run(["sh", "-c", f"printf '{octal}'"]).stdout == text


def test_argv_env_and_cwd_as_they_are(agent: Agent, tmp_path: Path):
    place = tmp_path / "a b\n-c"
    place.mkdir()
    code = (
        "import os,sys; sys.stdout.buffer.write(b'\\0'.join("
        "[*map(os.fsencode, sys.argv[1:]), os.getcwdb(), os.environb[b'X']]))"
    )
    arguments = [b"", b" ", b"'\"", b"\xff\xfe", b"-x\n", b"*"]
    value = b"line\nline='\"\xff"
    argv = [*map(os.fsencode, python(code)), *arguments]
    ran = agent.run(argv, cwd=os.fsencode(place), env={b"X": value})
    assert ran.stdout.split(b"\0") == [*arguments, os.fsencode(place), value]


def test_the_environment_is_exactly_what_was_given(agent: Agent):
    names = {entry.split(b"=")[0] for entry in agent.run(["env", "-0"]).stdout.split(b"\0")[:-1]}
    assert names == set(agent.env)


def test_a_megabyte_of_arguments(agent: Agent):
    arguments = [b"%06d" % i + b"x" * 100_000 for i in range(10)] + [b"y" * 48_000]
    code = (
        "import sys,hashlib; print(hashlib.sha256('\\0'.join(sys.argv[1:]).encode()).hexdigest())"
    )
    ran = agent.run([*map(os.fsencode, python(code)), *arguments])
    assert ran.stdout.strip().decode() == hashlib.sha256(b"\0".join(arguments)).hexdigest()


def test_more_than_the_kernel_takes_is_an_error(agent: Agent):
    failed = agent.run(["true", b"x" * 200_000]).failed
    assert (failed.errno, failed.stage) == (errno.E2BIG, Stage.PROGRAM)
    failed = agent.run(["true", *([b"x" * 100_000] * 70)]).failed
    assert (failed.errno, failed.stage) == (errno.E2BIG, Stage.PROGRAM)
    failed = agent.run(["true", *([b""] * 1_100_000)]).failed
    assert (failed.errno, failed.stage) == (errno.E2BIG, Stage.START)


def test_stdin_is_dev_null_unless_given(agent: Agent):
    assert agent.run(["readlink", "/proc/self/fd/0"]).stdout == b"/dev/null\n"
    assert agent.run(["cat"]).stdout == b""


def test_a_program_gets_nothing_of_the_agent(any_agent: Agent):
    code = (
        "import os,signal,resource;"
        "print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1], os.getsid(0) == os.getpid(),"
        "os.getpgid(0) == os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, []),"
        "signal.getsignal(signal.SIGPIPE) is not None, oct(os.umask(0)), os.getresgid(),"
        "resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    import resource

    gid, files = os.getgid(), resource.getrlimit(resource.RLIMIT_NOFILE)
    ran = any_agent.run(python(code))
    assert ran.stdout.decode().strip() == (
        f"[0, 1, 2] True True set() True 0o22 {(gid, gid, gid)} {files}"
    ), ran


def test_missing_and_unusable_programs_are_told_apart(agent: Agent, tmp_path: Path):
    plain, script, text = tmp_path / "plain", tmp_path / "script", tmp_path / "text"
    plain.write_text("#!/bin/sh\n")
    script.write_text("#!/no/such/interpreter\n")
    text.write_text("neither ELF nor script\n")
    script.chmod(0o755)
    text.chmod(0o755)
    path = {b"PATH": os.fsencode(tmp_path)}

    def failure(program: str | Path, **options: object) -> tuple[int, Stage, int | None]:
        failed = agent.run([str(program)], **options).failed
        return failed.errno, failed.stage, failed.exit_status

    assert failure("/no/such/program") == (errno.ENOENT, Stage.PROGRAM, 127)
    assert failure("no-such-program") == (errno.ENOENT, Stage.PROGRAM, 127)
    assert failure("") == (errno.ENOENT, Stage.PROGRAM, 127)
    assert failure(plain) == (errno.EACCES, Stage.PROGRAM, 126)
    assert failure("plain", env=path) == (errno.EACCES, Stage.PROGRAM, 126)
    assert failure(tmp_path) == (errno.EACCES, Stage.PROGRAM, 126)
    assert failure(script) == (errno.ENOENT, Stage.INTERPRETER, 126)
    assert failure("script", env=path) == (errno.ENOENT, Stage.INTERPRETER, 126)
    assert failure(text) == (errno.ENOEXEC, Stage.PROGRAM, 126)
    assert failure("/bin/true", cwd=b"/no/such/place") == (errno.ENOENT, Stage.CWD, None)
    assert failure("/bin/true", cwd=os.fsencode(plain)) == (errno.ENOTDIR, Stage.CWD, None)
    assert failure("/bin/true", user=b"no-such-user") == (errno.ENOENT, Stage.USER, None)
    assert agent.run(["/bin/true"]).exit.status == 0


def test_the_path_of_the_program_decides(agent: Agent, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").write_text(f"#!/bin/sh\necho {name}\n")
        (tmp_path / name / "program").chmod(0o755)
    search = b":".join([b"/nowhere", bytes(tmp_path / "two"), bytes(tmp_path / "one")])
    assert agent.run(["program"], env={b"PATH": search}).stdout == b"two\n"
    (tmp_path / "two" / "program").chmod(0o644)
    assert agent.run(["program"], env={b"PATH": search}).stdout == b"one\n"
    ran = agent.run(["program"], env={b"PATH": b""}, cwd=bytes(tmp_path / "one"))
    assert ran.stdout == b"one\n"
    assert agent.run(["./program"], cwd=bytes(tmp_path / "one")).stdout == b"one\n"


@as_root
def test_users(agent: Agent):
    def who(user: bytes) -> str:
        return agent.run(["sh", "-c", "echo $(id -u):$(id -g):$HOME"], user=user).stdout.decode()

    assert who(b"") == "0:0:\n"
    assert who(b"1234") == "1234:0:/\n"
    assert who(b"1234:567") == "1234:567:/\n"
    assert who(b"nobody").startswith("65534:65534:/")
    assert who(b"nobody:daemon").startswith("65534:1:/")
    groups = agent.run(["id", "-G"], user=b"1234:567").stdout
    assert groups == b"567\n"
    failed = agent.run(["true"], user=b"root:no-such-group").failed
    assert (failed.errno, failed.stage) == (errno.ENOENT, Stage.USER)


@as_root
def test_an_agent_that_is_not_root(launch: Callable[..., Agent], checked_agent: Path):
    def become_nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    for part in [checked_agent, *checked_agent.parents]:
        if part.stat().st_mode & 0o001 == 0:
            part.chmod(part.stat().st_mode | 0o005)
    agent = launch(preexec=become_nobody)
    assert agent.run(["id", "-u"]).stdout == b"65534\n"
    assert agent.run(["id", "-u"], user=b"nobody").stdout == b"65534\n"
    failed = agent.run(["true"], user=b"root").failed
    assert (failed.errno, failed.stage) == (errno.EPERM, Stage.USER)
    stream = agent.started(["sleep", "1000"])
    agent.kill(stream, 5000)
    assert agent.until(stream, Exited).signal == signal.SIGTERM


def test_64_mib_both_ways_at_once(agent: Agent):
    size = 64 * MIB
    code = (
        "import os,sys,threading\n"
        f"out, err = os.urandom({MIB}), os.urandom({MIB})\n"
        "import hashlib\n"
        "def pour(fd, block, sums):\n"
        "    for _ in range(64):\n"
        "        rest = memoryview(block); sums.update(block)\n"
        "        while rest: rest = rest[os.write(fd, rest):]\n"
        "a, b = hashlib.sha256(), hashlib.sha256()\n"
        "t = threading.Thread(target=pour, args=(2, err, b)); t.start(); pour(1, out, a); t.join()\n"
        "os.write(1, a.digest()); os.write(2, b.digest())"
    )
    ran = agent.run(python(code))
    assert len(ran.stdout) == len(ran.stderr) == size + 32
    for data in (ran.stdout, ran.stderr):
        assert hashlib.sha256(data[:-32]).digest() == data[-32:]
    content = os.urandom(MIB) * 50
    ran = agent.run(["sha256sum"], stdin=content)
    assert ran.stdout.split()[0].decode() == hashlib.sha256(content).hexdigest()


def test_input_that_nobody_reads_holds_nobody_up(agent: Agent):
    content = b"x" * (4 * MIB)
    assert (
        agent.run(["sh", "-c", "exec <&-; echo closed; sleep 0.1"], stdin=content).exit.status == 0
    )
    ran = agent.run(["head", "-c", "3"], stdin=content)
    assert (ran.stdout, ran.exit.status) == (b"xxx", 0)


def test_an_exec_ends_with_its_leader(agent: Agent):
    """A grandchild holds the pipes open, and what was written until then has come."""
    ran = agent.run(["sh", "-c", "sleep 1000 & echo $!; echo err >&2"])
    assert (ran.exit.status, ran.stderr, ran.exit.left_behind) == (0, b"err\n", True)
    background = int(ran.stdout)
    os.kill(background, 0)
    agent.kill(ran.stream)
    with pytest.raises(ProcessLookupError):
        os.kill(background, 0)


def test_background_processes_go_on_and_may_write(agent: Agent, tmp_path: Path):
    go, done = tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    script = f"(read x < {go}; dd if=/dev/zero bs=65536 count=64; echo $? > {done}) & echo started"
    ran = agent.run(["sh", "-c", script])
    assert (ran.stdout, ran.exit.left_behind) == (b"started\n", True)
    go.write_text("now\n")
    wait_until(lambda: done.exists() and done.read_text() == "0\n", "it wrote 4 MiB to nobody")
    wait_until(lambda: not keepers(agent), "its keeper has ended")


def test_every_zombie_is_reaped_and_no_status_stolen(any_agent: Agent):
    script = 'for i in 1 2 3 4 5 6 7 8; do (setsid sh -c "(:)& (:)& exit 3" &) ; done; exit 42'
    streams = [any_agent.start(["sh", "-c", script]) for _ in range(10)]
    assert {any_agent.finish(stream).exit.status for stream in streams} == {42}
    wait_until(lambda: len(keepers(any_agent)) <= 1, "one keeper at most, which rests")
    assert not any(state(pid) == "Z" for pid in keepers(any_agent))


def test_many_at_once(agent: Agent):
    streams = [agent.start(["sh", "-c", f"echo {i}; exit {i}"]) for i in range(60)]
    for i, stream in reversed(list(enumerate(streams))):
        ran = agent.finish(stream)
        assert (ran.stdout, ran.exit.status) == (b"%d\n" % i, i)


def test_beyond_the_limit_of_streams_is_refused(agent: Agent):
    streams = [agent.start(["cat"], stdin=True) for _ in range(256)]
    assert agent.run(["true"]).failed.errno == errno.EAGAIN
    for stream in streams:
        agent.push(agent.connection.end(stream))
    assert {agent.finish(stream).exit.status for stream in streams} == {0}
    assert agent.run(["true"]).exit.status == 0


def test_signals_go_to_the_group(agent: Agent):
    stream = agent.started(
        ["sh", "-c", "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 1; done"]
    )
    assert agent.line(stream) == b"ready\n"
    agent.push(agent.connection.signal(stream, signal.SIGUSR1))
    assert agent.finish(stream).exit.status == 5


def test_output_comes_as_it_is_written(agent: Agent):
    stream = agent.start(["sh", "-c", "echo one; read x; echo two $x"], stdin=True)
    assert agent.until(stream, Output).data == b"one\n"
    agent.push(agent.connection.send(stream, b"three\n"))
    assert agent.until(stream, Output).data == b"two three\n"
    assert agent.until(stream, Exited).status == 0
