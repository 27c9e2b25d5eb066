"""A client of the sandbox agent for an event loop: many execs and files at once over two pipes.

`AgentChannel` (``channel``) ties a `ByteLink` (``link``: the bytes below) to the codec
(`ray_backend.sandbox.protocol`) and hands its events to what is under way (``operations``). Nobody
who is slow holds up anybody else, as each stream has credit of its own; malformed input ends the
channel and fails all that is under way.
"""

from __future__ import annotations

from ray_backend.sandbox.channel.channel import AgentChannel
from ray_backend.sandbox.channel.errors import AgentRequestError, ChannelClosedError
from ray_backend.sandbox.channel.link import ByteLink, ByteSink
from ray_backend.sandbox.channel.operations import AgentProcess, AgentReader, AgentWriter

__all__ = [
    "AgentChannel",
    "AgentProcess",
    "AgentReader",
    "AgentRequestError",
    "AgentWriter",
    "ByteLink",
    "ByteSink",
    "ChannelClosedError",
]
