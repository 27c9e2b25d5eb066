"""A real engine with base images, and the check that nothing of ours is left on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_backend.sandbox.engine.connection import Engine
from tests.docker.conftest import SCRIPT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)


@pytest.fixture(scope="session")
def docker_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Connect to an engine that has the base images."""
    done = subprocess.run([SCRIPT, "images"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"no Docker engine: {done.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APOTHIC_VOLUME_ROOT", str(tmp_path_factory.mktemp("volumes")))
        connected = Engine.connect()
        yield connected
        connected.close()
