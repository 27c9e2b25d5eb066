"""`Cls.new` interrupted before any line of the client's, in a program that goes on."""

from __future__ import annotations

import pytest

from apothic import App, ClassInstance, Cls, method
from tests.interrupting import interrupt_at_each, lines_of, run_apart

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATHS = (
    "apothic/cls.py",
    "apothic/instance.py",
    "ray_backend/client.py",
    "ray_backend/instances.py",
    "ray_backend/launch.py",
    "ray_backend/lease_link.py",
    "ray_backend/lifecycle.py",
    "ray_backend/manager_link.py",
    "ray_backend/readiness.py",
)


class Plain:
    @method()
    def answer(self) -> int:
        return 42


def define(name: str) -> Cls:
    return App("interrupted").cls(name=name, cpu=0, memory_mb=10)(Plain)


def test_new_leaves_nothing(ray_cluster: str):
    run_apart(interrupt_new, ray_cluster)


def interrupt_new() -> None:
    cls = define("Whole")
    cls.new().close()  # what is done once per process is not of interest
    created: list[ClassInstance] = []
    lines = lines_of(lambda: created.append(cls.new()), PATHS)
    created[0].close()
    assert {line.path for line in lines} == set(PATHS)
    interrupt_at_each(lines, lambda name: define(name).new())
