"""`InstanceHost`: runs one instance of a user's class; plain, so that a test can build it.

The compiled actor class delegates to it. What it needs of the outside is handed in as `HostServices`.

Threads: with ``concurrent_requests=1`` every sync piece of user code runs on one thread, which is
Ray's own for the actor's default group (`start`, `call` and `run_exit_hooks` are called there), or,
in an instance that has an event loop, the host's only worker thread. `stop`, `status` and `cancel` are
called on the control group's threads, so that they are answered while user code runs.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray_backend.actors.failure import RemoteFailure, capture, format_error, log
from ray_backend.actors.gate import AHEAD, CONSUMER_KEY, AsyncStreamGate, StreamGate
from ray_backend.actors.hang import HangGuard
from ray_backend.actors.latch import Latch
from ray_backend.actors.plan import InstancePlan
from ray_backend.actors.running import ActiveCall, CallBook, make_sleep_interruptible
from ray_backend.actors.stopping import Recording, Stop

__all__ = ["TIMEOUT_KEY", "HostServices", "InstanceHost"]

TIMEOUT_KEY = "__apothic_timeout_s__"
"""The keyword by which one call replaces the instance's ``timeout_s``."""

DRAIN_S = 10.0
"""Seconds that running calls get to finish when an instance is closed."""

INTERRUPT_S = 2.0
"""Seconds that interrupted calls get to unwind after that."""

HOOKS_S = 30.0
"""Seconds that all exit hooks of an instance get together."""

SELF_REMOVAL_S = 3.0
"""Seconds after which a stopped or failed instance removes itself if nobody did."""


@dataclass
class HostServices:
    """What a host needs of its surroundings.

    Attributes:
        prepare: makes secrets, volumes and files ready, before the class is loaded.
        started: notes that ``enter`` has finished.
        load: gives the user's class and the constructor's ``(args, kwargs)``.
        submit_exit: has `run_exit_hooks` (or its async twin) called where user code runs.
        remove: removes the actor for good.
        replace: ends the process so that another takes its place; gets the stuck call's task id.
        task_id: names the call that the current thread or task executes.
        consumer_lives: tells whether the job or actor that reads a stream still lives.
        cleanup: undoes what ``prepare`` did.
        guard: ends the process when native code keeps the interpreter lock past a deadline.
    """

    prepare: Callable[[], None]
    load: Callable[[], tuple[type[Any], tuple[Any, ...], dict[str, Any]]]
    submit_exit: Callable[[], None]
    remove: Callable[[], None]
    replace: Callable[[str, str], None]
    task_id: Callable[[], Any]
    started: Callable[[], None] = lambda: None
    consumer_lives: Callable[[str], bool] = lambda _: True
    cleanup: Callable[[], None] = lambda: None
    guard: HangGuard | None = None


class InstanceHost:
    """The life of one instance: new, starting, ready or failed, closing, closed."""

    def __init__(self, plan: InstancePlan, services: HostServices) -> None:
        """Prepare; user code is loaded by the first of `start`, `call` or `stream`."""
        self.plan = plan
        self._services = services
        self._state = "new"
        self._lock = threading.Lock()
        self._ready = Latch()
        self._failure: RemoteFailure | None = None
        self._stop: Stop | None = None
        self._object: Any = None
        self._bound: dict[str, Callable[..., Any]] = {}
        self._book = CallBook(plan.timeout_s, self._replace_process, services.guard)
        self._started_unix_s: float | None = None
        self._threads = (
            ThreadPoolExecutor(plan.concurrency, thread_name_prefix="apothic-user")
            if plan.is_async
            else None
        )
        make_sleep_interruptible(self._book)

    # -- start -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Load, construct and enter, once; raise the failure of whoever did.

        Called where user code runs. With several such threads the others wait.
        """
        if self._claim_start():
            try:
                self._construct()
                for name in self.plan.enter_hooks:
                    self._hook(name)
                self._services.started()
            except BaseException as error:
                self._start_failed(error)
            else:
                self._start_succeeded()
        self._ready.wait()
        self._check_ready()

    async def start_async(self) -> None:
        """Do what `start` does, in an instance that has an event loop."""
        if self._claim_start():
            try:
                await self._on_thread(self._construct)
                for name in self.plan.enter_hooks:
                    await self._hook_async(name)
                self._services.started()
            except BaseException as error:
                self._start_failed(error)
            else:
                self._start_succeeded()
        await self._ready.wait_async()
        self._check_ready()

    def _claim_start(self) -> bool:
        with self._lock:
            if self._state != "new":
                return False
            self._state = "starting"
            return True

    def _construct(self) -> None:
        self._services.prepare()
        cls, args, kwargs = self._services.load()
        self._object = cls(*args, **kwargs)
        for name, _ in self.plan.methods:
            self._bound[name] = getattr(self._object, name)

    def _start_succeeded(self) -> None:
        with self._lock:
            self._started_unix_s = time.time()
            if self._state == "starting":
                self._state = "ready"
        self._ready.open()

    def _start_failed(self, error: BaseException) -> None:
        failure = (
            error if isinstance(error, RemoteFailure) else capture(error, "start", self.plan.label)
        )
        failure.kind = "start"
        with self._lock:
            self._failure = failure
            self._state = "failed"
            self._object = None
        # Whoever waits learns of it first; the name must be free soon even if nobody does.
        self._ready.open()
        self._remove_later()
        log(f"{self.plan.label} did not start\n{failure}")
        self._services.cleanup()

    def _check_ready(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._state in ("closing", "closed"):
            raise self._closed_failure()

    def _closed_failure(self) -> RemoteFailure:
        """Refuse a call that did not begin; "closed" is of one that ran and was interrupted."""
        return RemoteFailure(
            "refused", f"{self.plan.label} is closed. Make or name a new instance."
        )

    # -- calls -----------------------------------------------------------------------------------

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a sync method on the calling thread."""
        if self._state != "ready":
            self.start()
        call = self._begin(name, kwargs)
        try:
            try:
                return self._bound[name](*args, **kwargs)
            finally:
                self._book.end(call)
        except BaseException as error:
            raise self._failed(call, error) from None

    async def call_async(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a method in an instance that has an event loop; a sync one on the host's thread."""
        if self._state != "ready":
            await self.start_async()
        bound = self._bound[name]
        if not inspect.iscoroutinefunction(inspect.unwrap(bound)):
            return await self._on_thread(
                partial(self._call_on_thread, name, args, kwargs, self._services.task_id())
            )
        call = self._begin(name, kwargs, asyncio.get_running_loop())
        call.task = asyncio.current_task()
        try:
            try:
                return await bound(*args, **kwargs)
            finally:
                self._book.end(call)
        except BaseException as error:
            raise self._failed(call, error) from None

    def _call_on_thread(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], task_id: Any
    ) -> Any:
        call = self._begin(name, kwargs, task_id=task_id)
        try:
            try:
                return self._bound[name](*args, **kwargs)
            finally:
                self._book.end(call)
        except BaseException as error:
            raise self._failed(call, error) from None

    def stream(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        """Run a generator method; the time that its consumer takes is not counted."""
        if self._state != "ready":
            self.start()
        yield from self._stream_steps(name, args, kwargs)

    async def stream_async(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Run a generator method, sync or async, in an instance that has an event loop."""
        if self._state != "ready":
            await self.start_async()
        if not dict(self.plan.methods)[name].startswith("async"):
            # Each step runs on the host's thread; the call's clock runs there, too.
            items = self._stream_steps(name, args, kwargs, self._services.task_id())
            try:
                while True:
                    found, item = await self._on_thread(partial(_step, items))
                    if not found:
                        return
                    yield item
            finally:
                await self._on_thread(items.close)
            return
        gate = AsyncStreamGate(self._consumer_of(kwargs), AHEAD)
        call = self._begin(name, kwargs, asyncio.get_running_loop(), gate=gate)
        call.task = asyncio.current_task()
        try:
            try:
                source = self._bound[name](*args, **kwargs)
                try:
                    while True:
                        try:
                            item = await _anext(source)
                        except StopAsyncIteration:
                            return
                        self._book.pause(call)
                        if not await gate.admit():
                            return
                        yield item
                        call.task = asyncio.current_task()
                        if not self._book.resume(call):
                            return
                finally:
                    await source.aclose()
            finally:
                self._book.end(call)
        except GeneratorExit:
            raise
        except BaseException as error:
            raise self._failed(call, error) from None

    def _stream_steps(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], task_id: Any = None
    ) -> Generator[Any, None, None]:
        gate = StreamGate(self._consumer_of(kwargs))
        call = self._begin(name, kwargs, task_id=task_id, gate=gate)
        try:
            try:
                items = self._bound[name](*args, **kwargs)
                try:
                    while True:
                        try:
                            item = _next(items)
                        except StopIteration:
                            return
                        self._book.pause(call)
                        if not gate.admit():
                            return
                        yield item
                        if not self._book.resume(call):
                            return
                finally:
                    items.close()
            finally:
                self._book.end(call)
        except GeneratorExit:
            raise
        except BaseException as error:
            raise self._failed(call, error) from None

    def _consumer_of(self, kwargs: dict[str, Any]) -> Callable[[], bool]:
        """Take the name of a stream's consumer out; give what tells whether it lives."""
        return partial(self._services.consumer_lives, kwargs.pop(CONSUMER_KEY, ""))

    def _begin(
        self,
        name: str,
        kwargs: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None = None,
        task_id: Any = None,
        gate: StreamGate | AsyncStreamGate | None = None,
    ) -> ActiveCall:
        timeout_s = kwargs.pop(TIMEOUT_KEY, None) if kwargs else None
        call = ActiveCall(
            name,
            self.plan.timeout_s if timeout_s is None else timeout_s,
            self._services.task_id() if task_id is None else task_id,
        )
        call.loop = loop
        call.gate = gate
        if not self._book.begin(call):
            if call.interrupted == "cancelled":
                raise self._cancelled_failure(call)
            raise self._closed_failure()
        return call

    def _cancelled_failure(self, call: ActiveCall) -> RemoteFailure:
        return RemoteFailure(
            "cancelled", f"{self.plan.label}: the call of {call.method} was cancelled."
        )

    def _failed(self, call: ActiveCall, error: BaseException) -> RemoteFailure:
        """Tell what became of a call that raised."""
        if call.interrupted == "timeout":
            return RemoteFailure(
                "timeout",
                f"{self.plan.label}: {call.method} ran longer than its timeout_s="
                f"{call.timeout_s:g} and was stopped; the instance goes on. Raise timeout_s, or "
                f"give the call less to do.",
                trace=format_error(error),
            )
        if call.interrupted == "cancelled":
            return self._cancelled_failure(call)
        if call.interrupted == "closed":
            return RemoteFailure(
                "closed",
                f"{self.plan.label} was closed while {call.method} ran longer than the "
                f"{DRAIN_S:g} s that running calls get; it was interrupted.",
            )
        if isinstance(error, RemoteFailure):
            return error
        return capture(error)

    # -- control ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Tell how the instance is."""
        return {
            "state": self._state,
            "pid": os.getpid(),
            "running": self._book.running,
            "finished": self._book.finished,
            "started_unix_s": self._started_unix_s,
            "arguments_digest": self.plan.arguments_digest,
            "spec_digest": self.plan.spec_digest,
        }

    def cancel(self, task_id: str, queued_only: bool = False) -> None:
        """Interrupt a running call, or see to it that a queued one does not run."""
        self._book.cancel(task_id, queued_only)

    def confirm(self, task_id: str, count: int) -> None:
        """Take note that a stream's consumer has ``count`` more items."""
        self._book.confirm(task_id, count)

    def _replace_process(self, call: ActiveCall) -> None:
        log(
            f"{self.plan.label}: {call.method} could not be interrupted ({call.interrupted}); its "
            f"process is replaced and the state is lost"
        )
        task_id = call.task_id.hex() if hasattr(call.task_id, "hex") else str(call.task_id)
        text = self.plan.lost_to_timeout(call.timeout_s, call.method)
        self._services.replace(task_id, text if call.interrupted == "timeout" else "")

    # -- stop ------------------------------------------------------------------------------------

    def stop(self, drain_s: float = DRAIN_S, hooks_s: float = HOOKS_S) -> dict[str, Any]:
        """Refuse new calls, drain, interrupt, run the exit hooks once, and report.

        Called on any thread but the one that runs user code. Later calls wait for the first.
        """
        with self._lock:
            first = self._stop is None
            stop = self._stop = self._stop or Stop()
            before = self._state
            if first and before in ("new", "ready", "starting"):
                self._state = "closing"
        if not first:
            stop.done.wait()
            return self._report(stop)
        try:
            self._stop_once(stop, before, drain_s, hooks_s)
        finally:
            with self._lock:
                self._state = "closed"
            self._ready.open()  # who still waits is refused
            stop.done.set()
            self._remove_later()
        return self._report(stop)

    def _stop_once(self, stop: Stop, before: str, drain_s: float, hooks_s: float) -> None:
        if before == "new":
            stop.note = "it was never started"
            return
        if before == "starting" and not self._ready.wait(drain_s):
            stop.note = "it was still starting; construction was abandoned"
            return
        if self._failure is not None:
            stop.note = "it had not started"
            return
        stop.interrupted = self._book.close(drain_s, INTERRUPT_S)
        deadline = time.monotonic() + hooks_s
        if self.plan.exit_hooks:
            self._services.submit_exit()
            if not stop.hooks_begun.wait(INTERRUPT_S if self._book.running else hooks_s / 2):
                # The thread of user code cannot be had: the hooks run here rather than not at all.
                stop.note = "a call could not be interrupted; the exit hooks ran on another thread"
                threading.Thread(target=self.run_exit_hooks, daemon=True).start()
            if not stop.hooks_done.wait(max(0.0, deadline - time.monotonic())):
                stop.hooks.append(
                    {
                        "name": self._unfinished_hook(stop),
                        "duration_s": hooks_s,
                        "error": f"TimeoutError: exit hooks took longer than {hooks_s:g} s",
                        "traceback": None,
                    }
                )
        self._services.cleanup()

    def _unfinished_hook(self, stop: Stop) -> str:
        left = list(reversed(self.plan.exit_hooks))[len(stop.hooks) :]
        return left[0] if left else "?"

    def _report(self, stop: Stop) -> dict[str, Any]:
        return {
            "closed": True,
            "hooks": list(stop.hooks),
            "interrupted_calls": stop.interrupted,
            "note": stop.note,
        }

    def run_exit_hooks(self) -> None:
        """Run the exit hooks in reverse order, each even if another failed; once."""
        stop = self._claim_hooks()
        if stop is None:
            return
        for name in reversed(self.plan.exit_hooks):
            with Recording(stop, name, self.plan.label):
                self._hook(name)
        stop.hooks_done.set()

    async def run_exit_hooks_async(self) -> None:
        """Do what `run_exit_hooks` does, in an instance that has an event loop."""
        stop = self._claim_hooks()
        if stop is None:
            return
        for name in reversed(self.plan.exit_hooks):
            with Recording(stop, name, self.plan.label):
                await self._hook_async(name)
        stop.hooks_done.set()

    def _claim_hooks(self) -> Stop | None:
        with self._lock:
            stop = self._stop
            if stop is None or stop.hooks_claimed or stop.done.is_set():
                return None
            stop.hooks_claimed = True
        stop.hooks_begun.set()
        return stop

    def _remove_later(self) -> None:
        timer = threading.Timer(SELF_REMOVAL_S, self._services.remove)
        timer.daemon = True
        timer.start()

    # -- hooks -----------------------------------------------------------------------------------

    def _hook(self, name: str) -> None:
        value = getattr(self._object, name)()
        if inspect.isawaitable(value):  # an async hook in a class without async methods
            asyncio.run(_await(value))

    async def _hook_async(self, name: str) -> None:
        hook = getattr(self._object, name)
        if inspect.iscoroutinefunction(inspect.unwrap(hook)):
            await hook()
        else:
            await self._on_thread(hook)

    async def _on_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(_carried, function)
        )


def _carried(function: Callable[[], Any]) -> Any:
    """Call; what has a meaning of its own to coroutines does not pass through a future as it is.

    Who awaits one that holds StopIteration waits for ever; GeneratorExit loses its text.
    """
    try:
        return function()
    except (StopIteration, GeneratorExit) as error:
        raise capture(error) from None


def _next(items: Any) -> Any:
    """Take an item; a GeneratorExit of user code's own is an error, where ours is an end."""
    try:
        return next(items)
    except GeneratorExit as error:
        raise capture(error) from None


async def _anext(items: Any) -> Any:
    try:
        return await items.__anext__()
    except GeneratorExit as error:
        raise capture(error) from None


def _step(items: Any) -> tuple[bool, Any]:
    try:
        return True, next(items)
    except StopIteration:
        return False, None


async def _await(value: Any) -> Any:
    return await value
