"""Two releases of this package, of different protocols, share a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from apothic import App, method
from ray_backend.names import MANAGER_NAME, NAMESPACE, PROTOCOL_VERSION
from tests.support import eventually, finish, read_line, running, start_driver

ROOT = Path(__file__).parents[2]
OTHER = PROTOCOL_VERSION + 1
OTHERS_NAMESPACE = NAMESPACE.replace(str(PROTOCOL_VERSION), str(OTHER))
OTHERS_MANAGER = MANAGER_NAME.replace(str(PROTOCOL_VERSION), str(OTHER))


class Plain:
    @method()
    def answer(self) -> int:
        return 42


class Stray:
    """An actor of ours that has no lease, which the third look of a manager ends."""

    def apothic_stop(self, drain_s: float, hooks_s: float) -> dict[str, Any]:
        return {"closed": True, "hooks": [], "interrupted_calls": 0, "note": ""}


def other_release(folder: Path) -> Path:
    """Copy the packages, with another protocol."""
    for package in ("apothic", "ray_backend"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    names = folder / "ray_backend" / "names.py"
    text = names.read_text()
    line = f"PROTOCOL_VERSION = {PROTOCOL_VERSION}\n"
    assert line in text
    names.write_text(text.replace(line, f"PROTOCOL_VERSION = {OTHER}\n"))
    return folder


def leave_stray(namespace: str) -> None:
    ray.remote(Stray).options(
        name="versions:Stray:1", namespace=namespace, lifetime="detached", num_cpus=0
    ).remote()


def has_stray(namespace: str) -> bool:
    names = ray.util.list_named_actors(all_namespaces=True)
    return {"name": "versions:Stray:1", "namespace": namespace} in names


def test_neither_sees_what_is_the_others(
    tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
):
    """Not to find it, and not to sweep it."""
    cls = App("exits").cls(name="Logged", cpu=0, memory_mb=10)(Plain)
    ours = cls.named("n")
    folder = other_release(tmp_path / "other")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    body = f"""
import ray, ray_backend
assert ray_backend.__file__.startswith({str(folder)!r})
ray.init(runtime_env={{"env_vars": {{"PYTHONPATH": {str(folder)!r}}}}}, logging_level="ERROR")
theirs = Logged.named("n", LOG)
print("PID", theirs.pid.remote(), flush=True)
input()
print("STILL", theirs.pid.remote(), flush=True)
theirs.close()
"""
    with running(start_driver(tmp_path, body, tmp_path / "log", address=ray_cluster)) as driver:
        pid = read_line(driver, "PID")
        for namespace in (NAMESPACE, OTHERS_NAMESPACE):
            leave_stray(namespace)
        # When both managers have ended their strays, both have seen what is the other's as often.
        eventually(lambda: not has_stray(NAMESPACE) and not has_stray(OTHERS_NAMESPACE))
        assert ours.answer.remote() == 42
        assert driver.stdin is not None
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert read_line(driver, "STILL") == pid
        finish(driver)
    ours.close()
    ray.kill(ray.get_actor(OTHERS_MANAGER, namespace=OTHERS_NAMESPACE), no_restart=True)
