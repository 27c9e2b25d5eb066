"""Node types that an autoscaler could start: read from a file, to be registered as offers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from apothic.errors import InvalidOptionError

__all__ = ["OFFER_PREFIX", "NodeType", "read_node_types"]

OFFER_PREFIX = "offer:"
"""Begins the name of the custom resource by which nodes of one offer are asked for."""


class NodeType(BaseModel):
    """A kind of node that does not have to run yet.

    Attributes:
        name: as in the file.
        resources: what such a node will advertise: ``CPU``, ``memory`` in bytes, ``GPU``, and
            ``offer:<id>``.
        labels: the labels that it will have.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


def read_node_types(path: str | Path) -> list[NodeType]:
    """Read the offers among the ``available_node_types`` of a cluster-launcher file (``ray up``).

    Types without an ``offer:<id>`` resource, and those whose ``max_workers`` is 0, are left out: no
    demand reaches them.

    Raises:
        InvalidOptionError: when the file cannot be read, is no such file, holds no offer, or leaves out
            what has to be known before a node runs (``CPU`` and ``memory``).
    """
    content = _load(Path(path))
    types = content.get("available_node_types")
    if not isinstance(types, Mapping):
        raise InvalidOptionError(
            f"{path} has no available_node_types, so it is not a Ray cluster-launcher file. Give the "
            f"file that `ray up` takes."
        )
    found = []
    for name, entry in types.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("resources"), Mapping):
            raise InvalidOptionError(
                f"node type {name!r} in {path} has no resources. Write what its nodes have, as in "
                f"resources: {{CPU: 8, memory: 34359738368, 'offer:{name}': 1}}."
            )
        resources, labels = entry["resources"], entry.get("labels") or {}
        if not any(str(key).startswith(OFFER_PREFIX) for key in resources):
            continue
        if entry.get("max_workers") == 0:
            continue
        found.append(_node_type(str(name), resources, labels, path))
    if not found:
        raise InvalidOptionError(
            f"no node type in {path} is an offer. Give at least one a resource, as in "
            f"resources: {{'offer:my-gpus': 1}}, and labels that describe it (apothic.io/…)."
        )
    return found


def _load(path: Path) -> Mapping[str, Any]:
    # It comes with Ray; imported late, so that importing apothic stays light.
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidOptionError(
            f"{path} cannot be read: {error.strerror}. Give the file that `ray up` takes."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidOptionError(f"{path} is not valid YAML: {error}. Correct it.") from None
    return content if isinstance(content, Mapping) else {}


def _node_type(
    name: str, resources: Mapping[Any, Any], labels: Mapping[Any, Any], path: str | Path
) -> NodeType:
    for key in ("CPU", "memory"):
        if key not in resources:
            raise InvalidOptionError(
                f"node type {name!r} in {path} states no {key}: Ray fills it in when a node starts, "
                f"which is too late to decide on. Write it into its resources"
                f"{' (in bytes)' if key == 'memory' else ''}."
            )
    for key, amount in resources.items():
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0:
            raise InvalidOptionError(
                f"resource {key}={amount!r} of node type {name!r} in {path} is not valid: it takes a "
                f"number of at least 0. Correct it."
            )
    if not isinstance(labels, Mapping) or not all(isinstance(v, str) for v in labels.values()):
        raise InvalidOptionError(
            f"the labels of node type {name!r} in {path} are not valid: Ray takes texts only. Quote "
            f'the values, as in apothic.io/vram-gb: "80".'
        )
    return NodeType(
        name=name,
        resources={str(key): float(amount) for key, amount in resources.items()},
        labels={str(key): value for key, value in labels.items()},
    )
