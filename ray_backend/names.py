"""Names that client, manager and workers agree on; light, since every worker imports it."""

from __future__ import annotations

__all__ = ["MANAGER_NAME", "NAMESPACE", "PROTOCOL_VERSION", "SESSION_MARK", "is_session_name"]

PROTOCOL_VERSION = 1
"""Of what client, manager and workers say to one another, and of what lies in the registry.

To be raised with every change that would mislead a process of the release before. Releases of different
versions share a cluster side by side and do not see each other.
"""

NAMESPACE = f"apothic-v{PROTOCOL_VERSION}"
"""Where all that is ours lies: the Ray namespace of our actors, since jobs have an anonymous one each
and would not meet; that of the registry; and that in the labels of containers."""

MANAGER_NAME = f"apothic-manager-v{PROTOCOL_VERSION}"

SESSION_MARK = "~"
"""Before a sandbox's name in the names of its sessions' actors; no class is named with it."""


def is_session_name(name: str) -> bool:
    """Tell whether an actor of this name is a sandbox's session."""
    return name.partition(":")[2].startswith(SESSION_MARK)
