"""The errors of the channel; the session says them in its own words."""

from __future__ import annotations

import os

from apothic.errors import ApothicError
from ray_backend.sandbox.agent.constants import Stage
from ray_backend.sandbox.protocol import Failed

__all__ = ["AgentRequestError", "ChannelClosedError"]


class AgentRequestError(ApothicError):
    """The agent could not do what it was asked; the channel goes on.

    Attributes:
        errno: Linux's number.
        stage: what of the request failed.
        exit_status: for an exec, what a shell gives: 127, 126, or None; see `Failed.exit_status`.
    """

    def __init__(self, failed: Failed) -> None:
        """Keep what the agent said."""
        super().__init__(f"{os.strerror(failed.errno)} (errno {failed.errno}, {failed.stage.name})")
        self.errno: int = failed.errno
        self.stage: Stage = failed.stage
        self.exit_status: int | None = failed.exit_status


class ChannelClosedError(ApothicError):
    """The channel to the agent is closed or broken; its ``__cause__`` says by what, if by an error."""
