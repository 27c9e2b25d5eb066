"""`Progress`: tells whoever waits for a session what the node is doing for it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Protocol

import ray
from ray import exceptions as rays

__all__ = ["Progress"]


class Starting(Protocol):
    """A session that starts."""

    label: str

    @property
    def native(self) -> Any: ...


class Progress:
    """Asks a starting session, when called, and writes what is new to standard error.

    Only what takes long is ever told: an image that is pulled or built.
    """

    def __init__(self, session: Starting) -> None:
        """Ask nothing yet."""
        self._session = session
        self._asked: Any = None
        self._told = ""

    def __call__(self) -> None:
        """Take the answer to the last question, if there is one, and ask the next."""
        if self._asked is not None:
            answered, _ = ray.wait([self._asked], timeout=0)
            if not answered:
                return
            with contextlib.suppress(rays.RayError):  # whoever waits is told
                self._tell(ray.get(self._asked)["progress"])
        self._asked = self._session.native.apothic_status.remote()

    def _tell(self, line: str) -> None:
        if line and line != self._told:
            self._told = line
            print(f"[apothic] {self._session.label}: {line}", file=sys.stderr)
