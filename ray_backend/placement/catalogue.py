"""The offers that are registered: node types that the autoscaler could start, and has not yet."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from apothic.node_types import NodeType
from ray_backend.placement.offers import Offer
from ray_backend.registry import Registry

__all__ = ["Catalogue", "describe"]


def describe(node_type: NodeType) -> Offer:
    """Give the offer that a node type will be.

    Raises:
        InvalidOptionError: when it does not have exactly one ``offer:<id>`` resource.
    """
    return Offer.from_node_type(node_type.name, node_type.resources, node_type.labels)


class Catalogue:
    """The registered node types as offers; read again only when somebody has changed them."""

    def __init__(self, registry: Registry) -> None:
        """Read nothing yet."""
        self._registry = registry
        self._lock = threading.Lock()
        self._version: str | None = None
        self._offers: tuple[Offer, ...] = ()

    def offers(self) -> tuple[Offer, ...]:
        """Give them, in the order of their names; costs one look into the registry."""
        version = self._registry.node_types_version()
        with self._lock:
            if version != self._version:
                self._offers = tuple(describe(each) for each in self.node_types())
                self._version = version
            return self._offers

    def node_types(self) -> list[NodeType]:
        """Give them as they were registered."""
        found = [self._registry.get_node_type(name) for name in self._registry.list_node_types()]
        return [NodeType.model_validate_json(each) for each in found if each is not None]

    def register(self, node_types: Sequence[NodeType]) -> None:
        """Add node types; one of the same name is replaced.

        Raises:
            InvalidOptionError: when one of them does not have exactly one ``offer:<id>`` resource;
                then none is added.
        """
        for each in node_types:
            describe(each)
        for each in node_types:
            self._registry.put_node_type(each.name, each.model_dump_json())

    def unregister(self, name: str) -> bool:
        """Remove a node type; False when there is none of this name."""
        return self._registry.delete_node_type(name)
