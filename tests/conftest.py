"""The shared cluster, and the check that nothing of ours is left behind."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker_engine import docker_engine
from tests.support import RUN_VARIABLE, eventually, processes_of_run

__all__ = ["docker_engine"]

# Ray's token would have to be handed to each driver process; tests of it set it up themselves.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# uvloop is there for tests of its own.
os.environ.setdefault("RAY_USE_UVLOOP", "0")

# The suites are no test modules themselves; their assertions are to tell as much.
pytest.register_assert_rewrite("tests.conformance")

# Where these tests are started in the background of a script, Ctrl-C is ignored, here and in all that
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what needs the shared cluster last: it lives until the end, and takes its share."""
    items.sort(key=lambda item: "ray_cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """See that the whole run leaves no process, volume or mount behind."""
    root = tmp_path_factory.mktemp("volume-root")
    run = uuid.uuid4().hex
    os.environ[RUN_VARIABLE] = run
    os.environ["APOTHIC_VOLUME_ROOT"] = str(root)
    yield
    try:
        eventually(lambda: not processes_of_run(RUN_VARIABLE, run), 120)  # Ray's own agents wait
    except AssertionError:
        raise AssertionError(f"left: {processes_of_run(RUN_VARIABLE, run)}") from None
    left = list(Path(root, "volumes").glob("*"))
    assert left == []


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Start a cluster in this process; give the address for other drivers."""
    import ray

    assert not ray.is_initialized()
    ray.init(
        address="local",  # whatever else runs on this machine
        num_cpus=8,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=400 * 1024**2,
        _memory=64 * 1024**3,
    )
    yield ray.get_runtime_context().gcs_address
    from ray_backend.manager import instance_names

    left = instance_names()
    ray.shutdown()
    assert left == []


@pytest.fixture
def ray_cluster(cluster: str) -> Iterator[str]:
    """Give the shared cluster's address; afterwards no instance may be left on it."""
    from ray_backend.manager import instance_names, stop_actor

    yield cluster
    try:
        eventually(lambda: not instance_names())
    finally:
        for name in instance_names():  # so that one failing test does not fail those after it
            stop_actor(name)
