"""`SandboxPlan`: what a session's actor must know, as a value; it holds no secret."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from apothic.options import ClassOptions
from apothic.values import SandboxSpec
from ray_backend.registry import Registry

__all__ = ["ACK_EVERY", "AHEAD", "SandboxPlan", "Unsettled"]

AHEAD = 8
"""Items, of at most 1 MiB, that a stream may be ahead of its consumer."""

ACK_EVERY = 4
"""Items after which the consumer confirms."""


class Unsettled(NamedTuple):
    """A session that is to be made again on the node that it got its room on.

    Attributes:
        plan: of the session.
        node_id: the node.
    """

    plan: SandboxPlan
    node_id: str


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
        blocked: IPv4 addresses that ``network="internet"`` must not reach: the cluster's nodes.
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
    blocked: tuple[str, ...] = ()
    settled: bool = False

    @property
    def may_open(self) -> bool:
        """Whether its actor opens the container; one that is not settled is made again first."""
        return self.settled or not self.named

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

    def variables(self, fetch: Callable[[str], bytes]) -> Mapping[bytes, bytes | None]:
        """Give ``env`` as it was asked for; ``fetch`` gives what the registry has of a key."""
        env = self.env if self.env is not None else fetch(Registry.arguments_key(self.actor_name))
        found: Mapping[bytes, bytes | None] = pickle.loads(env)
        return found
