"""An engine for tests of what talks to one, without sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_backend.directories import VOLUME_ROOT_VARIABLE
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import OwnerLabels
from tests.docker.support import AGENT_STAND_IN, left_of, new_owner
from tests.support import eventually


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)


@pytest.fixture(scope="package")
def engine(docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Give the engine of the run, and a directory for volumes."""
    docker_engine.api.create_volume(AGENT_STAND_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VOLUME_ROOT_VARIABLE, str(tmp_path_factory.mktemp("apothic")))
        yield docker_engine
    docker_engine.api.remove_volume(AGENT_STAND_IN)


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
