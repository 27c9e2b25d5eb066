"""The keeper that rests: whose exec left nothing alive takes the next one, as a new one would."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.sandbox_agent.harness import Agent, keepers, state, wait_until

NEXT_MAX = 16384
"""KEEPER_NEXT_MAX: a longer request is not handed over."""


def resting(agent: Agent) -> int:
    wait_until(lambda: len(keepers(agent)) == 1, "one keeper is there")
    return keepers(agent)[0]


def test_a_series_of_execs_has_one_keeper(any_agent: Agent):
    any_agent.run(["true"])
    keeper = resting(any_agent)
    assert Path(f"/proc/{keeper}/comm").read_text() == "keeper\n"
    for i in range(20):
        ran = any_agent.run(["sh", "-c", f"cat; echo {i}; exit {i}"], stdin=b"in ")
        assert (ran.stdout, ran.exit.status) == (b"in %d\n" % i, i)
        assert not any_agent.run(["true"]).stdout
        assert resting(any_agent) == keeper


def test_it_keeps_nothing_open(agent: Agent):
    agent.run(["true"])
    keeper = resting(agent)

    def holds() -> dict[str, str]:
        found = {}
        for fd in os.listdir(f"/proc/{keeper}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed just now
                found[fd] = os.readlink(f"/proc/{keeper}/fd/{fd}")
        return {} if any(place.startswith("pipe:") for place in found.values()) else found

    wait_until(lambda: bool(holds()), "the first exec's pipes are closed")
    before = holds()
    for stdin in (None, b"x", b"y" * 300_000):
        assert agent.run(["sh", "-c", "cat >/dev/null; echo"], stdin=stdin).stdout == b"\n"
    assert resting(agent) == keeper
    wait_until(lambda: holds() == before, "nothing more is open")


def test_nothing_of_one_exec_reaches_the_next(agent: Agent, tmp_path: Path):
    first = agent.run(
        [
            "sh",
            "-c",
            "umask 077; ulimit -n 50; cd /tmp; trap '' TERM; cat /proc/self/oom_score_adj",
        ],
        env={b"ONLY_MINE": b"1"},
        cwd=os.fsencode(tmp_path),
    )
    keeper = resting(agent)
    code = (
        "umask; ulimit -n; pwd; env | grep -c ONLY_MINE; grep SigIgn /proc/self/status; "
        "ls /proc/self/fd | wc -l; cat /proc/self/oom_score_adj"
    )
    told = agent.run(["sh", "-c", code]).stdout
    assert resting(agent) == keeper
    agent.kill(agent.start(["sleep", "1000"]))  # the next has a keeper of its own
    fresh = agent.run(["sh", "-c", code]).stdout
    assert resting(agent) != keeper
    assert told == fresh
    assert told.split()[-1] == first.stdout.strip()


HARM = (
    "renice -n 15 -p $PPID",
    "taskset -p 1 $PPID",
    "chrt --batch -p 0 $PPID",
    "chrt --idle -p 0 $PPID",
    "ionice -c 3 -p $PPID",
    "echo 1000 >/proc/$PPID/oom_score_adj",
    "echo 1 >/proc/$PPID/coredump_filter",
)
"""What a program can do to its keeper that children of that inherit."""
LOOK = """
import os, subprocess
print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), os.sched_getaffinity(0))
print(subprocess.run(["ionice"], capture_output=True, check=True).stdout)
for process in ("self", os.getppid()):
    for name in ("oom_score_adj", "coredump_filter"):
        print(open(f"/proc/{process}/{name}").read())
"""


@pytest.mark.parametrize("harm", HARM)
def test_what_a_program_does_to_its_keeper_does_not_reach_the_next(any_agent: Agent, harm: str):
    look = [sys.executable, "-S", "-c", LOOK]
    fresh = any_agent.run(look)
    assert fresh.exit.status == 0, fresh
    harmed = any_agent.run(["sh", "-c", harm])
    assert harmed.exit.status == 0, harmed
    assert any_agent.run(look).stdout == fresh.stdout
    keeper = resting(any_agent)
    any_agent.run(["true"])
    assert resting(any_agent) == keeper


def test_when_memory_runs_out_programs_go_before_their_keeper(any_agent: Agent):
    for _ in range(3):
        ran = any_agent.run(["sh", "-c", "cat /proc/$$/oom_score_adj /proc/$PPID/oom_score_adj"])
        program, keeper = map(int, ran.stdout.split())
        assert program == keeper + 100


def test_one_that_is_not_wanted_any_more_ends_even_if_it_was_stopped(any_agent: Agent):
    any_agent.run(["true"])
    keeper = resting(any_agent)
    os.setpriority(os.PRIO_PROCESS, keeper, 15)
    os.kill(keeper, signal.SIGSTOP)
    wait_until(lambda: state(keeper) == "T", "it is stopped")
    assert any_agent.run(["true"]).exit.status == 0
    assert resting(any_agent) != keeper


def test_two_at_once_have_two(agent: Agent):
    agent.run(["true"])
    first = resting(agent)
    cats = [agent.start(["cat"], stdin=True) for _ in range(2)]
    wait_until(lambda: len(keepers(agent)) == 2, "a second keeper")
    assert first in keepers(agent)
    for cat in cats:
        agent.push(agent.connection.end(cat))
    assert [agent.finish(cat).exit.status for cat in cats] == [0, 0]
    resting(agent)


def test_one_whose_exec_left_something_does_not_rest(agent: Agent):
    agent.run(["true"])
    keeper = resting(agent)
    left = agent.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"])
    assert keepers(agent) == [keeper]
    agent.run(["true"])
    assert len(keepers(agent)) == 2
    agent.kill(left.stream)
    assert resting(agent) != keeper


def test_one_that_was_to_kill_does_not_rest(agent: Agent):
    agent.run(["true"])
    keeper = resting(agent)
    stream = agent.start(["sleep", "1000"])
    agent.kill(stream)
    wait_until(lambda: keeper not in keepers(agent), "it has ended")


def test_a_kill_that_comes_too_late_does_not_reach_the_next(any_agent: Agent):
    for grace_ms in (0, 1000):
        ran = any_agent.run(["true"])
        stream = any_agent.start(["sh", "-c", "echo on; cat"], stdin=True)
        any_agent.kill(ran.stream, grace_ms)
        any_agent.push(any_agent.connection.end(stream))
        ended = any_agent.finish(stream)
        assert (ended.stdout, ended.exit.status) == (b"on\n", 0)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_whoever_harms_it_gains_nothing(any_agent: Agent, sign: int):
    any_agent.run(["true"])
    keeper = resting(any_agent)
    os.kill(keeper, sign)
    if sign == signal.SIGKILL:
        wait_until(lambda: not keepers(any_agent), "it was buried")
    else:
        wait_until(lambda: state(keeper) == "T", "it is stopped")
    for _ in range(3):
        assert any_agent.run(["echo", "next"]).stdout == b"next\n"


@pytest.mark.parametrize("more", range(-120, 121, 40))
def test_requests_around_the_size_that_is_handed_over(agent: Agent, more: int):
    agent.run(["true"])
    word = b"x" * (NEXT_MAX - 200 + more)
    ran = agent.run(
        [sys.executable.encode(), b"-S", b"-c", b"import sys;print(len(sys.argv[1]))", word]
    )
    assert ran.stdout == b"%d\n" % len(word)
    assert agent.run(["echo", "next"]).stdout == b"next\n"


def test_what_cannot_start_is_told_by_it_as_well(agent: Agent):
    agent.run(["true"])
    for _ in range(3):
        assert agent.run(["/no/such/program"]).failed is not None
        assert agent.run(["true"], cwd=b"/no/such/place").failed is not None
        assert agent.run(["true"]).exit.status == 0
