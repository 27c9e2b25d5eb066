"""`Surroundings`: what instances change of this process while they live."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from apothic.testing.process import SetUpError

__all__ = ["Surroundings"]


class Surroundings:
    """Environment variables and mounts, counted by use and undone when their last user ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}
        self._before: dict[str, str | None] = {}

    def variables(self, values: Mapping[str, str]) -> ExitStack:
        """Set environment variables until the stack is closed."""
        undo = ExitStack()
        with self._lock:
            for name, value in values.items():
                self._users[name] = self._users.get(name, 0) + 1
                self._before.setdefault(name, os.environ.get(name))
                os.environ[name] = value
                undo.callback(self._unset, name)
        return undo

    def _unset(self, name: str) -> None:
        with self._lock:
            self._users[name] -= 1
            if self._users[name] == 0:
                before = self._before.pop(name)
                os.environ.pop(name, None)
                if before is not None:
                    os.environ[name] = before

    def link(self, path: Path, directory: Path, volume: str) -> ExitStack:
        """Have a volume's directory at its mount path until the stack is closed."""
        undo = ExitStack()
        with self._lock:
            users = self._users.get(str(path), 0)
            if users == 0:
                made = self._make_link(path, directory, volume)
                self._before[str(path)] = "\0".join(map(str, made))
            elif path.resolve() != directory.resolve():
                raise SetUpError(
                    f"mount path {str(path)!r} of volume {volume!r} is in use for "
                    f"{path.resolve().name!r}. Give one of the classes another mount path."
                )
            self._users[str(path)] = users + 1
            undo.callback(self._unlink, path)
        return undo

    def _make_link(self, path: Path, directory: Path, volume: str) -> Iterable[Path]:
        """Make the link; give the directories that had to be made for it, outermost first."""
        if path.exists() or path.is_symlink():
            raise SetUpError(
                f"mount path {str(path)!r} of volume {volume!r} exists and is not ours. Choose a path "
                f"that does not exist."
            )
        made = [parent for parent in reversed(path.parents) if not parent.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(directory)
        except OSError as error:
            raise SetUpError(
                f"mount path {str(path)!r} of volume {volume!r} cannot be made: {error.strerror}. "
                f"Choose a path that may be written."
            ) from None
        return made

    def _unlink(self, path: Path) -> None:
        with self._lock:
            self._users[str(path)] -= 1
            if self._users[str(path)] == 0:
                path.unlink(missing_ok=True)
                made = self._before.pop(str(path)) or ""
                for parent in reversed([Path(part) for part in made.split("\0") if part]):
                    parent.rmdir()
