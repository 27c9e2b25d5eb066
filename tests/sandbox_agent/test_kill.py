"""The kill table: whatever an exec has become, nothing of it is alive when the kill is answered.

Every program says that it is ready before it is killed, and carries the exec's mark in its
environment unless it has dropped it, in which case it tells its process id.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import Stage
from ray_backend.sandbox.protocol import Exited, Failed, Output
from tests.sandbox_agent.control_groups import control_group, enter, members
from tests.sandbox_agent.harness import Agent, keepers, marked, memory_kib, state, wait_until

ESCAPE = """
import os, sys, time
def escape(depth):
    # A double fork into a session of its own, with an empty environment and no pipe.
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if depth:
            escape(depth - 1)
        os.execve("/bin/sleep", ["/bin/sleep", SECONDS], {})
"""


def programs(seconds: str) -> dict[str, list[str]]:
    """Give the rows; ``seconds`` marks the sleeps of this test."""
    python = [sys.executable, "-S", "-c"]
    escape = ESCAPE.replace("SECONDS", repr(seconds))
    return {
        "leader": ["sh", "-c", f"echo ready; exec sleep {seconds}"],
        "background child": ["sh", "-c", f"sleep {seconds} & echo ready; wait"],
        "grandchild that holds stdout": [
            "sh",
            "-c",
            f'sh -c "sleep {seconds} & wait" & echo ready; wait',
        ],
        "setsid": ["sh", "-c", f"setsid sleep {seconds} & echo ready; wait"],
        "double fork, setsid, empty environment": [
            *python,
            escape + f"escape(3)\nprint('ready', flush=True)\ntime.sleep({seconds})",
        ],
        "own subreaper": [
            *python,
            "import ctypes\nctypes.CDLL(None).prctl(36, 1)\n"
            + escape
            + f"escape(1)\nprint('ready', flush=True)\ntime.sleep({seconds})",
        ],
        "ignores SIGTERM": [
            "sh",
            "-c",
            f"trap '' TERM; echo ready; sleep {seconds}; sleep {seconds}",
        ],
        "stopped": ["sh", "-c", f"sleep {seconds} & kill -STOP $!; echo ready; kill -STOP $$"],
        "writes without end": [
            "sh",
            "-c",
            f"echo ready; sleep {seconds} & while :; do echo {'y' * 999}; done",
        ],
    }


@pytest.mark.parametrize("grace_ms", [0, 300])
@pytest.mark.parametrize("row", programs("1"))
def test_nothing_is_alive_afterwards(any_agent: Agent, row: str, grace_ms: int):
    seconds = str(100_000 + os.getpid())  # of this run of the suite alone, whatever runs beside it
    mark = f"ROW={seconds}"
    stream = any_agent.start(programs(seconds)[row], env={b"ROW": seconds.encode()}, credit=1 << 30)
    assert any_agent.line(stream).startswith(b"ready\n")

    def sleepers() -> list[str]:
        return [
            entry.name
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and f"\0{seconds}\0" in read(entry / "cmdline")
        ]

    if row == "stopped":
        wait_until(
            lambda: [state(pid) for pid in marked(f"{mark}\0")] == ["T", "T"], "both have stopped"
        )
    else:
        wait_until(lambda: bool(sleepers()), "the program has begun")
    any_agent.push(any_agent.connection.kill(stream, grace_ms=grace_ms))
    ended = any_agent.finish(stream).exit
    any_agent.kill(stream)
    assert sleepers() == []
    assert list(marked(f"{mark}\0")) == []
    assert not ended.lost
    if not grace_ms:
        assert ended.signal == signal.SIGKILL
    assert any_agent.run(["echo", "next"]).stdout == b"next\n"


PIDS_MAX = 64


@pytest.fixture
def limited() -> Iterator[Path]:
    """Give a control group that holds no more than PIDS_MAX processes, whoever they are of."""
    with control_group("pids", max=PIDS_MAX) as group:
        yield group


@pytest.fixture(scope="session")
def fork_loop(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a program that forks without end where that is limited; see its source."""
    program = tmp_path_factory.mktemp("forkloop") / "forkloop"
    source = Path(__file__).with_name("forkloop.c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-o", program, source], check=True)
    return program


def test_the_fork_loop_refuses_to_run_without_a_limit(fork_loop: Path, limited: Path):
    done = subprocess.run([fork_loop, limited, "bomb"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("grace_ms", [0, 300])
@pytest.mark.parametrize("way", ["bomb", "runner"])
@pytest.mark.parametrize("place", ["process", "init"])
def test_a_fork_loop_is_killed(
    request: pytest.FixtureRequest,
    limited: Path,  # before launch, so that it outlives the agent
    launch: Callable[..., Agent],
    fork_loop: Path,
    place: str,
    way: str,
    grace_ms: int,
):
    wrap = request.getfixturevalue("namespace") if place == "init" else ()

    agent = launch(wrap=wrap, preexec=lambda: enter(limited))
    stream = agent.start([str(fork_loop), str(limited), way])
    assert agent.line(stream) == b"ready\n"
    before = 16 if way == "runner" else PIDS_MAX - 1
    wait_until(lambda: len(members(limited)) >= before, "it loops")
    other = agent.run(["true"]).end  # there may be room for one more, or not
    if isinstance(other, Failed):
        assert (other.errno, other.stage) == (errno.EAGAIN, Stage.START)
    agent.push(agent.connection.kill(stream, grace_ms=grace_ms))
    agent.finish(stream)
    agent.kill(stream)
    left = len(members(limited)) - len(keepers(agent))  # the one of `true` may rest
    assert len(keepers(agent)) <= 1
    assert left <= 1 + bool(wrap), "somebody but the agent and unshare is left"
    assert agent.run(["echo", "next"]).stdout == b"next\n"


def read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def test_the_grace_is_used_and_not_more(agent: Agent):
    script = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done"
    stream = agent.start(["sh", "-c", script])
    assert agent.line(stream) == b"ready\n"
    start = time.monotonic()
    agent.push(agent.connection.kill(stream, grace_ms=60_000))
    ran = agent.finish(stream)
    assert (ran.stdout, ran.exit.status) == (b"bye\n", 3)
    agent.kill(stream, 60_000)
    assert time.monotonic() - start < 20


def test_a_second_kill_shortens_the_grace(agent: Agent):
    stream = agent.start(["sh", "-c", "trap '' TERM; echo ready; sleep 1000"])
    agent.line(stream)
    agent.push(agent.connection.kill(stream, grace_ms=3_600_000))
    start = time.monotonic()
    agent.kill(stream, 0)
    assert agent.until(stream, Exited).signal == signal.SIGKILL
    assert time.monotonic() - start < 20


def test_partial_output_is_there(agent: Agent):
    stream = agent.start(["sh", "-c", "printf partial; printf error >&2; exec sleep 1000"])
    got = {agent.until(stream, Output).data, agent.until(stream, Output).data}
    agent.kill(stream)
    assert got == {b"partial", b"error"}
    assert agent.until(stream, Exited).signal == signal.SIGKILL


def test_output_that_nobody_wants_does_not_hold_up_a_kill(agent: Agent):
    stream = agent.start(["sh", "-c", "yes & exec yes"], credit=10)
    agent.until(stream, Output)
    agent.kill(stream, 1000, discard_output=True)
    assert agent.until(stream, Exited).signal == signal.SIGTERM


def test_a_kill_ends_that_exec_only(agent: Agent):
    left = agent.run(["sh", "-c", "setsid sleep 1000 & echo $!"])
    other = agent.started(["sleep", "1000"])
    stream = agent.started(["sleep", "1000"])
    agent.kill(stream)
    os.kill(int(left.stdout), 0)
    agent.kill(left.stream)
    with pytest.raises(ProcessLookupError):
        os.kill(int(left.stdout), 0)
    assert not [event for event in agent.events[other] if isinstance(event, Exited)]
    agent.kill(other)


def test_killing_what_has_ended_is_answered(agent: Agent):
    ran = agent.run(["true"])
    agent.kill(ran.stream)
    agent.kill(ran.stream, 1000)
    failed = agent.run(["/no/such/program"])
    agent.kill(failed.stream)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_whoever_harms_a_keeper_gains_nothing(any_agent: Agent, sign: int):
    """The leader kills or stops the keeper above it; its escaped child is found all the same."""
    seconds = str(200_000 + os.getpid())
    code = (
        ESCAPE.replace("SECONDS", repr(seconds))
        + f"escape(1)\nos.kill(os.getppid(), {int(sign)})\nprint('ready', flush=True)\n"
        "time.sleep(1000)"
    )
    stream = any_agent.start([sys.executable, "-S", "-c", code])
    if sign == signal.SIGKILL:
        ended = any_agent.finish(stream).exit
        assert (ended.signal, ended.lost) == (signal.SIGKILL, True)
    else:
        any_agent.line(stream)
    any_agent.kill(stream)
    assert not [e for e in Path("/proc").iterdir() if f"\0{seconds}\0" in read(e / "cmdline")]
    assert any_agent.run(["echo", "next"]).stdout == b"next\n"


def test_kill_everything_from_inside(launch: Callable[..., Agent], namespace: tuple[str, ...]):
    """``kill -9 -1`` reaches everybody in the container but PID 1."""
    agent = launch(wrap=namespace)
    other = agent.started(["sleep", "1000"])
    stream = agent.start(["sh", "-c", "kill -9 -1; sleep 1000"])
    assert agent.finish(stream).exit.lost
    assert agent.finish(other).exit.signal == signal.SIGKILL
    agent.kill(stream)
    assert agent.run(["echo", "next"]).stdout == b"next\n"


def test_memory_stays_bounded_under_output_without_end(agent: Agent):
    stream = agent.start(["sh", "-c", "yes & exec yes >&2"], credit=1 << 20)
    got = 0
    while got < 64 << 20:
        event = agent.until(stream, Output)
        got += len(event.data)
        agent.push(agent.connection.credit(stream, event.channel, len(event.data)))
    before = memory_kib(agent.pid)
    unread = [agent.start(["yes"], credit=1 << 30) for _ in range(20)]
    agent.reading = False
    wait_until(lambda: blocked(agent), "the agent waits for somebody to read")
    assert memory_kib(agent.pid) < before + 2048  # sanitizers keep some of what is freed
    agent.reading = True
    for one in [stream, *unread]:
        agent.push(agent.connection.kill(one, grace_ms=0, discard_output=True))
    for one in [stream, *unread]:
        agent.kill(one)


def blocked(agent: Agent) -> bool:
    """Tell whether the pipe to us is full."""
    import fcntl
    import struct
    import termios

    (waiting,) = struct.unpack("i", fcntl.ioctl(agent.from_agent, termios.FIONREAD, b"\0" * 4))
    return waiting >= 65536 - 4096
