"""What tests of real processes share: drivers, waiting for facts, and looking for what is left."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import pytest

T = TypeVar("T")

IN_CI = bool(os.environ.get("CI"))

as_root = pytest.mark.skipif(
    os.geteuid() != 0 and not IN_CI, reason="only root can do what this test needs"
)
"""Marks tests that are skipped for others than root, and there fail in CI, which runs as root."""

RUN_VARIABLE = "APOTHIC_TEST_RUN"
"""Every process that a test starts, however far down, has it in its environment."""

LOGGED_CLASS = """
import os, sys, threading, time
from apothic import App, Cls, enter, exit, method

app = App("exits")


@app.cls(cpu=0, memory_mb=10, **OPTIONS)
class Logged:
    def __init__(self, path):
        self.path = path
        self.log("init")

    def log(self, word):
        with open(self.path, "a") as file:
            file.write(f"{word} {os.getpid()} {threading.get_ident()}\\n")

    @enter()
    def one(self):
        self.log("enter-one")

    @enter()
    def two(self):
        self.log("enter-two")

    @method()
    def pid(self):
        return os.getpid()

    @method()
    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    @exit()
    def three(self):
        self.log("exit-three")

    @exit()
    def four(self):
        self.log("exit-four")


LOG = sys.argv[1]
"""

LIFE = ["init", "enter-one", "enter-two", "exit-four", "exit-three"]
"""What the log of a `Logged` instance says after its one whole life."""


def unable(reason: str) -> NoReturn:
    """Skip a test for want of what CI provides; there it fails, so that nothing hides."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def mounted(kind: str, place: Path, options: str = "rw") -> Iterator[Path]:
    """Mount a fresh file system that needs no disk, on a new directory."""
    place.mkdir()
    mount = ["mount", "-t", kind, "-o", options, "none", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unable(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def import_or_skip(module: str) -> None:
    """Skip a test without a module that `make venv` installs; in CI it is an error."""
    if IN_CI:
        importlib.import_module(module)
    pytest.importorskip(module)


def driver_env(address: str | None) -> dict[str, str]:
    """Give the environment of a driver process that connects to ``address``, or to none."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_JOB_ID")}
    env["PYTHONUNBUFFERED"] = "1"
    if address is not None:
        env["RAY_ADDRESS"] = address
    return env


def start_driver(
    tmp_path: Path, body: str, *args: object, address: str | None = None, options: str = "dict()"
) -> subprocess.Popen[str]:
    """Start a driver process that runs ``body`` below the definition of `Logged`."""
    script = tmp_path / f"driver_{len(list(tmp_path.glob('driver_*')))}.py"
    script.write_text(f"OPTIONS = {options}\n{LOGGED_CLASS}\n{body}\n")
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, args)],
        env=driver_env(address),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """See to it that a process is gone afterwards, and its pipes closed."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str], prefix: str) -> str:
    """Read the driver's output up to a line that begins with ``prefix``; give its rest."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(prefix):
            return line[len(prefix) :].strip()
    process.wait()
    assert process.stderr is not None
    raise AssertionError(f"no {prefix!r} in:\n{''.join(seen)}\n{process.stderr.read()}")


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> str:
    """Wait for a driver to end well; give what it wrote to standard output."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
    return out


def eventually(fact: Callable[[], T], timeout_s: float = 60.0) -> T:
    """Wait until ``fact()`` is true, and give it."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = fact()
        if found:
            return found
        assert time.monotonic() < deadline, f"not true after {timeout_s} s: {found!r}"
        time.sleep(0.01)


def threads_in(function: str) -> int:
    """Count the threads of this process that are in a function of this name, however deep."""
    return sum(function in _functions(frame) for frame in sys._current_frames().values())


def _functions(innermost: FrameType) -> list[str]:
    frame: FrameType | None = innermost
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


@contextmanager
def interrupted_in(function: str, when: Callable[[], object] = lambda: True) -> Iterator[None]:
    """Send Ctrl-C to this thread, which is the main one, once it waits within a function.

    Args:
        function: its name.
        when: a fact that is waited for first, in another thread.
    """
    main = threading.get_ident()

    def waits() -> bool:
        names = _functions(sys._current_frames()[main])
        return names[0] in ("wait", "get_objects") and function in names  # the second is Ray's

    def interrupt() -> None:
        eventually(when)
        eventually(waits)
        signal.pthread_kill(main, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        yield
    finally:
        interrupter.join()


def words(log: Path) -> list[str]:
    """Give the first words of a log's lines."""
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def threads(log: Path) -> set[str]:
    """Give the thread ids of a log's lines."""
    return {line.split()[2] for line in log.read_text().splitlines()}


def process_is_gone(pid: int) -> bool:
    """Tell whether a process has ended; one that only waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def processes_of_run(variable: str, value: str) -> dict[int, str]:
    """Give the processes that have a variable in their environment, this one and zombies left out."""
    mark = f"{variable}={value}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def processes_of_session(leader: int) -> set[int]:
    """Give the processes of a leader's session that live."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == leader and fields[0] not in (b"Z", b"X"):
                found.add(int(entry.name))
    return found
