"""A real engine, base images, and the check that nothing of ours is left on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_backend.directories import VOLUME_ROOT_VARIABLE
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.helper import HELPER_IMAGE
from ray_backend.sandbox.engine.images import REPOSITORY, clean_builds
from ray_backend.sandbox.engine.labels import BUILD, NETWORK, OwnerLabels
from tests.docker.support import AGENT_STAND_IN, left_of, new_owner
from tests.support import eventually

SCRIPT = Path(__file__).parents[2] / "scripts" / "docker-engine.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Connect to an engine that has the base images; see afterwards that it has nothing more."""
    done = subprocess.run([SCRIPT, "images"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"no Docker engine: {done.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    os.environ[VOLUME_ROOT_VARIABLE] = str(tmp_path_factory.mktemp("apothic"))
    connected = Engine.connect()
    before = _everything(connected)
    connected.api.create_volume(AGENT_STAND_IN)
    yield connected
    connected.api.remove_volume(AGENT_STAND_IN)
    clean_builds(connected)
    if HELPER_IMAGE not in before and connected.inspect_image(HELPER_IMAGE):
        connected.api.remove_image(HELPER_IMAGE)
    left = sorted(_everything(connected) - before)
    connected.close()
    del os.environ[VOLUME_ROOT_VARIABLE]
    assert left == []


@pytest.fixture
def owner(engine: Engine) -> Iterator[OwnerLabels]:
    """Give an owner of its own; nothing that carries its labels may be left."""
    owner = new_owner()
    yield owner
    eventually(lambda: not left_of(engine, owner.cluster))


@pytest.fixture
def remove_image(engine: Engine) -> Iterator[Callable[[str], str]]:
    """Have an image removed after the test."""
    references: list[str] = []

    def later(reference: str) -> str:
        references.append(reference)
        return reference

    yield later
    for reference in dict.fromkeys(references):
        if engine.inspect_image(reference) is not None:
            engine.api.remove_image(reference, force=True)


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
