"""Memory that runs out: the agent lives, and says of an exec that this is why."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox_agent.control_groups import control_group, enter
from tests.sandbox_agent.harness import Agent, running

LIMIT_BYTES = 48 << 20
MOUNT = 'mount --bind "$0" "${0%/*}" && exec "$@"'
EAT = "data = bytearray(1 << 30)"


@pytest.fixture
def bounded(namespace: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Give words that let a command see its control group as in a container, and that group."""
    limits = {"limit_in_bytes": LIMIT_BYTES, "max": LIMIT_BYTES}
    swap = {"swap.max": 0, "swappiness": 0}
    with control_group("memory", **limits, **swap) as group:
        yield (*namespace, "sh", "-c", MOUNT, str(group)), group


def test_a_program_that_takes_too_much(shipped_agent: Path, bounded: tuple[tuple[str, ...], Path]):
    wrap, group = bounded
    with running(shipped_agent, wrap=wrap, preexec=lambda: enter(group)) as agent:
        assert not agent.run(["true"]).exit.out_of_memory
        ended = agent.run([sys.executable, "-S", "-c", EAT]).exit
        assert (ended.signal, ended.out_of_memory) == (signal.SIGKILL, True)
        ended = agent.run(["sh", "-c", f"'{sys.executable}' -S -c '{EAT}'; exit 5"]).exit
        assert (ended.status, ended.out_of_memory) == (5, True)
        assert not agent.run(["true"]).exit.out_of_memory


def test_a_kill_is_not_taken_for_it(agent: Agent):
    ended = agent.run(["sh", "-c", "kill -KILL $$"]).exit
    assert (ended.signal, ended.out_of_memory) == (signal.SIGKILL, False)
