"""The engine of the run, and an owner for each test, of whose things nothing may be left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ray_backend.sandbox.agent.binaries import agent_binary
from ray_backend.sandbox.engine.agent_volume import ensure_agent, remove_agent
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import OwnerLabels
from tests.docker.conftest import engine as docker_engine
from tests.docker.support import left_of, new_owner
from tests.support import eventually

__all__ = ["docker_engine", "engine_of_run", "owner_of_test"]


@pytest.fixture(scope="session")
def engine_of_run(docker_engine: Engine) -> Iterator[Engine]:
    binary = agent_binary(docker_engine.architecture).read_bytes()
    # Beforehand: its volume carries the labels of whom it was made for, and outlives them.
    ensure_agent(docker_engine, binary, new_owner())
    yield docker_engine
    remove_agent(docker_engine, binary)


@pytest.fixture
def owner_of_test(engine_of_run: Engine) -> Iterator[OwnerLabels]:
    owner = new_owner()
    yield owner
    eventually(lambda: not left_of(engine_of_run, owner.cluster))
