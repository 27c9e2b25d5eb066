"""`ManagerLink`: how a process asks the manager."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import exceptions as rays

from apothic.errors import BackendError
from apothic.values import CloseReport, HookResult
from ray_backend.manager import CLOSING_GROUP, CLOSING_THREADS, Manager
from ray_backend.names import MANAGER_NAME, NAMESPACE
from ray_backend.translate import missing_package

__all__ = ["ManagerLink"]


class ManagerLink:
    """Finds the manager, starts it if there is none, and asks it; safe to use from several threads."""

    def __init__(self) -> None:
        """Do nothing yet: the manager is looked for when it is first asked."""
        self._actor: Any = None
        self._lock = threading.Lock()

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Ask the manager; one that was killed is asked again when it is back.

        Raises:
            BackendError: when it does not come back, or fails.
            EnvironmentSetupError: when the nodes do not have this package.
        """
        for attempt in range(3):
            actor = self.actor()
            try:
                return ray.get(question(actor))
            except rays.RayActorError as error:
                with self._lock:
                    self._actor = None
                lacking = missing_package(error)
                if lacking is not None:
                    # Ray keeps an empty actor in its place, which would stand in others' way.
                    ray.kill(actor)
                    raise lacking from None
                if attempt == 2:
                    raise BackendError(
                        f"the manager {MANAGER_NAME} does not answer: {error}. See its log in Ray's "
                        f"session directory."
                    ) from error
            except rays.RayTaskError as error:
                raise BackendError(
                    f"the manager {MANAGER_NAME} failed: {error.cause!r}. Where the cluster's GCS was "
                    f"away for a moment, try again; else see its log in Ray's session directory."
                ) from error
        raise AssertionError("unreachable")

    def close(self, name: str, actor_id: str | None = None) -> CloseReport:
        """Have an instance stopped, whoever holds it; with an actor id only that very actor."""
        report = self.ask(lambda manager: manager.close.remote(name, actor_id))
        return CloseReport(
            closed=report["closed"],
            hooks=tuple(HookResult(**hook) for hook in report["hooks"]),
            interrupted_calls=report["interrupted_calls"],
            note=report["note"],
        )

    def actor(self) -> Any:
        """Give the manager's actor handle."""
        with self._lock:
            if self._actor is None:
                make: Any = ray.remote  # its stubs do not know concurrency groups
                self._actor = (
                    make(concurrency_groups={CLOSING_GROUP: CLOSING_THREADS})(Manager)
                    .options(
                        name=MANAGER_NAME,
                        namespace=NAMESPACE,
                        lifetime="detached",
                        get_if_exists=True,
                        num_cpus=0,
                        max_restarts=-1,
                        max_task_retries=-1,
                        max_concurrency=64,
                    )
                    .remote()
                )
            return self._actor
