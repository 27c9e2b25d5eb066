"""Files of this machine as a workspace has them; each step on a thread, since disks take their time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable
from typing import TypeVar

from typing_extensions import override

from apothic.twins import in_thread
from apothic.workspace import FileReader, FileWriter

__all__ = ["LocalReader", "LocalWriter", "finished"]

_T = TypeVar("_T")
# Without O_NONBLOCK, opening a pipe would wait for its other end.
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_NO_RESERVATION = (
    errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV,
    errno.EBADF,  # glibc's, which would write there: not to what is open for appending
)  # fmt: skip
_STEP_BYTES = 1024 * 1024  # between two of them an abort is heard


async def finished(call: Callable[[], _T], undo: Callable[[_T], object] | None = None) -> _T:
    """Run a blocking call on a thread; when cancelled, wait for its end, so that nothing goes on.

    ``undo`` takes a result that came after that, so that nobody has it.
    """
    running = asyncio.ensure_future(in_thread(call))

    def discard(done: asyncio.Future[_T]) -> None:
        if undo is not None and not done.cancelled() and done.exception() is None:
            undo(done.result())

    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        running.add_done_callback(discard)
        with contextlib.suppress(Exception):
            await asyncio.shield(running)
        raise


class LocalReader(FileReader):
    """An open file of this machine."""

    def __init__(self, path: bytes) -> None:
        """Open it."""
        self._fd = _open(path, os.O_RDONLY)

    @override
    async def read(self, limit: int) -> bytes:
        return await finished(lambda: os.read(self._fd, limit))

    @override
    async def size(self) -> int:
        return os.fstat(self._fd).st_size

    @override
    async def close(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Do what `close` does, at once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LocalWriter(FileWriter):
    """A file of this machine that is being written, in place if it existed."""

    def __init__(self, path: bytes, *, append: bool, make_parents: bool, size: int | None) -> None:
        """Open it, and reserve the space."""
        if make_parents:
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            except FileExistsError:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        self._path = path
        self._append = append
        self._lock = threading.Lock()  # a descriptor that is in use must not become another file's
        self._aborted = False
        flags = os.O_WRONLY | (os.O_APPEND if append else 0)
        self._fd, self._is_new = _open_or_create(path, flags)
        found = os.fstat(self._fd)
        self._regular = stat.S_ISREG(found.st_mode)
        self._identity = (found.st_dev, found.st_ino)
        self._old_size = found.st_size
        try:
            if self._regular and size:
                _reserve(self._fd, found.st_size, size, append=append)
        except BaseException:
            self.drop()
            raise

    @override
    async def write(self, data: bytes | memoryview) -> None:
        await finished(lambda: self._write(data))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._lock:
            while view:
                if self._aborted:
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                view = view[os.write(self._fd, view[:_STEP_BYTES]) :]

    @override
    async def finish(self) -> None:
        await finished(self._finish)

    def _finish(self) -> None:
        with self._lock:
            if self._fd < 0:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            if self._regular and not self._append:
                os.ftruncate(self._fd, os.lseek(self._fd, 0, os.SEEK_CUR))
            fd, self._fd = self._fd, -1
            os.close(fd)

    @override
    async def abort(self) -> None:
        if self._fd >= 0:
            self._aborted = True
            await finished(self.drop)

    def drop(self) -> None:
        """Do what `abort` does, on this thread."""
        with self._lock:
            if self._fd >= 0:
                self._drop()

    def _drop(self) -> None:
        fd, self._fd = self._fd, -1
        if self._regular and not self._append:
            with contextlib.suppress(OSError):  # what was reserved and not written
                os.ftruncate(fd, max(self._old_size, os.lseek(fd, 0, os.SEEK_CUR)))
        os.close(fd)
        if self._is_new:
            with contextlib.suppress(OSError):
                found = os.stat(self._path, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == self._identity:
                    os.unlink(self._path)


def _open(path: bytes, flags: int) -> int:
    try:
        fd = os.open(path, flags | _OPEN_FLAGS)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe without its other end, or a socket
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
        raise
    try:
        _check_kind(fd)
    except BaseException:
        os.close(fd)
        raise
    os.set_blocking(fd, True)
    return fd


def _check_kind(fd: int) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _open_or_create(path: bytes, flags: int) -> tuple[int, bool]:
    """Open a file; give also whether it was made just now."""
    while True:
        try:
            return _open(path, flags), False
        except FileNotFoundError:
            pass
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True
        except FileExistsError:
            if not os.path.islink(path) or os.path.exists(path):
                continue  # somebody else has made it
            # A link that leads nowhere: the file is made where it leads.
            return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o666), False


def _reserve(fd: int, old_size: int, size: int, *, append: bool) -> None:
    """Take the space now, so that a full disk is found while the old contents are whole."""
    reserve = getattr(os, "posix_fallocate", None)
    new_size = old_size + size if append else size
    if reserve is None or new_size <= old_size:
        return
    try:
        reserve(fd, 0, new_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, old_size)
        if error.errno not in _NO_RESERVATION:
            raise
    else:
        if append:  # it goes to the end, which must be where it was
            os.ftruncate(fd, old_size)
