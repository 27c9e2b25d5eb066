"""`SandboxActor`: a session as an async Ray actor; every verb is a method of it.

The class is generic and holds nothing of a session but its host, so that one process could serve one
session after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import ray

from apothic.errors import (
    JobCancelledError,
    SandboxClosedError,
    SandboxError,
    SandboxLostError,
    SandboxStartError,
)
from apothic.session_core import STREAMS, VERBS
from ray_backend.actors.ending import (
    CONTROL_GROUP,
    start_by_itself,
    stop_on_sigterm,
    stop_when_parent_dies,
)
from ray_backend.actors.gate import CONSUMER_KEY, AsyncStreamGate
from ray_backend.names import MANAGER_NAME, NAMESPACE, is_session_name
from ray_backend.ray_api import (
    actor_is_alive,
    current_actor_name,
    leave_out_serializers,
    live_jobs,
    live_nodes,
    restart_count,
)
from ray_backend.registry import Registry
from ray_backend.sandbox.containers import NodeSurroundings, gpu_ids_of
from ray_backend.sandbox.engine.labels import OwnerLabels, RayletId
from ray_backend.sandbox.host import SandboxHost
from ray_backend.sandbox.packed import pack_result, unpack_arguments
from ray_backend.sandbox.plan import AHEAD, SandboxPlan, Unsettled
from ray_backend.sandbox.sweeping import sweep_at_arrival, sweep_behind_raylet
from ray_backend.turns import spare_turns

__all__ = ["SandboxActor"]

STOP_WAIT_S = 60.0
"""Seconds that the end of the process waits for the container to be removed; a sweep does it later."""

_MANAGER_WAIT_S = 2.0
_CANCELLED_MAX = 1000
_END = object()

if is_session_name(current_actor_name()):
    # Verbs travel as bytes, which `packed` makes.
    leave_out_serializers()
    spare_turns()


class SandboxActor:
    """The shell: it ties a `SandboxHost` to Ray. Verbs run on the loop of the default group."""

    def __init__(self, plan: SandboxPlan) -> None:
        """Look around; `apothic_start` opens the session."""
        context = ray.get_runtime_context()
        self._plan = plan
        self._registry = Registry()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._choosing_loop = threading.Lock()
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._gates: dict[str, AsyncStreamGate] = {}
        self._cancelled: dict[str, None] = {}
        self._me = context.current_actor
        self._node_id = context.get_node_id()
        self._node_died = False
        restarted = restart_count(context.get_actor_id()) > 0
        self._host = SandboxHost(
            plan,
            _surroundings(plan, self._registry),
            restarted=restarted,
            was_ready=restarted and self._registry.start_record(plan.actor_name).was_ready,
            started=self._note_ready,
        )
        stop_on_sigterm(self._stop_from_thread, self._remove)
        stop_when_parent_dies(self._stop_with_the_node)
        if restarted:
            threading.Thread(
                target=start_by_itself, args=(self._me,), name="apothic-restart", daemon=True
            ).start()

    def _note_ready(self) -> None:
        if self._plan.named:  # another has no second process that would ask
            self._registry.note_ready(self._plan.actor_name, self._node_id)

    # -- control ---------------------------------------------------------------------------------

    async def apothic_start(self) -> Unsettled | None:
        """Open the session; a failure is raised to all who wait for it.

        Returns:
            None, or what it takes to make it again on this node, before which it does not open.
        """
        if not self._plan.may_open:
            return Unsettled(self._plan, self._node_id)
        self._live_here()
        try:
            await self._host.start()
        except SandboxStartError:
            if self._host.no_engine is None:
                raise
            await asyncio.to_thread(self._note_no_engine)
            return Unsettled(self._plan, self._node_id, self._host.no_engine)
        return None

    def _note_no_engine(self) -> None:
        self._registry.note_no_engine(self._node_id)
        self._registry.leave_seat(self._node_id, self._plan.actor_name)

    async def apothic_status(self) -> dict[str, Any]:
        """Tell how it is."""
        return self._host.status()

    async def apothic_stop(self, drain_s: float, hooks_s: float) -> dict[str, Any]:
        """Close the session at once: a workspace has nothing to drain and no hooks."""
        interrupted = len(self._running)
        closed = await asyncio.wrap_future(self._begin_stop())
        return {
            "closed": closed,
            "hooks": [],
            "interrupted_calls": interrupted,
            "note": "" if closed else "it was closed before",
            "left_nothing_on": self._node_id if self._host.left_nothing else None,
        }

    async def apothic_cancel(self, task_id: str) -> None:
        """End a verb that waits or runs, with what it has started; return when it has ended."""
        if self._loop is not None:
            cancelling = asyncio.run_coroutine_threadsafe(self._cancel(task_id), self._loop)
            await asyncio.wrap_future(cancelling)

    async def apothic_confirm(self, task_id: str, count: int) -> None:
        """Take note that a stream's consumer has ``count`` more items."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._confirm, task_id, count)

    # -- inside ----------------------------------------------------------------------------------

    async def _call(self, verb: str, args: tuple[Any, ...]) -> Any:
        task_id = self._enter()
        try:
            core = self._host.ready_core or await self._core()
            return pack_result(await getattr(core, verb)(*unpack_arguments(*args)))
        except asyncio.CancelledError:
            raise self._cancelled_error() from None
        except SandboxClosedError as error:
            raise self._why_closed(error) from None
        finally:
            self._leave(task_id)

    async def _stream(
        self, verb: str, args: tuple[Any, ...], consumer: str
    ) -> AsyncGenerator[Any, None]:
        # What is cancelled just ends: nobody reads it, and Ray would write an error to the user's log.
        with contextlib.suppress(JobCancelledError):
            task_id = self._enter()
            async with aclosing(self._items(verb, args, consumer, task_id)) as items:
                async for item in items:
                    yield item

    async def _items(
        self, verb: str, args: tuple[Any, ...], consumer: str, task_id: str
    ) -> AsyncGenerator[Any, None]:
        gate = self._gates[task_id] = AsyncStreamGate(lambda: _consumer_lives(consumer), AHEAD)
        try:
            core = await self._core()
            async with aclosing(getattr(core, verb)(*unpack_arguments(*args))) as items:
                # A cancel that comes while Ray has the last item finds no step, but shuts the gate.
                while not gate.is_shut:
                    # A task of its own, so that the cancel of it is not that of Ray's.
                    step = self._running[task_id] = asyncio.ensure_future(_next(items))
                    item = await step
                    if item is _END or not await gate.admit():
                        break
                    yield pack_result(item)
        except asyncio.CancelledError:
            raise self._cancelled_error() from None
        except SandboxClosedError as error:
            raise self._why_closed(error) from None
        finally:
            del self._gates[task_id]
            self._leave(task_id)

    async def _core(self) -> Any:
        self._live_here()
        return await self._host.core()

    def _live_here(self) -> None:
        """Have the session live on the running loop; refuse where it was stopped before it began."""
        here = asyncio.get_running_loop()
        with self._choosing_loop:
            if self._loop is None:
                self._loop = here
        if self._loop is not here:
            raise self._host.closed_error()

    def _enter(self) -> str:
        task_id: str = ray._private.worker.global_worker.current_task_id.hex()
        if task_id in self._cancelled:
            del self._cancelled[task_id]
            raise self._cancelled_error()
        self._running[task_id] = _current_task()
        return task_id

    def _leave(self, task_id: str) -> None:
        del self._running[task_id]
        ended = self._ended.pop(task_id, None)
        if ended is not None:
            ended.set()

    async def _cancel(self, task_id: str) -> None:
        gate = self._gates.get(task_id)
        if gate is not None:
            gate.shut()
        task = self._running.get(task_id)
        if task is not None:
            ended = self._ended.setdefault(task_id, asyncio.Event())
            task.cancel()
            await ended.wait()
            return
        # It has not come yet, or has ended.
        self._cancelled[task_id] = None
        while len(self._cancelled) > _CANCELLED_MAX:
            del self._cancelled[next(iter(self._cancelled))]

    def _confirm(self, task_id: str, count: int) -> None:
        gate = self._gates.get(task_id)
        if gate is not None:
            gate.confirm(count)

    def _cancelled_error(self) -> JobCancelledError:
        return JobCancelledError(f"{self._plan.label}: the call was cancelled.")

    def _begin_stop(self) -> Any:
        """Stop on the loop that the session lives on; on one of its own if it never began."""
        with self._choosing_loop:
            loop = self._loop
            if loop is None:
                loop = self._loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="apothic-stop", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(self._host.stop(), loop)

    def _stop_from_thread(self) -> None:
        with contextlib.suppress(Exception):  # a sweep removes what is left
            self._begin_stop().result(STOP_WAIT_S)

    def _stop_with_the_node(self) -> None:
        self._node_died = True
        with contextlib.suppress(Exception):
            sweep_behind_raylet()
        self._stop_from_thread()

    def _why_closed(self, error: SandboxClosedError) -> SandboxError:
        if not self._node_died:
            return error
        return SandboxLostError(
            f"{self._plan.label} was lost: its node {self._node_id} died: Ray ended there. Open "
            f"another session."
        )

    def _remove(self) -> None:
        """Remove this actor for good, so that its name is free."""
        try:
            with contextlib.suppress(Exception):
                if self._host.left_nothing:
                    self._registry.leave_seat(self._node_id, self._plan.actor_name)
                manager = ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
                me = self._me._actor_id.hex()
                ray.get(manager.forget.remote(self._plan.actor_name, me), timeout=_MANAGER_WAIT_S)
            ray.kill(self._me, no_restart=True)
        except Exception:
            os._exit(0)  # the cluster is gone, and with it the name


def _verb(name: str) -> Callable[..., Awaitable[Any]]:
    async def method(self: SandboxActor, *args: Any) -> Any:
        return await self._call(name, args)

    return method


def _stream(name: str) -> Callable[..., AsyncIterator[Any]]:
    async def method(self: SandboxActor, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(self._stream(name, args, kwargs[CONSUMER_KEY])) as items:
            async for item in items:
                yield item

    return method


for _make, _names in ((_verb, VERBS), (_stream, STREAMS)):
    for _name in _names:
        _method: Any = _make(_name)
        _method.__name__ = _name
        _method.__qualname__ = f"SandboxActor.{_name}"
        setattr(SandboxActor, _name, _method)

for _name in ("apothic_status", "apothic_stop", "apothic_cancel", "apothic_confirm"):
    getattr(SandboxActor, _name).__ray_concurrency_group__ = CONTROL_GROUP


def _surroundings(plan: SandboxPlan, registry: Registry) -> NodeSurroundings:
    context = ray.get_runtime_context()
    node_id = context.get_node_id()

    def fetch(digest: str) -> bytes:
        content = registry.get_blob(digest)
        if content is None:
            raise SandboxStartError(
                f"{plan.label}: what it needs ({digest[:12]}…) is not in the cluster's registry any "
                f"more: the cluster's GCS was replaced without its state. Deploy the app again."
            )
        return content

    def arrive() -> None:
        if registry.take_seat(node_id, plan.actor_name):
            threading.Thread(
                target=sweep_at_arrival,
                args=(plan.cluster_id,),
                name="apothic-arrival",
                daemon=True,
            ).start()

    return NodeSurroundings(
        owner=OwnerLabels(
            plan.cluster_id,
            NAMESPACE,
            RayletId.of_process(os.getppid()),
            session=plan.actor_name,
            owner=context.get_actor_id() or "",
        ),
        node_id=node_id,
        gpu_ids=gpu_ids_of(ray.get_gpu_ids()),
        fetch=fetch,
        secret=registry.get_secret,
        pin_volume=lambda name: registry.pin_volume(name, node_id),
        node_addresses=_node_addresses,
        arrive=arrive,
    )


def _node_addresses() -> list[str]:
    """Give the addresses of the cluster's nodes; of dead ones too, whose machines may live on.

    But for a dead one's host name: it may be nobody's by now, and would then refuse every session.
    """
    nodes = [(node["NodeManagerAddress"], node["Alive"]) for node in live_nodes()]
    return sorted({address for address, alive in nodes if alive or _is_numeric(address)})


def _is_numeric(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


async def _next(items: AsyncIterator[Any]) -> Any:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        return _END


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # a coroutine that runs is in one
    return task


def _consumer_lives(consumer: str) -> bool:
    """Tell whether the job or actor that reads a stream still lives."""
    kind, _, key = consumer.partition(":")
    try:
        return key in live_jobs() if kind == "job" else actor_is_alive(key)
    except Exception:
        return True  # the GCS is away for a moment
