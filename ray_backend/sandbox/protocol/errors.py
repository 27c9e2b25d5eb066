"""The errors of the codec; the session tells its user of them as a lost session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apothic.errors import ApothicError

if TYPE_CHECKING:
    from ray_backend.sandbox.protocol.events import Event


class ProtocolError(ApothicError):
    """What came from the agent is no frame, or one that has no place here.

    Attributes:
        events: what the same bytes held before it.
    """

    def __init__(self, message: str) -> None:
        """Start with no events."""
        super().__init__(message)
        self.events: list[Event] = []


class AgentVersionError(ProtocolError):
    """The agent in the container speaks another version of the protocol."""
