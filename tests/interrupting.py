"""Ctrl-C before any line of a creation, exactly there, in a program that goes on.

A trace function raises it. It is used in a process of its own: CPython 3.11 waits for ever in one that
traces while an exception set from outside (`PyThreadState_SetAsyncExc`) has not come to its thread, as
other tests leave them behind.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

from ray_backend.leases import CREATION_GRACE_S
from ray_backend.registry import Registry
from tests.support import driver_env, eventually

__all__ = ["Line", "interrupt_at_each", "lines_of", "run_apart"]

SIDE_BY_SIDE = 3
GONE_S = CREATION_GRACE_S / 2
"""Seconds in which nothing may be left; later the manager would drop a lease without an actor."""

ROOT = Path(__file__).parent.parent


class Line(NamedTuple):
    """A line of a file, the path from the root of the project."""

    path: str
    number: int


def run_apart(function: Callable[[], object], address: str) -> None:
    """Run a function of a test module in a process of its own, connected to the cluster."""
    code = f"from {function.__module__} import {function.__name__} as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=driver_env(address),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]


class Closable(Protocol):
    """What a creation gives: an instance or a session."""

    def close(self) -> object: ...


def lines_of(action: Callable[[], object], paths: Sequence[str]) -> list[Line]:
    """Run it, and give the lines of these files that ran in this thread, each once."""
    seen: dict[Line, None] = {}
    _traced(action, paths, lambda line: seen.setdefault(line))
    return list(seen)


def interrupt_at_each(
    lines: Sequence[Line],
    create: Callable[[str], Closable],
    afterwards: Callable[[str], object] = lambda name: None,
) -> None:
    """Interrupt creations before these lines, one each, and see that nothing is left of any.

    Args:
        lines: of what runs in ``create``.
        create: makes one of a class or a sandbox of this name, which nobody else has.
        afterwards: uses and closes what was meant to stay.
    """
    registry = Registry()

    def interrupt(line: Line) -> bool:
        name = f"{line.path.rpartition('/')[2].removesuffix('.py')}_{line.number}_"
        created: list[Closable] = []
        interrupted = _interrupted_at(line, lambda: created.append(create(name)))
        for each in created:  # it never came there
            each.close()
        afterwards(name)

        def left() -> list[str]:
            return [each for each in registry.list_leases() if name in each]

        try:
            eventually(lambda: not left(), GONE_S)
        except AssertionError:
            raise AssertionError(f"interrupted at {line}: left is {left()}") from None
        return interrupted

    with ThreadPoolExecutor(SIDE_BY_SIDE) as threads:
        reached = list(threads.map(interrupt, lines))
    missed = [line for line, was in zip(lines, reached, strict=True) if not was]
    assert len(missed) < len(lines) / 10, missed  # what is there for one of several threads


def _interrupted_at(line: Line, action: Callable[[], object]) -> bool:
    """Run it, and interrupt it before a line; False where it never came there."""

    def interrupt(reached: Line) -> None:
        if reached == line:
            sys.settrace(None)
            raise KeyboardInterrupt

    try:
        _traced(action, [line.path], interrupt)
    except KeyboardInterrupt:
        return True
    return False


def _traced(
    action: Callable[[], object], paths: Sequence[str], reach: Callable[[Line], object]
) -> None:
    wanted = {str(ROOT / path): path for path in paths}

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        return on_line if frame.f_code.co_filename in wanted else None

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            reach(Line(wanted[frame.f_code.co_filename], frame.f_lineno))
        return on_line

    sys.settrace(on_call)
    try:
        action()
    finally:
        sys.settrace(None)
