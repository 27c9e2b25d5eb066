"""Names that client, manager and workers agree on; light, since every worker imports it."""

from __future__ import annotations

__all__ = ["MANAGER_NAME", "NAMESPACE", "PROTOCOL_VERSION", "SESSION_MARK", "is_session_name"]

NAMESPACE = "apothic"
"""The Ray namespace of all our actors: jobs have an anonymous one each and would not meet."""

PROTOCOL_VERSION = 1
"""Of the manager and what lies in the registry; two may live on a cluster side by side."""

MANAGER_NAME = f"apothic-manager-v{PROTOCOL_VERSION}"

SESSION_MARK = "~"
"""Before a sandbox's name in the names of its sessions' actors; no class is named with it."""


def is_session_name(name: str) -> bool:
    """Tell whether an actor of this name is a sandbox's session."""
    return name.partition(":")[2].startswith(SESSION_MARK)
