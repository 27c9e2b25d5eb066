"""The agent protocol, without any I/O: requests become bytes, bytes become events.

One `AgentConnection` stands for one client of one agent (``agent/wire.h`` is its other half, the
numbers of both are in `ray_backend.sandbox.agent.constants`). A frame is::

    body length u32 | stream id u32 | type u8 | body | trailer u8        little-endian

A hello and its answer are preceded by a magic. Whatever either side says before them is skipped:
a new client may attach in the middle of a frame that its predecessor began, so with ``resync`` it
first sends padding that completes any such frame, without the trailer, so that the agent throws it
away. It knows the agent's answer by a random nonce.

**Streams.** Each request opens a stream; its id is greater than every one before. Frames of the
client, and what their bodies hold after the fixed fields shown:

====================  ===========================================================================
EXEC                  flags u32, credit u32 for stdout and for stderr, argc u32, envc u32, then
                      NUL-terminated: cwd, user, argv, env
READ                  credit u32, offset u64, length u64, path
LIST, STAT, REMOVE    credit u32 (LIST) or flags u32, path
WRITE                 flags u32, mode u32, offset u64, expected length u64, path
MKDIR                 flags u32, mode u32, path
RENAME                flags u32, length of the new name u16, new name, old name
GET_BLOB, ENVIRON     credit u32
SET_BLOB              the blob
PART                  the beginning of an EXEC or SET_BLOB that is longer than a frame; nothing
                      else may come between the parts
DATA, END             input of an EXEC or contents of a WRITE; no more of it
CREDIT                channel u8, u32: so many bytes more may come on this channel
KILL                  grace in ms u32, flags u8
SIGNAL                number u8, sent to the leader's process group
CANCEL                end a READ, LIST or WRITE
====================  ===========================================================================

and of the agent:

====================  ===========================================================================
WELCOME               version u16, nonce, capabilities u32, input window u32
STARTED               process id u32, if the EXEC's flags ask for it
OUTPUT                channel u8, bytes; of a LIST: type u8, length u16, name, and so on
GRANT                 u32: so many bytes more may be sent on this stream
EXIT                  flags u8, exit status or signal u8, duration in ns u64: the end of an EXEC
KILLED                u32: so many kills are answered, nothing of the exec is alive
OPENED                stat of the file of a READ
DONE                  the end of all but an EXEC, for STAT and WRITE with a stat (mode, uid, gid,
                      nlink u32, size u64, mtime in ns i64, inode, device u64; after it, for a
                      link that was not followed, its target)
ERROR                 errno u32, stage u8: the end of a request that failed
FATAL                 text: the agent could not understand us and has dropped every stream
====================  ===========================================================================

Frames for a stream that has just ended are late, not wrong, and ignored.

**Credit.** Nobody sends what the other has not asked for: output comes as far as its channel's
credit goes, each stream and channel for itself; input is sent as far as the stream's window goes.

**Trust.** Everything that comes from the container is treated as hostile. What is not exactly as
above raises `ProtocolError`, after which the connection is unusable; it never holds more than one
frame.
"""

from __future__ import annotations

from ray_backend.sandbox.protocol.connection import AgentConnection
from ray_backend.sandbox.protocol.errors import AgentVersionError, ProtocolError
from ray_backend.sandbox.protocol.events import (
    Done,
    Entry,
    Event,
    Exited,
    Failed,
    FileStat,
    Granted,
    Killed,
    Listed,
    Opened,
    Output,
    Started,
    Welcome,
)
from ray_backend.sandbox.protocol.frames import FrameReader, encode_frame

__all__ = [
    "AgentConnection",
    "AgentVersionError",
    "Done",
    "Entry",
    "Event",
    "Exited",
    "Failed",
    "FileStat",
    "FrameReader",
    "Granted",
    "Killed",
    "Listed",
    "Opened",
    "Output",
    "ProtocolError",
    "Started",
    "Welcome",
    "encode_frame",
]
