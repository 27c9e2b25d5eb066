"""The one stop of an instance, and the record of its exit hooks."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ray_backend.actors.failure import RemoteFailure, capture, log

__all__ = ["Recording", "Stop"]


@dataclass
class Stop:
    """The one stop of an instance: who comes later waits for it and gets the same report."""

    done: threading.Event = field(default_factory=threading.Event)
    hooks_begun: threading.Event = field(default_factory=threading.Event)
    hooks_done: threading.Event = field(default_factory=threading.Event)
    hooks_claimed: bool = False
    hooks: list[dict[str, Any]] = field(default_factory=list)
    interrupted: int = 0
    note: str | None = None


class Recording:
    """Notes how an exit hook went, and keeps its exception from the others."""

    def __init__(self, stop: Stop, name: str, label: str) -> None:
        self._stop = stop
        self._name = name
        self._label = label

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        failure: RemoteFailure | None = None
        if error is not None:
            failure = error if isinstance(error, RemoteFailure) else capture(error)
        if failure is not None:
            log(f"exit hook {self._name} of {self._label} failed\n{failure.trace}")
        self._stop.hooks.append(
            {
                "name": self._name,
                "duration_s": time.perf_counter() - self._begin,
                "error": None if failure is None else failure.short,
                "traceback": None if failure is None else failure.trace,
            }
        )
        return True
