"""`Starts`: instances that were started and that nobody waits for, until each has its room.

`Cls.bind` and the replicas of a pool start at the first call, which need not wait. One thread of a
process looks after all of them, as `ray_backend.readiness` does for who waits: what queues in vain is
moved to where there is room, and what has none in time is given up. The calls on their way to it have
not run: they are sent to the actor that it has then, or get the error that says why there is none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from apothic.errors import PlacementError
from ray_backend.readiness import MovedError, PlacementWatch, give_up

if TYPE_CHECKING:
    from ray_backend.instances import RayInstance
    from ray_backend.lifecycle import Instances

__all__ = ["Starts"]

LOOK_S = 0.5
"""Seconds between two looks; most instances have their room before the first."""


class Starts:
    """The instances of one client that may still wait for room."""

    def __init__(self, instances: Instances) -> None:
        """Look after none; a thread runs only while there are some."""
        self._instances = instances
        self._watched: dict[RayInstance, PlacementWatch[RayInstance]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, instance: RayInstance) -> None:
        """Look after an instance until it has room or is gone."""
        watch = PlacementWatch(self._instances, instance)
        instance.begin_waiting()
        with self._lock:
            self._watched[instance] = watch
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="apothic-starts", daemon=True
                )
                self._thread.start()

    def forget(self, instance: RayInstance) -> None:
        """Leave an instance to somebody who waits for it."""
        with self._lock:
            self._watched.pop(instance, None)

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            with self._lock:
                if not self._watched:
                    self._thread = None
                    return
                watched = list(self._watched.items())
            for instance, watch in watched:
                if self._look(instance, watch):
                    instance.end_waiting()
                    self.forget(instance)

    def _look(self, instance: RayInstance, watch: PlacementWatch[RayInstance]) -> bool:
        """Look once; True where there is nothing more to look after."""
        try:
            # One that its maker has moved is gone, and lives on elsewhere.
            return watch.look() and (not watch.gone or not instance.follow_successor())
        except MovedError:
            return False
        except PlacementError as error:
            with contextlib.suppress(Exception):  # the lease ends with this process
                give_up(instance, error)
            return True
        except Exception:
            return False  # the GCS is away for a moment, or for good: then this process ends
