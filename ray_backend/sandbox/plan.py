"""`SandboxPlan`: what a session's actor must know, as a value; it holds no secret."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from apothic.digests import digest_of
from apothic.volume import StorageMount
from ray_backend.dockerfile import base_reference
from ray_backend.registry import Registry

if TYPE_CHECKING:
    from apothic.image import Image
    from apothic.values import SandboxSpec

__all__ = ["ACK_EVERY", "AHEAD", "SandboxPlan", "SessionOptions", "Unsettled"]

AHEAD = 8
"""Items, of at most 4 MiB, that a stream may be ahead of its consumer."""

ACK_EVERY = 4
"""Items after which the consumer confirms."""


class SessionOptions(NamedTuple):
    """What a session heeds of a definition's options, under their names."""

    cpu: float
    memory_mb: int
    disk_gb: float | None
    concurrent_requests: int
    secrets: tuple[str, ...]
    mounts: tuple[StorageMount, ...]


class Unsettled(NamedTuple):
    """A session that is to be made again: on the node that it got its room on, or on another.

    Attributes:
        plan: of the session.
        node_id: the node.
        no_engine: why it is not to be there: that node has no Docker engine. Else None.
    """

    plan: SandboxPlan
    node_id: str
    no_engine: str | None = None


@dataclass(frozen=True)
class SandboxPlan:
    """One session.

    Attributes:
        actor_name: of its actor; unique on the cluster.
        cluster_id: the cluster.
        sandbox_id: the session's id within its definition.
        named: it lives until closed, and outlives its actor's process.
        spec_json: the definition, a `SandboxSpec`.
        cwd: its first working directory.
        env: its own first variables, a pickled mapping, as users put tokens there; None where they
            are many: they are then in the registry.
        arguments_digest: equal for equal ``cwd`` and ``env``.
        settled: the actor can only be on one node, so that each process of it finds the container.
    """

    actor_name: str
    cluster_id: str
    sandbox_id: str
    named: bool
    spec_json: str
    cwd: bytes
    env: bytes | None = field(repr=False)
    arguments_digest: str
    settled: bool = False

    @property
    def may_open(self) -> bool:
        """Whether its actor opens the container; one that is not settled is made again first."""
        return self.settled or not self.named

    @property
    def spec(self) -> SandboxSpec:
        """The definition."""
        # The models take a tenth of a second to build, on every session's way if they were imported.
        from apothic.values import SandboxSpec

        return SandboxSpec.model_validate_json(self.spec_json)

    @property
    def app(self) -> str:
        """The definition's app."""
        return str(self._definition["app"])

    @property
    def sandbox(self) -> str:
        """The definition's name."""
        return str(self._definition["name"])

    @property
    def network(self) -> str:
        """``none`` or ``internet``."""
        return str(self._definition["network"])

    @property
    def spec_digest(self) -> str:
        """The definition's digest."""
        return digest_of(self._definition)

    @functools.cached_property
    def options(self) -> SessionOptions:
        """What a session heeds of the options, which were checked where they were written."""
        found = self._definition["options"]
        return SessionOptions(
            cpu=found["cpu"],
            memory_mb=found["memory_mb"],
            disk_gb=found["constraints"]["disk_gb"],
            concurrent_requests=found["concurrent_requests"],
            secrets=tuple(found["secrets"]),
            mounts=tuple(
                StorageMount(
                    mount["volume"],
                    mount["backend"],
                    mount["size_gb"],
                    mount["path"],
                    mount["create_if_missing"],
                )
                for mount in found["mounts"]
            ),
        )

    @property
    def image(self) -> str | Image:
        """The reference of an image that is used as it is, or a recipe with steps."""
        found = self._definition["options"]["image"] or {}
        if not found.get("steps"):
            return base_reference(found.get("base"), found.get("python_version"))
        from apothic.image import Image  # see `spec`

        return Image.model_validate(found)

    @functools.cached_property
    def _definition(self) -> Mapping[str, Any]:
        definition: Mapping[str, Any] = json.loads(self.spec_json)
        return definition

    @property
    def label(self) -> str:
        """Name the session in messages."""
        return f"{self.app}.{self.sandbox} {self.sandbox_id!r}"

    @property
    def container_name(self) -> str:
        """Name its container: the same for every process of its actor."""
        digest = hashlib.sha256(f"{self.cluster_id}\0{self.actor_name}".encode()).hexdigest()
        return f"apothic-{digest[:32]}"

    def variables(self, fetch: Callable[[str], bytes]) -> Mapping[bytes, bytes | None]:
        """Give ``env`` as it was asked for; ``fetch`` gives what the registry has of a key."""
        env = self.env
        if env is None:
            env = fetch(Registry.arguments_key(self.actor_name, self.arguments_digest))
        found: Mapping[bytes, bytes | None] = pickle.loads(env)
        return found
