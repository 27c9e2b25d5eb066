"""Counting what sessions have left: on the engine, on the cluster, in its registry, as processes."""

from __future__ import annotations

import os

from apothic.backend import connect
from ray_backend.manager import instance_names
from ray_backend.registry import Registry
from ray_backend.sandbox.engine.agent_volume import find_unfinished_volumes
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import BUILD, BUILD_UNFINISHED
from ray_backend.sandbox.engine.link import abandoned_links
from tests.docker.support import left_of
from tests.support import RUN_VARIABLE, eventually, processes_of_run


def left_by_sessions(engine: Engine) -> list[str]:
    """Name all that is left of the sessions of the cluster that this process is connected to."""
    registry = Registry()
    actors = processes_of_run(RUN_VARIABLE, os.environ[RUN_VARIABLE])
    seats = registry.list_seats()
    return [
        *left_of_sessions(engine, connect().cluster_id),
        *instance_names(),
        *(f"lease of {name}" for name in registry.list_leases()),
        *(f"seat of {name}" for names in seats.values() for name in names),
        *(f"arguments: {key}" for key in registry.list_blobs() if key.startswith("arguments/")),
        *(f"start of {name}" for name in registry._list("start/")),
        *(f"process {pid}: {line}" for pid, line in actors.items() if "SandboxActor" in line),
        *left_of_builds(engine),
        *(f"link {path}" for path in abandoned_links()),
    ]


def see_nothing_left(engine: Engine, but: str = "-") -> None:
    """Wait until nothing is left of them, what begins with ``but`` set aside."""

    def left() -> list[str]:
        return [each for each in left_by_sessions(engine) if not each.startswith(but)]

    try:
        eventually(lambda: not left())
    except AssertionError:
        raise AssertionError(left()) from None


def left_of_sessions(engine: Engine, cluster: str) -> list[str]:
    """Name what a cluster's sessions have left on an engine.

    The volume that holds the agent is the whole engine's, whoever was the first to need it; another
    run may have removed it meanwhile.
    """
    unfinished = {name for name, _ in find_unfinished_volumes(engine)}
    return [
        name
        for name in left_of(engine, cluster)
        if not name.startswith("apothic-agent-") or name in unfinished
    ]


def left_of_builds(engine: Engine) -> list[str]:
    """Name the containers and untagged images that builds have left."""
    wanted = {"label": f"{BUILD}={BUILD_UNFINISHED}", "dangling": True}
    return [
        *(f"build {one.name}" for one in engine.list_containers({BUILD: BUILD_UNFINISHED})),
        *(f"image {one['Id'][:19]}" for one in engine.api.images(filters=wanted)),
    ]
