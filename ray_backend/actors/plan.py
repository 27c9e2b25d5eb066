"""`InstancePlan`: what an instance is made of."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

__all__ = ["InstancePlan"]


@dataclass(frozen=True)
class InstancePlan:
    """What an instance is made of, in plain values, as it travels to the actor.

    Attributes:
        arguments: the constructor's, packed; None where they are large: they are then in the registry.
        keeps_revival: the actor itself stores what it takes to make it again on another node.
    """

    app: str
    cls: str
    instance_id: str
    actor_name: str
    named: bool
    spec_digest: str
    blob_digest: str
    methods: tuple[tuple[str, str], ...]
    enter_hooks: tuple[str, ...]
    exit_hooks: tuple[str, ...]
    arguments: bytes | None
    arguments_digest: str
    timeout_s: float
    concurrency: int
    secrets: tuple[str, ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None
    keeps_revival: bool = False

    def revival(self, spec_json: str) -> bytes:
        """Write down what it takes to make the instance again; ``spec_json`` is its class's."""
        return pickle.dumps((self, spec_json))

    @property
    def label(self) -> str:
        """Name the instance in messages."""
        return f"{self.app}.{self.cls} {self.instance_id!r}"

    def lost_to_timeout(self, timeout_s: float, method: str = "the call") -> str:
        """Say that a call could only be ended together with its process."""
        return (
            f"{self.label}: {method} ran longer than its timeout_s={timeout_s:g} and could not be "
            f"interrupted, as it was in native code. Its process was replaced: what the instance "
            f"held in memory is lost. Raise timeout_s, or make the code interruptible."
        )

    @property
    def is_async(self) -> bool:
        """Whether a method needs an event loop."""
        return any(kind.startswith("async") for _, kind in self.methods)
