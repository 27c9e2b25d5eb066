"""Compile a class into a Ray actor class: real method names over an `InstanceHost`.

The dashboard, ``ray.get_actor`` and stack traces show the user's names. Control methods answer in a
concurrency group of their own while user code runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from ray_backend.actors.ending import (
    CONTROL_GROUP,
    start_by_itself,
    stop_on_sigterm,
    stop_when_parent_dies,
)
from ray_backend.actors.host import HostServices, InstanceHost
from ray_backend.actors.plan import InstancePlan

__all__ = [
    "CALL_METHOD",
    "CONTROL_GROUP",
    "actor_method_name",
    "compile_actor",
]

CONTROL_THREADS = 4
"""Control calls answered at once; a stop holds one of them until it is done."""

CALL_METHOD = "call_instance"
"""Stands for ``__call__``, which Ray does not let an actor have."""


def actor_method_name(name: str) -> str:
    """Give the actor's name of a user's method."""
    return CALL_METHOD if name == "__call__" else name


def compile_actor(plan: InstancePlan) -> type[Any]:
    """Make the plain class that ``ray.remote`` turns into the actor class."""
    base = _AsyncShell if plan.is_async else _Shell
    members: dict[str, Any] = {"__module__": __name__, "__qualname__": plan.cls}
    for name, kind in plan.methods:
        make = {
            (False, False): _sync_method,
            (False, True): _sync_stream,
            (True, False): _async_method,
            (True, True): _async_stream,
        }[plan.is_async, kind.endswith("generator")]
        method = make(name)
        method.__name__ = actor_method_name(name)
        method.__qualname__ = f"{plan.cls}.{name}"
        members[method.__name__] = method
    return type(plan.cls, (base,), members)


def _sync_method(name: str) -> Callable[..., Any]:
    def method(self: _Shell, *args: Any, **kwargs: Any) -> Any:
        return self.apothic_host.call(name, args, kwargs)

    return method


def _sync_stream(name: str) -> Callable[..., Any]:
    def method(self: _Shell, *args: Any, **kwargs: Any) -> Any:
        yield from self.apothic_host.stream(name, args, kwargs)

    return method


def _async_method(name: str) -> Callable[..., Any]:
    async def method(self: _Shell, *args: Any, **kwargs: Any) -> Any:
        return await self.apothic_host.call_async(name, args, kwargs)

    return method


def _async_stream(name: str) -> Callable[..., Any]:
    async def method(self: _Shell, *args: Any, **kwargs: Any) -> Any:
        items = self.apothic_host.stream_async(name, args, kwargs)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]  # an async generator has it

    return method


class _Shell:
    """What every compiled actor has: it decodes, delegates, and ties the host to its process."""

    def __init__(self, plan: InstancePlan) -> None:
        # Imported here, in the worker: the client compiles actors without this process's services.
        from ray_backend.actors.services import WorkerServices

        worker = WorkerServices(plan)
        worker.settle_restart()
        me = worker.current_actor()
        self.apothic_host = host = InstanceHost(
            plan,
            HostServices(
                prepare=worker.prepare,
                load=worker.load,
                submit_exit=lambda: me.apothic_exit.remote(),
                remove=worker.remove,
                replace=worker.replace,
                task_id=worker.task_id,
                consumer_lives=worker.consumer_lives,
                cleanup=worker.cleanup,
                guard=worker.guard(),
                started=worker.started,
            ),
        )
        stop_on_sigterm(host.stop, worker.remove)
        stop_when_parent_dies(lambda: host.stop(drain_s=0.0))
        if worker.restarted:
            # Nobody is there to start it: a restarted instance enters by itself.
            threading.Thread(
                target=start_by_itself, args=(me,), name="apothic-restart", daemon=True
            ).start()

    def apothic_start(self) -> None:
        self.apothic_host.start()

    def apothic_exit(self) -> None:
        self.apothic_host.run_exit_hooks()

    def apothic_status(self) -> dict[str, Any]:
        return self.apothic_host.status()

    def apothic_stop(self, drain_s: float, hooks_s: float) -> dict[str, Any]:
        return self.apothic_host.stop(drain_s, hooks_s)

    def apothic_cancel(self, task_id: str, queued_only: bool = False) -> None:
        self.apothic_host.cancel(task_id, queued_only)

    def apothic_confirm(self, task_id: str, count: int) -> None:
        self.apothic_host.confirm(task_id, count)


class _AsyncShell(_Shell):
    """The same for an actor with an event loop, where every method must be a coroutine."""

    async def apothic_start(self) -> None:  # type: ignore[override]
        await self.apothic_host.start_async()

    async def apothic_exit(self) -> None:  # type: ignore[override]
        await self.apothic_host.run_exit_hooks_async()

    async def apothic_status(self) -> dict[str, Any]:  # type: ignore[override]
        return self.apothic_host.status()

    async def apothic_stop(self, drain_s: float, hooks_s: float) -> dict[str, Any]:  # type: ignore[override]
        return await asyncio.to_thread(self.apothic_host.stop, drain_s, hooks_s)

    async def apothic_cancel(self, task_id: str, queued_only: bool = False) -> None:  # type: ignore[override]
        self.apothic_host.cancel(task_id, queued_only)

    async def apothic_confirm(self, task_id: str, count: int) -> None:  # type: ignore[override]
        self.apothic_host.confirm(task_id, count)


for _shell in (_Shell, _AsyncShell):
    for _name in ("apothic_status", "apothic_stop", "apothic_cancel", "apothic_confirm"):
        getattr(_shell, _name).__ray_concurrency_group__ = CONTROL_GROUP
