"""What the suites share: how a kind of session is opened, and looking for what lives inside."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apothic import App, Sandbox, SandboxSession
from tests.support import eventually

SMALL: dict[str, Any] = {"cpu": 0, "memory_mb": 512, "timeout_s": 60}

_FIND = """
import os, sys
for pid in os.listdir("/proc"):
    if pid.isdigit() and int(pid) != os.getpid():
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read()
        except OSError:
            continue
        if sys.argv[1].encode()[::-1] in words:
            print(pid)
"""


class SandboxSuite:
    """Inherit it and give `engine` and, where they differ, `open` and `python`.

    Programs of the tests are Python's (`python`) and ``/bin/sh`` with what busybox has.
    """

    @pytest.fixture
    def engine(self) -> Iterator[None]:
        """Put an engine in place; afterwards nothing may be left."""
        raise NotImplementedError

    @pytest.fixture
    def python(self) -> str:
        """Give the path of a Python inside."""
        return "/usr/bin/python3"

    def open(self, sandbox: Sandbox, **kwargs: Any) -> SandboxSession:
        return sandbox.create(**kwargs)

    @pytest.fixture
    def define(self, engine: None) -> Callable[..., Sandbox]:
        """Give a function that defines a sandbox with options."""
        app = App("conformance")

        def define(**options: Any) -> Sandbox:
            return app.sandbox(**{"name": f"s{uuid.uuid4().hex[:8]}", **SMALL, **options})

        return define

    @pytest.fixture
    def sandbox(self, define: Callable[..., Sandbox]) -> Sandbox:
        return define()

    @pytest.fixture
    def session(self, sandbox: Sandbox) -> Iterator[SandboxSession]:
        with self.open(sandbox) as session:
            session.chdir(session.mkdir("work"))
            yield session


class Marked:
    """Processes that carry a token in their arguments, backwards where it is searched for."""

    def __init__(self, session: SandboxSession, python: str) -> None:
        self.session = session
        self.python = python
        self.token = uuid.uuid4().hex

    def alive(self) -> list[int]:
        """List the live processes that carry the token."""
        found = self.session.exec([self.python, "-c", _FIND, self.token[::-1]]).check()
        return [int(pid) for pid in found.stdout.split()]

    def wait_for(self, count: int) -> None:
        eventually(lambda: len(self.alive()) == count)

    def wait_until_none(self) -> None:
        self.wait_for(0)


@pytest.fixture
def marked(session: SandboxSession, python: str) -> Marked:
    return Marked(session, python)
