"""A creation that is interrupted before any line of the client's, in a program that goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apothic import App, Image, Sandbox, SandboxSession
from ray_backend.sandbox.engine.connection import Engine
from tests.docker.support import BUSYBOX
from tests.interrupting import Line, interrupt_at_each, lines_of, run_apart
from tests.sandboxes.left import see_nothing_left

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATHS = (
    "apothic/sandbox.py",
    "apothic/session.py",
    "ray_backend/client.py",
    "ray_backend/launch.py",
    "ray_backend/lease_link.py",
    "ray_backend/manager_link.py",
    "ray_backend/readiness.py",
    "ray_backend/sandbox/references.py",
    "ray_backend/sandbox/sessions.py",
)


def definition(name: str) -> Sandbox:
    image = Image.from_registry(BUSYBOX)
    return App("interrupted").sandbox(name=name, image=image, cpu=0, memory_mb=128)


def lines_that_run(open_one: Callable[[Sandbox], SandboxSession]) -> list[Line]:
    sandbox = definition("whole")
    open_one(sandbox).close()  # what is done once per process is not of interest
    opened: list[SandboxSession] = []
    lines = lines_of(lambda: opened.append(open_one(sandbox)), PATHS)
    opened[0].close()
    assert {line.path for line in lines} == set(PATHS)
    return lines


def test_create_leaves_nothing(ray_cluster: str, docker_engine: Engine):
    run_apart(interrupt_create, ray_cluster)
    see_nothing_left(docker_engine)


def interrupt_create() -> None:
    interrupt_at_each(lines_that_run(Sandbox.create), lambda name: definition(name).create())


def test_what_named_leaves_is_of_use(ray_cluster: str, docker_engine: Engine):
    """The session lives, or its name is free."""
    run_apart(interrupt_named, ray_cluster)
    see_nothing_left(docker_engine)


def interrupt_named() -> None:
    def named(sandbox: Sandbox) -> SandboxSession:
        return sandbox.named("n")

    def use(name: str) -> None:
        session = named(definition(name))
        assert session.exec("echo on", shell=True).stdout == "on\n"
        session.close()

    interrupt_at_each(lines_that_run(named)[::4], lambda name: named(definition(name)), use)
