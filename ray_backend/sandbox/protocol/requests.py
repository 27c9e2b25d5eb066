"""Requests as bytes: the bodies of the frames that open a stream, or speak to one.

Each function gives a body and raises ValueError for what cannot be said.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from ray_backend.sandbox.agent.constants import (
    LENGTH_UNKNOWN,
    PATH_MAX_BYTES,
    Channel,
    KillFlag,
    MkdirFlag,
    RemoveFlag,
    RenameFlag,
    StatFlag,
    WriteFlag,
)

U32 = struct.Struct("<I")
EXEC_HEAD = struct.Struct("<IIIII")
_READ_HEAD = struct.Struct("<IQQ")
_WRITE_HEAD = struct.Struct("<IIQQ")
_FLAGS_MODE = struct.Struct("<II")
_RENAME_HEAD = struct.Struct("<IH")
_CREDIT = struct.Struct("<BI")
_KILL = struct.Struct("<IB")
_U32_MAX = 2**32 - 1
_OFFSET_MAX = 2**63 - 1


def exec_body(
    flags: int,
    credit: tuple[int, int],
    cwd: bytes,
    user: bytes,
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
) -> bytes:
    """Give the body of EXEC; ``flags`` are of `ExecFlag`."""
    if not argv:
        raise ValueError("argv needs at least the program")
    if not cwd.startswith(b"/"):
        raise ValueError(f"cwd must be absolute, not {cwd!r}")
    for name in env:
        if not name or b"=" in name:
            raise ValueError(f"an environment variable cannot be called {name!r}")
    strings = [cwd, user, *argv, *map(b"=".join, env.items())]
    joined = b"\0".join(strings)
    if joined.count(b"\0") != len(strings) - 1:
        raise ValueError("arguments, environment, cwd and user cannot hold a NUL byte")
    head = EXEC_HEAD.pack(flags, *map(_u32, credit), len(argv), len(env))
    return head + joined + b"\0"


def read_body(path: bytes, credit: int, offset: int, length: int | None) -> bytes:
    """Give the body of READ."""
    return _READ_HEAD.pack(_u32(credit), _offset(offset), _length(length)) + _path(path)


def write_body(path: bytes, flags: WriteFlag, mode: int, offset: int, length: int | None) -> bytes:
    """Give the body of WRITE."""
    if WriteFlag.REPLACE in flags and (offset or flags & _NEVER_WITH_REPLACE):
        raise ValueError("a file that is replaced is written from its start, to its end")
    return _WRITE_HEAD.pack(flags, _u32(mode), _offset(offset), _length(length)) + _path(path)


_NEVER_WITH_REPLACE = WriteFlag.APPEND | WriteFlag.KEEP_REST | WriteFlag.EXCLUSIVE


def stat_body(path: bytes, flags: StatFlag) -> bytes:
    """Give the body of STAT."""
    return U32.pack(flags) + _path(path)


def list_body(path: bytes, credit: int) -> bytes:
    """Give the body of LIST."""
    return U32.pack(_u32(credit)) + _path(path)


def mkdir_body(path: bytes, flags: MkdirFlag, mode: int) -> bytes:
    """Give the body of MKDIR."""
    return _FLAGS_MODE.pack(flags, _u32(mode)) + _path(path)


def remove_body(path: bytes, flags: RemoveFlag) -> bytes:
    """Give the body of REMOVE."""
    return U32.pack(flags) + _path(path)


def rename_body(old: bytes, new: bytes, flags: RenameFlag) -> bytes:
    """Give the body of RENAME."""
    return _RENAME_HEAD.pack(flags, len(_path(new))) + new + _path(old)


def credit_only_body(credit: int) -> bytes:
    """Give the body of GET_BLOB and ENVIRON."""
    return U32.pack(_u32(credit))


def more_credit_body(channel: Channel, amount: int) -> bytes:
    """Give the body of CREDIT."""
    return _CREDIT.pack(channel, _u32(amount))


def kill_body(grace_ms: int, flags: KillFlag) -> bytes:
    """Give the body of KILL."""
    return _KILL.pack(_u32(grace_ms), flags)


def _u32(number: int) -> int:
    if not 0 <= number <= _U32_MAX:
        raise ValueError(f"a credit, mode or time is 0 to {_U32_MAX}, not {number}")
    return number


def _offset(number: int) -> int:
    if not 0 <= number <= _OFFSET_MAX:
        raise ValueError(f"an offset or length is 0 to {_OFFSET_MAX}, not {number}")
    return number


def _length(length: int | None) -> int:
    return LENGTH_UNKNOWN if length is None else _offset(length)


def _path(path: bytes) -> bytes:
    if not path.startswith(b"/"):
        raise ValueError(f"a path must be absolute, not {path!r}")
    if b"\0" in path:
        raise ValueError(f"a path cannot hold a NUL byte: {path!r}")
    if len(path) > PATH_MAX_BYTES:
        raise ValueError(f"a path has at most {PATH_MAX_BYTES} bytes, not {len(path)}")
    return path
