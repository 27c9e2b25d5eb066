"""`SandboxPlan`: what a session's actor must know, as a value; it holds no secret."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field

from apothic.options import ClassOptions
from apothic.values import SandboxSpec

__all__ = ["SandboxPlan"]


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
        env: its own first variables, a pickled mapping; users put tokens there.
        arguments_digest: equal for equal ``cwd`` and ``env``.
        blocked: IPv4 addresses that ``network="internet"`` must not reach: the cluster's nodes.
    """

    actor_name: str
    cluster_id: str
    sandbox_id: str
    named: bool
    spec_json: str
    cwd: bytes
    env: bytes = field(repr=False)
    arguments_digest: str
    blocked: tuple[str, ...] = ()

    @functools.cached_property
    def spec(self) -> SandboxSpec:
        """The definition."""
        return SandboxSpec.model_validate_json(self.spec_json)

    @functools.cached_property
    def options(self) -> ClassOptions:
        """Its checked options."""
        return ClassOptions.model_validate(self.spec.options)

    @property
    def label(self) -> str:
        """Name the session in messages."""
        return f"{self.spec.app}.{self.spec.name} {self.sandbox_id!r}"

    @property
    def container_name(self) -> str:
        """Name its container: the same for every process of its actor."""
        digest = hashlib.sha256(f"{self.cluster_id}\0{self.actor_name}".encode()).hexdigest()
        return f"apothic-{digest[:32]}"

    def variables(self) -> Mapping[bytes, bytes | None]:
        """Give ``env`` as it was asked for."""
        found: Mapping[bytes, bytes | None] = pickle.loads(self.env)
        return found
