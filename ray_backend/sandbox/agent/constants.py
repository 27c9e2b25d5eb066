"""The numbers of the agent protocol: the one source for Python and for C.

``constants.h`` is made from this module and lies beside it, so that the C compiles without Python;
``python -m ray_backend.sandbox.agent.constants`` writes it anew, and a test fails when they differ.
What the frames mean and hold is described in `ray_backend.sandbox.protocol`.
"""

from __future__ import annotations

import enum
from pathlib import Path

PROTOCOL_VERSION = 1

MAGIC = b"\xabApothic"
"""Precedes a hello and its answer. Its first byte occurs once in it and never in padding."""
NONCE_BYTES = 16

FRAME_HEADER_BYTES = 9
"""Body length (u32), stream id (u32), frame type (u8); all integers are little-endian."""
FRAME_TRAILER = 0x5A
"""Ends every frame: a frame that a dead client began and padding completed lacks it."""
FRAME_TRAILER_BYTES = 1
FRAME_BODY_MAX = 128 * 1024
REQUEST_MAX = 8 * 1024 * 1024
"""A request longer than a frame comes in parts; the kernel takes 6 MiB of argv and environment."""
PATH_MAX_BYTES = 4095
BLOB_MAX = 1024 * 1024
STREAMS_MAX = 256
KEEPERS_MAX = 1024
INPUT_WINDOW = 256 * 1024
"""Bytes that a client may send on a new stream before the agent grants more."""
LENGTH_UNKNOWN = 2**64 - 1
STAT_BYTES = 48
EXEC_HEAD_BYTES = 20


class FrameType(enum.IntEnum):
    """What a frame is; those with the high bit come from the agent."""

    HELLO = 0x01
    PART = 0x02
    EXEC = 0x03
    KILL = 0x04
    SIGNAL = 0x05
    DATA = 0x06
    END = 0x07
    CREDIT = 0x08
    CANCEL = 0x09
    STAT = 0x10
    LIST = 0x11
    READ = 0x12
    WRITE = 0x13
    MKDIR = 0x14
    REMOVE = 0x15
    RENAME = 0x16
    GET_BLOB = 0x17
    SET_BLOB = 0x18
    ENVIRON = 0x19
    WELCOME = 0x81
    STARTED = 0x82
    OUTPUT = 0x83
    EXIT = 0x84
    KILLED = 0x85
    OPENED = 0x86
    DONE = 0x87
    ERROR = 0x88
    GRANT = 0x89
    FATAL = 0x8A


class Channel(enum.IntEnum):
    """Which output of a stream: file contents and listings use the first."""

    STDOUT = 1
    STDERR = 2


class Capability(enum.IntFlag):
    """What an agent found it can do where it runs."""

    INIT = 1
    SWITCH_USER = 2


class ExecFlag(enum.IntFlag):
    """How an exec starts."""

    STDIN = 1
    TELL_START = 2


class KillFlag(enum.IntFlag):
    """How a kill goes."""

    DISCARD_OUTPUT = 1


class WriteFlag(enum.IntFlag):
    """How a file is written."""

    APPEND = 1
    MAKE_PARENTS = 2
    KEEP_REST = 4
    EXCLUSIVE = 8
    REPLACE = 16


class MkdirFlag(enum.IntFlag):
    """How a directory is made."""

    PARENTS = 1
    EXIST_OK = 2


class RemoveFlag(enum.IntFlag):
    """What is removed."""

    DIRECTORY = 1


class RenameFlag(enum.IntFlag):
    """How a name is replaced."""

    NO_REPLACE = 1


class StatFlag(enum.IntFlag):
    """What is looked at."""

    NO_FOLLOW = 1


class ExitFlag(enum.IntFlag):
    """How an exec's leader ended, and what it left."""

    SIGNALED = 1
    CORE = 2
    LEFT_BEHIND = 4
    LOST = 8
    OUT_OF_MEMORY = 16


class Stage(enum.IntEnum):
    """Where a request failed."""

    REQUEST = 0
    START = 1
    USER = 2
    CWD = 3
    PROGRAM = 4
    INTERPRETER = 5


_NUMBERS = (
    "PROTOCOL_VERSION",
    "NONCE_BYTES",
    "FRAME_HEADER_BYTES",
    "FRAME_TRAILER",
    "FRAME_TRAILER_BYTES",
    "FRAME_BODY_MAX",
    "REQUEST_MAX",
    "PATH_MAX_BYTES",
    "BLOB_MAX",
    "STREAMS_MAX",
    "KEEPERS_MAX",
    "INPUT_WINDOW",
    "LENGTH_UNKNOWN",
    "STAT_BYTES",
    "EXEC_HEAD_BYTES",
)

_ENUMS: tuple[tuple[str, type[enum.IntEnum] | type[enum.IntFlag]], ...] = (
    ("FRAME", FrameType),
    ("CHANNEL", Channel),
    ("CAPABILITY", Capability),
    ("EXEC", ExecFlag),
    ("KILL", KillFlag),
    ("WRITE", WriteFlag),
    ("MKDIR", MkdirFlag),
    ("REMOVE", RemoveFlag),
    ("RENAME", RenameFlag),
    ("STAT", StatFlag),
    ("EXIT", ExitFlag),
    ("STAGE", Stage),
)

HEADER = Path(__file__).with_name("constants.h")


def header_text() -> str:
    """Give the text of ``constants.h``."""
    lines = [
        "/* Made from constants.py; write it anew with",
        "   python -m ray_backend.sandbox.agent.constants */",
        "#ifndef APOTHIC_CONSTANTS_H",
        "#define APOTHIC_CONSTANTS_H",
        "",
        f"#define MAGIC_BYTES {len(MAGIC)}",
        "#define MAGIC_VALUES " + ", ".join(f"0x{byte:02x}" for byte in MAGIC),
    ]
    for name in _NUMBERS:
        value: int = globals()[name]
        lines.append(f"#define {name} {value}{'ULL' if value >= 2**63 else ''}")
    for prefix, members in _ENUMS:
        lines += ["", "enum {"]
        lines += [f"    {prefix}_{name} = {int(m)}," for name, m in members.__members__.items()]
        lines.append("};")
    return "\n".join([*lines, "", "#endif", ""])


if __name__ == "__main__":
    HEADER.write_text(header_text(), encoding="ascii")
