"""What an instance's process does besides user code: fetch, set up, remove and replace itself."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import ray

from ray_backend.actors.failure import RemoteFailure, log
from ray_backend.actors.hang import HangGuard, read_hang
from ray_backend.actors.loading import load_class, share_class_identities
from ray_backend.actors.mounts import Mounts
from ray_backend.actors.plan import InstancePlan
from ray_backend.actors.unpacking import unpack, unpack_once
from ray_backend.names import MANAGER_NAME, NAMESPACE
from ray_backend.ray_api import actor_is_alive, live_jobs, restart_count, session_directory
from ray_backend.registry import Registry

__all__ = ["WorkerServices"]

MAX_STARTS = 3
"""Starts in a row that may end with their process before an instance that was ready is given up."""

_MANAGER_WAIT_S = 2.0
_PYTHON_SOURCE = "apothic:python/"


class WorkerServices:
    """The surroundings of one instance, on Ray."""

    def __init__(self, plan: InstancePlan) -> None:
        """Look at the process; nothing is changed before `prepare`."""
        self._plan = plan
        self._registry = Registry()
        self._context = ray.get_runtime_context()
        self._mounts = Mounts(self._registry, self._context.get_node_id())
        self.restarted = restart_count(self._context.get_actor_id()) > 0

    def current_actor(self) -> Any:
        """Give this actor's own handle."""
        return self._context.current_actor

    def task_id(self) -> Any:
        """Name the call that this thread or task executes, as the caller's reference does."""
        return ray._private.worker.global_worker.current_task_id

    def consumer_lives(self, consumer: str) -> bool:
        """Tell whether the job or actor that reads a stream still lives."""
        kind, _, key = consumer.partition(":")
        try:
            return key in live_jobs() if kind == "job" else actor_is_alive(key)
        except Exception:
            return True  # the GCS is away for a moment

    def guard(self) -> HangGuard:
        """Make the guard of this process."""
        return HangGuard(self._hang_base(), self._plan.concurrency, self._plan.timeout_s)

    def _hang_base(self) -> Path:
        return session_directory() / "apothic" / "hangs" / str(self._context.get_actor_id())

    def settle_restart(self) -> None:
        """Tell callers what a guard ended, and let only wanted restarts go on.

        Named instances come back, and those whose process we replaced or a guard ended.

        An unnamed instance whose process died is lost: its holder is told so and makes another. Ray
        restarts it nevertheless, since the same actor must come back when a call that could not be
        interrupted had its process replaced.
        """
        if not self.restarted:
            return
        hung = self._report_hang()
        begun, was_ready, _ = self._registry.start_record(self._plan.actor_name)
        if begun >= (MAX_STARTS if was_ready else 1):
            raise RemoteFailure(
                "start",
                f"{self._plan.label}: its process ended before it was ready, {begun} times in a row, so "
                f"it is not started again. Look at its log for why: out of memory, os._exit or a crash "
                f"in native code.",
            )
        if self._plan.named or hung:
            return
        if not self._registry.take_replaced(self._plan.actor_name):
            raise RemoteFailure(
                "lost",
                f"{self._plan.label} lost its process: it was killed, ran out of memory or crashed. "
                f"What it held in memory is gone. Make another, or use named(…), which comes back.",
            )

    def _report_hang(self) -> bool:
        """Leave word for the callers of what the process before this one was stuck in."""
        found = read_hang(self._hang_base())
        if found is None:
            return False
        calls, stacks = found
        log(f"{self._plan.label} kept the interpreter lock\n{stacks}")
        for call in calls:
            if call.overdue:
                text = self._plan.lost_to_timeout(call.timeout_s)
                self._registry.put_timeout(call.task_id, f"{text} It was stuck at:\n{stacks}")
        return True

    def prepare(self) -> None:
        """Set secrets, volumes and files up, in that order, before the class is loaded."""
        self._registry.note_start(self._plan.actor_name)
        if self._plan.keeps_revival:
            spec = self._registry.get_spec(self._plan.spec_digest)
            if spec is not None:
                self._registry.put_revival(self._plan.actor_name, self._plan.revival(spec))
        share_class_identities()
        for name in self._plan.secrets:
            variables = self._registry.get_secret(name)
            if variables is None:
                raise RemoteFailure(
                    "start",
                    f"{self._plan.label}: secret {name!r} is not stored on this cluster. Store it "
                    f"with Secret.create({name!r}, …).",
                )
            os.environ.update(variables)
        for mount in self._plan.mounts:
            self._mounts.mount(mount)
        if self._plan.workdir is not None:
            Path(self._plan.workdir).mkdir(parents=True, exist_ok=True)
            os.chdir(self._plan.workdir)
        for remote, digest in self._plan.files:
            self._unpack(remote, digest)

    def started(self) -> None:
        """Note that this process has become ready."""
        self._registry.note_ready(self._plan.actor_name)

    def _unpack(self, remote: str, digest: str) -> None:
        content = self._fetch(digest)
        if not remote.startswith(_PYTHON_SOURCE):
            unpack(content, Path(remote))
            return
        # By content, in the directory that Ray removes with its session.
        root = session_directory() / "apothic" / "python" / digest[:32]
        unpack_once(content, root / remote.removeprefix(_PYTHON_SOURCE))
        sys.path.insert(0, str(root))
        importlib.invalidate_caches()

    def load(self) -> tuple[type[Any], tuple[Any, ...], dict[str, Any]]:
        """Unpickle the class, then the constructor's arguments, which may be of its modules."""
        from apothic.packing import loads

        cls = load_class(self._fetch(self._plan.blob_digest))
        packed = self._plan.arguments
        if packed is None:
            plan = self._plan
            packed = self._fetch(
                self._registry.arguments_key(plan.actor_name, plan.arguments_digest)
            )
        args, kwargs = loads(packed)
        return cls, args, kwargs

    def _fetch(self, digest: str) -> bytes:
        content = self._registry.get_blob(digest)
        if content is None:
            raise RemoteFailure(
                "start",
                f"{self._plan.label}: its code ({digest[:12]}…) is not in the cluster's registry any "
                f"more: the cluster's GCS was replaced without its state. Deploy the app again.",
            )
        return content

    def remove(self) -> None:
        """Remove this actor for good, so that its name is free."""
        try:
            with contextlib.suppress(Exception):
                # Without its manager the lease is found stale later; the name must be free now.
                manager = ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
                forgetting = manager.forget.remote(
                    self._plan.actor_name, self._context.get_actor_id()
                )
                ray.get(forgetting, timeout=_MANAGER_WAIT_S)
            ray.kill(self.current_actor(), no_restart=True)
        except Exception:
            os._exit(0)  # the cluster is gone, and with it the name

    def replace(self, task_id: str, timeout_text: str) -> None:
        """End the process in a way that brings the actor back, and leave word for the caller."""
        try:
            if timeout_text:
                self._registry.put_timeout(task_id, timeout_text)
            self._registry.mark_replaced(self._plan.actor_name)
        finally:
            sys.stderr.flush()
            os._exit(1)

    def cleanup(self) -> None:
        """Undo the mounts."""
        self._mounts.release()
