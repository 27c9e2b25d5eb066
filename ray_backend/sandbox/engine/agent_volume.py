"""The agent on an engine: a volume that is filled once and mounted read-only everywhere.

It goes there through the engine's API, so that it works with an engine on another machine and when
this process is in a container itself. Who is first is settled by the engine: an empty volume, named
after the agent's digest, names the one that was filled first; creating a volume that exists gives the
existing one, labels and all. So nobody waits, and a creator killed on the way blocks nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import secrets
import tarfile

import docker.errors

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.faults import FaultPoint, no_fault
from ray_backend.sandbox.engine.helper import helper_container
from ray_backend.sandbox.engine.labels import AGENT, AGENT_VOLUME, OwnerLabels
from ray_backend.sandbox.engine.translate import is_conflict, translated

__all__ = [
    "AGENT_FILE",
    "ensure_agent",
    "find_unfinished_volumes",
    "remove_agent",
    "remove_volume",
]

AGENT_FILE = "agent"
"""Its name in the volume: ``/.apothic/agent`` in a container."""


def ensure_agent(
    engine: Engine, binary: bytes, owner: OwnerLabels, *, at: FaultPoint = no_fault
) -> str:
    """Give the name of the volume that holds the agent; fill one if there is none.

    About 3 ms when it is there, 100 ms when not.

    Args:
        engine: where.
        binary: the program, for the engine's architecture.
        owner: for whom; a volume that was not finished is swept with its things.
        at: called with ``agent-volume``, ``agent-filler``, ``agent-filled``, ``agent-elected``.

    Raises:
        SandboxEngineError: when the engine refuses, or gives back other bytes than it was given.
    """
    digest = hashlib.sha256(binary).hexdigest()
    for _ in range(3):  # again when someone prunes volumes in between
        found = _find(engine, digest)
        if found is not None:
            return found
        found = _fill(engine, binary, digest, owner, at)
        if found is not None:
            return found
    raise SandboxEngineError(
        "the volume with the sandbox agent vanished again and again while it was set up. Does "
        "something on this node prune Docker volumes all the time?"
    )


def find_unfinished_volumes(engine: Engine) -> list[tuple[str, OwnerLabels | None]]:
    """List volumes that were to hold an agent and were not elected, with their owners."""
    with translated("list volumes"):
        volumes = engine.api.volumes(filters={"label": AGENT})["Volumes"] or []
    labels = {volume["Name"]: volume["Labels"] or {} for volume in volumes}
    elected = {found[AGENT_VOLUME] for found in labels.values() if AGENT_VOLUME in found}
    return [
        (name, OwnerLabels.from_labels(found))
        for name, found in labels.items()
        if AGENT_VOLUME not in found and name not in elected
    ]


def remove_volume(engine: Engine, name: str) -> bool:
    """Remove a volume; False when there is none, or a container uses it."""
    with translated(f"remove the volume {name!r}"):
        try:
            engine.api.remove_volume(name)
        except docker.errors.NotFound:
            return False
        except docker.errors.APIError as error:
            if is_conflict(error):
                return False
            raise
    return True


def remove_agent(engine: Engine, binary: bytes) -> None:
    """Remove an agent's volumes; those that a container uses stay."""
    digest = hashlib.sha256(binary).hexdigest()
    with translated("list volumes"):
        volumes = engine.api.volumes(filters={"label": f"{AGENT}={digest}"})["Volumes"] or []
    for volume in sorted(volumes, key=lambda one: AGENT_VOLUME not in one["Labels"]):
        remove_volume(engine, volume["Name"])


def _find(engine: Engine, digest: str) -> str | None:
    marker = _volume_labels(engine, _marker(digest))
    if marker is None:
        return None
    name = marker.get(AGENT_VOLUME, "")
    if marker.get(AGENT) != digest or not name:
        raise SandboxEngineError(
            f"volume {_marker(digest)!r} is not what it should be: its labels are {marker}. Remove "
            f"it on the node: docker volume rm {_marker(digest)}"
        )
    labels = _volume_labels(engine, name)
    if labels is None or labels.get(AGENT) != digest:
        remove_volume(engine, _marker(digest))
        return None
    return name


def _fill(
    engine: Engine, binary: bytes, digest: str, owner: OwnerLabels, at: FaultPoint
) -> str | None:
    name = f"{_marker(digest)}-{secrets.token_hex(6)}"
    elected = None
    try:
        with translated("create a volume for the agent"):
            engine.api.create_volume(name, labels={**owner.as_labels(), AGENT: digest})
        at("agent-volume")
        mount = {"Type": "volume", "Source": name, "Target": "/agent"}
        with helper_container(engine, owner, {"HostConfig": {"Mounts": [mount]}}) as helper:
            at("agent-filler")
            with translated("store the agent"):
                engine.api.put_archive(helper, "/agent", _archive(binary))
                stream, _ = engine.api.get_archive(helper, f"/agent/{AGENT_FILE}")
                stored = _read_archive(b"".join(stream))
            if stored != binary:
                raise SandboxEngineError(
                    "the Docker engine gave the sandbox agent back other than it was given. Check "
                    "the node's disk."
                )
            at("agent-filled")
            with translated("name the agent's volume"):
                engine.api.create_volume(
                    _marker(digest), labels={AGENT: digest, AGENT_VOLUME: name}
                )
            at("agent-elected")
            elected = _find(engine, digest)
    finally:
        if elected != name and _find_quietly(engine, digest) != name:
            remove_volume(engine, name)
    return elected


def _find_quietly(engine: Engine, digest: str) -> str | None:
    with contextlib.suppress(SandboxEngineError):
        return _find(engine, digest)
    return None


def _marker(digest: str) -> str:
    return f"apothic-agent-{digest[:24]}"


def _volume_labels(engine: Engine, name: str) -> dict[str, str] | None:
    with translated(f"inspect the volume {name!r}"):
        try:
            return engine.api.inspect_volume(name)["Labels"] or {}
        except docker.errors.NotFound:
            return None


def _archive(binary: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(AGENT_FILE)
        member.size, member.mode = len(binary), 0o555
        archive.addfile(member, io.BytesIO(binary))
    return buffer.getvalue()


def _read_archive(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        file = archive.extractfile(archive.getmembers()[0])
        return b"" if file is None else file.read()
