"""What actors of classes and of sessions share: starting again, and ending with their surroundings."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["CONTROL_GROUP", "start_by_itself", "stop_on_sigterm", "stop_when_parent_dies"]

CONTROL_GROUP = "control"
"""The concurrency group that answers while the others are busy."""


def start_by_itself(me: Any) -> None:
    """Have ``enter`` run; Ray refuses the call while this process still hears that it restarts."""
    import ray

    while True:
        try:
            # Not ray.get, of which Ray warns the user in an async actor, though this is a thread.
            me.apothic_start.remote().future().result()
            return
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.05)
        except Exception:
            return  # the host has noted what failed, and tells callers


def stop_on_sigterm(stop: Callable[[], object], remove: Callable[[], None]) -> None:
    """Stop properly when the process is asked to end; its name is free afterwards."""

    def stop_and_remove() -> None:
        stop()
        remove()

    def handle(signum: int, frame: object) -> None:
        # The main thread must go on: Ray runs its task loop there, and the exit hooks are a task.
        threading.Thread(target=stop_and_remove, name="apothic-sigterm").start()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle)


def stop_when_parent_dies(stop: Callable[[], object]) -> None:
    """Stop when the node's Ray ends under the actor, before Ray ends its process too.

    Ray looks for its raylet every second, and on a cluster that this package started every few, and
    then ends the process without running anything.
    """
    parent = os.getppid()

    def watch() -> None:
        try:
            descriptor = os.pidfd_open(parent)
        except (AttributeError, OSError):
            while os.getppid() == parent:
                time.sleep(0.2)
        else:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
            os.close(descriptor)
        stop()
        os._exit(0)

    threading.Thread(target=watch, name="apothic-parent", daemon=True).start()
