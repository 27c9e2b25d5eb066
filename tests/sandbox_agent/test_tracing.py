"""A program that makes its keeper its tracer (PTRACE_TRACEME) runs as if nobody traced it."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from ray_backend.sandbox.protocol import Exited, Started
from tests.sandbox_agent.harness import Agent, state, wait_until

PRELUDE = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
def be_traced():
    if libc.ptrace(0, 0, 0, 0) != 0:
        sys.exit(f"PTRACE_TRACEME: {os.strerror(ctypes.get_errno())}")
def say(*words):
    print(*words, flush=True)
"""


def program(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", PRELUDE + code]


def test_signals_arrive_and_the_exec_goes_on(any_agent: Agent):
    code = """
came = []
signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
for _ in range(3):
    be_traced()
    os.kill(os.getpid(), signal.SIGUSR1)
say(*came, sys.stdin.read())
sys.exit(3)
"""
    ran = any_agent.run(program(code), stdin=b"in")
    assert (ran.stdout, ran.exit.status, ran.exit.left_behind) == (b"10 10 10 in\n", 3, False)


def test_another_program_takes_its_place(any_agent: Agent):
    ran = any_agent.run(program("be_traced(); os.execvp('sh', ['sh', '-c', 'echo on; exit 4'])"))
    assert (ran.stdout, ran.exit.status, ran.exit.signal) == (b"on\n", 4, None)


@pytest.mark.parametrize("send", ["os.kill(os.getpid(), N)", "signal.raise_signal(N)"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_it_dies_of_a_signal(any_agent: Agent, number: int, send: str):
    ran = any_agent.run(program(f"N = {int(number)}; say('on'); be_traced(); {send}; say('off')"))
    assert (ran.stdout, ran.exit.signal) == (b"on\n", number)


def test_it_dies_of_a_trap_that_no_execve_gave(any_agent: Agent):
    ran = any_agent.run(program("be_traced(); signal.raise_signal(signal.SIGTRAP); say('off')"))
    assert (ran.stdout, ran.exit.signal) == (b"", signal.SIGTRAP)


def test_it_stops_and_is_continued(agent: Agent):
    stream = agent.start(
        program("be_traced(); os.kill(os.getpid(), signal.SIGSTOP); say('on')"), tell_start=True
    )
    pid = agent.until(stream, Started).pid
    wait_until(lambda: state(pid) == "T", "it is stopped, and not for a tracer")
    os.kill(pid, signal.SIGCONT)
    ran = agent.finish(stream)
    assert (ran.stdout, ran.exit.status) == (b"on\n", 0)


def test_a_process_that_the_keeper_adopted(any_agent: Agent):
    code = """
signal.signal(signal.SIGUSR1, lambda number, frame: say("came"))
keeper, (read, write) = os.getppid(), os.pipe()
if os.fork() == 0:
    if os.fork() > 0:
        os._exit(0)
    while os.getppid() != keeper:
        pass
    be_traced()
    os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(0)
os.close(write)
os.read(read, 1)
"""
    ran = any_agent.run(program(code))
    assert (ran.stdout, ran.exit.status) == (b"came\n", 0)


@pytest.mark.parametrize("grace_ms", [0, 300])
def test_stops_without_end_do_not_keep_it_from_its_kill(any_agent: Agent, grace_ms: int):
    """All of the processes become children of the keeper, which lets them go as often as they stop."""
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda number, frame: None)
keeper = os.getppid()
for _ in range(8):
    if os.fork() == 0:
        if os.fork() > 0:
            os._exit(0)
        while os.getppid() != keeper:
            pass
        break
else:
    say("ready")
while True:
    be_traced()
    os.kill(os.getpid(), signal.SIGUSR1)
"""
    stream = any_agent.start(program(code))
    assert any_agent.line(stream) == b"ready\n"
    any_agent.push(any_agent.connection.kill(stream, grace_ms=grace_ms))
    ended = any_agent.until(stream, Exited)
    assert ended.signal == signal.SIGKILL
    assert not ended.lost, "the keeper heard nothing"
    assert any_agent.run(["echo", "next"]).stdout == b"next\n"


def test_one_that_the_agent_adopted_is_killed_all_the_same(any_agent: Agent):
    code = """
signal.signal(signal.SIGUSR1, lambda number, frame: None)
keeper = os.getppid()
os.kill(keeper, signal.SIGKILL)
while os.getppid() == keeper:
    pass
while True:
    be_traced()
    os.kill(os.getpid(), signal.SIGUSR1)
"""
    for _ in range(3):
        ran = any_agent.run(program(code))
        assert ran.exit.lost
        assert any_agent.run(["echo", "next"]).stdout == b"next\n"
