"""From the kernel's error numbers to typed errors with the path."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from apothic.errors import (
    SandboxError,
    SandboxFileError,
    SandboxFileExistsError,
    SandboxFileNotFoundError,
    SandboxIsADirectoryError,
    SandboxNoSpaceError,
    SandboxNotADirectoryError,
    SandboxPermissionError,
)

__all__ = ["file_error", "shown", "typed"]

_FILE_ERRORS: Mapping[int, type[SandboxFileError]] = {
    errno.ENOENT: SandboxFileNotFoundError,
    errno.EEXIST: SandboxFileExistsError,
    errno.EISDIR: SandboxIsADirectoryError,
    errno.ENOTDIR: SandboxNotADirectoryError,
    errno.EACCES: SandboxPermissionError,
    errno.EPERM: SandboxPermissionError,
    errno.EROFS: SandboxPermissionError,
    errno.ENOSPC: SandboxNoSpaceError,
    errno.EDQUOT: SandboxNoSpaceError,
}


def file_error(number: int, path: bytes, *, writing: bool = False) -> SandboxFileError:
    """Give the typed error for an errno at a path."""
    remedy = ""
    if number == errno.ENOENT and writing:
        remedy = " Its directory is missing: make_parents=True makes it."
    elif number == errno.EOPNOTSUPP:
        remedy = " Only regular files and devices can be read and written; use exec for the others."
    text = f"{shown(path)}: {os.strerror(number)}.{remedy}"
    kind = _FILE_ERRORS.get(number, SandboxFileError)
    return kind(text, number, path.decode("utf-8", "surrogateescape"))


@contextmanager
def typed(path: bytes, *, writing: bool = False) -> Iterator[None]:
    """Have plain errors of the kernel come as ours, with the path."""
    try:
        yield
    except SandboxError:
        raise
    except OSError as error:
        raise file_error(error.errno or errno.EIO, path, writing=writing) from None


def shown(value: bytes) -> str:
    """Give what the kernel sees as a message shows it."""
    return repr(value.decode("utf-8", "backslashreplace"))
