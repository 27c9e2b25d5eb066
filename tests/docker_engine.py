"""The engine of a run: with base images and the agent, and the check that nothing else is left on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.binaries import agent_binary
from ray_backend.sandbox.engine.agent_volume import ensure_agent, remove_agent
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.helper import HELPER_IMAGE
from ray_backend.sandbox.engine.images import REPOSITORY, clean_builds
from ray_backend.sandbox.engine.labels import BUILD, NETWORK
from tests.docker.support import new_owner
from tests.support import RUN_VARIABLE, unable

__all__ = ["docker_engine"]

SCRIPT = Path(__file__).parents[1] / "scripts" / "docker-engine.sh"


@pytest.fixture(scope="session")
def docker_engine(nothing_is_left: None) -> Iterator[Engine]:
    """Connect to an engine that has the base images; see afterwards that it has nothing more."""
    # An engine that is started now outlives the run, and is none of the processes it may not leave.
    outside = {name: value for name, value in os.environ.items() if name != RUN_VARIABLE}
    done = subprocess.run(
        [SCRIPT, "images"], capture_output=True, text=True, check=False, env=outside
    )
    if done.returncode != 0:
        unable(f"no Docker engine: {done.stderr.strip()}")
    connected = Engine.connect()
    before = _everything(connected)
    # Beforehand: its volume carries the labels of whom it was made for, and outlives them.
    binary = agent_binary(connected.architecture).read_bytes()
    ensure_agent(connected, binary, new_owner())
    yield connected
    remove_agent(connected, binary)
    clean_builds(connected)
    _remove_new_images(connected, before)
    left = sorted(_everything(connected) - before)
    connected.close()
    assert left == []


def _remove_new_images(engine: Engine, before: set[str]) -> None:
    """Remove what sessions had built: images are kept for the next session of their recipe."""
    api = engine.api
    for found in [*api.images(name=REPOSITORY), *api.images(name=HELPER_IMAGE)]:
        for tag in found["RepoTags"] or []:
            if tag not in before:
                api.remove_image(tag)


def _everything(engine: Engine) -> set[str]:
    """Name all that is ours; others may use the engine at the same time."""
    api = engine.api
    images = [*api.images(name=REPOSITORY), *api.images(name=HELPER_IMAGE)]
    images += api.images(filters={"label": BUILD})
    containers = [
        found
        for found in api.containers(all=True)
        if any(name.startswith("apothic.") for name in found["Labels"] or ())
        or found["Names"][0].startswith("/apothic")
    ]
    volumes = [found["Name"] for found in api.volumes()["Volumes"] or []]
    return {
        *(found["Names"][0] for found in containers),
        *(name for name in volumes if name.startswith("apothic")),
        *(found["Name"] for found in api.networks(filters={"label": NETWORK})),
        *(tag for found in images for tag in found["RepoTags"] or [found["Id"]]),
    }
