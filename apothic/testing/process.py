"""What stands for the worker process of one instance: its object, threads and event loop."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

from apothic.errors import (
    FunctionTimeoutError,
    InstanceClosedError,
    InstanceStartError,
    JobCancelledError,
    SerializationError,
)
from apothic.inprocess import LoopThread, format_error
from apothic.packing import dumps, loads
from apothic.testing.running import (
    GRACE_S,
    Call,
    Feed,
    Interrupted,
    Threads,
    Watch,
    travelled,
)
from apothic.tracebacks import text_of
from apothic.twins import in_thread
from apothic.values import ClassSpec, CloseReport, HookResult, InstanceState

__all__ = ["DRAIN_S", "HOOKS_S", "Process", "SetUpError", "stuck_error"]

DRAIN_S = 10.0
"""Seconds that running calls get to finish when an instance is closed."""

HOOKS_S = 30.0
"""Seconds that all exit hooks of an instance get together."""


class SetUpError(Exception):
    """Secrets or volumes of an instance cannot be had; the text is the whole message."""


class Process:
    """One life of an instance, from construction to its exit hooks.

    With one request at a time, construction, hooks and sync methods run on one and the same thread.
    A class with async methods has an event loop beside it.
    """

    def __init__(
        self,
        label: str,
        spec: ClassSpec,
        concurrency: int,
        make: Callable[[], Any],
        clean_up: Callable[[Process], None],
        watch: Watch,
    ) -> None:
        """Start constructing the object, then enter.

        Args:
            label: names the instance in messages.
            spec: the class.
            concurrency: calls that run at once.
            make: prepares the surroundings and gives the object; called on the instance's thread.
            clean_up: undoes the preparations, once the start has failed or everything has ended.
            watch: keeps the time.
        """
        self.label = label
        self.object: Any = None
        self.state: InstanceState = "starting"
        self.failure: BaseException | None = None
        self.finished: int = 0
        self.started_unix_s: float | None = None
        self.ready: threading.Event = threading.Event()
        self._spec = spec
        self._make = make
        self._clean_up = clean_up
        self._watch = watch
        self._calls: set[Call] = set()
        self._changed = threading.Condition()
        self._threads = Threads(concurrency, f"apothic-{spec.name}")
        self._loop = LoopThread() if spec.is_async else None
        self._entered = asyncio.Event()
        self._slots = asyncio.Semaphore(concurrency)
        if self._loop is None:
            self._threads.submit(self._start)
        else:
            asyncio.run_coroutine_threadsafe(self._start_async(), self._loop.loop())

    # -- start ----------------------------------------------------------------------------------

    def _start(self) -> None:
        error = _attempt(self._construct)
        for name in self._spec.enter_hooks:
            error = error or _attempt(partial(self._hook, name))
        self._started(error)

    async def _start_async(self) -> None:
        error = await self._on_thread(partial(_attempt, self._construct))
        for name in self._spec.enter_hooks:
            error = error or await asyncio.wrap_future(self._submit_hook(name))
        self._started(error)
        self._entered.set()

    def _construct(self) -> None:
        self.object = self._make()

    def _started(self, error: BaseException | None) -> None:
        if error is not None:
            self._start_failed(error)
            return
        with self._changed:
            self.started_unix_s = time.time()
            if self.state == "starting":
                self.state = "ready"
        self.ready.set()

    def _start_failed(self, error: BaseException) -> None:
        if isinstance(error, SetUpError):
            failure = InstanceStartError(str(error))
        else:
            cause = travelled(error)
            kind = type(error)
            head = f"{kind.__module__}.{kind.__qualname__}"
            failure = InstanceStartError(
                f"{self.label} did not start: its constructor or an enter hook raised "
                f"{head}: {text_of(cause)}. The remote traceback follows as the cause; nothing was "
                f"left behind."
            )
            failure.__cause__ = cause
        with self._changed:
            self.state = "failed"
        self.object = None
        self._end(failure, wait=False)

    # -- calls ----------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """How many calls have begun and not ended."""
        return sum(call.begun for call in list(self._calls))

    def submit(self, call: Call, arguments: bytes) -> None:
        """Queue a call, behind ``enter`` where that is not done."""
        with self._changed:
            refusal = self._refusal()
            if refusal is None:
                self._calls.add(call)
                if self._loop is None:
                    self._threads.submit(partial(self._run, call, arguments))
                else:
                    run = self._run_async(call, arguments)
                    asyncio.run_coroutine_threadsafe(run, self._loop.loop())
        if refusal is not None:
            call.fail(refusal)

    def _refusal(self) -> BaseException | None:
        if self.state in ("starting", "ready"):
            return None
        if self.state == "lost":
            return self.failure
        return _refused(f"{self.label} is closed. Make or name a new instance.")

    def _admit(self, call: Call, task: asyncio.Task[Any] | None = None) -> bool:
        with self._changed:
            refusal = self._refusal()
            if refusal is None:
                return call.begin(task)
        call.fail(refusal)
        return False

    def _run(self, call: Call, arguments: bytes) -> None:
        """Run a sync method or generator on this thread."""
        self.ready.wait()
        if not self._admit(call):
            self._ended(call)
            return
        try:
            value, error = self._body(call, arguments), None
        except BaseException as raised:
            call.leave_code()
            value, error = None, self._outcome(call, raised)
        self._settle(call, value, error)

    def _body(self, call: Call, arguments: bytes) -> Any:
        args, kwargs = self._unpack(call, arguments)
        bound = getattr(self.object, call.method.name)
        if call.feed is not None:
            self._pump(call, call.feed, bound(*args, **kwargs))
            return None
        call.enter_code()
        try:
            value = bound(*args, **kwargs)
        finally:
            call.leave_code()
        return self._copy(call, value)

    def _pump(self, call: Call, feed: Feed, items: Any) -> None:
        try:
            while True:
                call.enter_code()
                try:
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                finally:
                    call.leave_code()
                if not feed.put(self._copy(call, item)):
                    raise Interrupted
        finally:
            items.close()

    async def _run_async(self, call: Call, arguments: bytes) -> None:
        """Run any method in an instance that has an event loop; a sync one on its thread."""
        await self._entered.wait()
        async with self._slots:
            if not call.method.kind.startswith("async"):
                await self._on_thread(partial(self._run, call, arguments))
                return
            if not self._admit(call, asyncio.current_task()):
                self._ended(call)
                return
            try:
                value, error = await self._body_async(call, arguments), None
            except BaseException as raised:
                call.leave_code()
                value, error = None, self._outcome(call, raised)
            self._settle(call, value, error)

    def _settle(self, call: Call, value: Any, error: BaseException | None) -> None:
        self._ended(call)  # first: whoever has the value may look at the counts
        if error is None:
            call.succeed(value)
        else:
            call.fail(error)

    async def _body_async(self, call: Call, arguments: bytes) -> Any:
        args, kwargs = self._unpack(call, arguments)
        made = getattr(self.object, call.method.name)(*args, **kwargs)
        if call.feed is not None:
            await self._pump_async(call, call.feed, made)
            return None
        call.enter_code()
        try:
            value = await made
        finally:
            call.leave_code()
        return self._copy(call, value)

    async def _pump_async(self, call: Call, feed: Feed, items: Any) -> None:
        try:
            while True:
                call.enter_code()
                try:
                    try:
                        item = await items.__anext__()
                    except StopAsyncIteration:
                        return
                finally:
                    call.leave_code()
                if not await in_thread(feed.put, self._copy(call, item)):
                    raise Interrupted
        finally:
            await items.aclose()

    def _unpack(self, call: Call, arguments: bytes) -> Any:
        try:
            return loads(arguments)
        except Exception as error:
            raise SerializationError(
                f"{call.label}: an argument cannot be unpickled where it is used: "
                f"{type(error).__name__}: {text_of(error)}. Pass plain data."
            ) from error

    def _copy(self, call: Call, value: Any) -> Any:
        try:
            return loads(dumps(value))
        except Exception as error:
            raise SerializationError(
                f"{call.label}: the result cannot travel to the caller: {text_of(error).rstrip('.')}. "
                f"Return plain data, or make the object picklable."
            ) from None

    def _outcome(self, call: Call, error: BaseException) -> BaseException:
        if call.interrupted == "timeout":
            return FunctionTimeoutError(
                f"{call.label} ran longer than its timeout_s={call.timeout_s:g} and was stopped; the "
                f"instance goes on. Raise timeout_s, or give the call less to do."
            )
        if call.interrupted == "closed":
            return InstanceClosedError(
                f"{self.label} was closed while {call.method.name} ran longer than the {DRAIN_S:g} s "
                f"that running calls get; it was interrupted."
            )
        if call.interrupted == "cancelled" or isinstance(error, Interrupted):
            return JobCancelledError(f"{call.label} was cancelled.")
        return travelled(error)

    def _ended(self, call: Call) -> None:
        self._watch.forget(call)
        with self._changed:
            self._calls.discard(call)
            self.finished += call.begun
            self._changed.notify_all()

    # -- end ------------------------------------------------------------------------------------

    def stop(self) -> CloseReport:
        """Refuse new calls, let the running ones finish, interrupt the rest, run the exit hooks."""
        with self._changed:
            if self.state in ("starting", "ready"):
                self.state = "closing"
        if not self.ready.wait(DRAIN_S):
            self.abandon(_refused(f"{self.label} was closed while it started."))
            return CloseReport(
                closed=True, note="it was still starting; construction was abandoned"
            )
        if self.state != "closing":
            return CloseReport(closed=True, note="it had not started")
        with self._changed:
            self._changed.wait_for(lambda: not self.running, DRAIN_S)
            late = [call for call in self._calls if call.begun]
        for call in late:
            call.interrupt("closed")
        with self._changed:
            free = self._changed.wait_for(lambda: not self.running, GRACE_S)
        note = None
        if not free:
            note = "a call could not be interrupted; the exit hooks ran on another thread"
            self._threads.stop(wait=False)
            self._threads = Threads(1, f"apothic-{self._spec.name}")
        hooks, in_time = self._run_exit_hooks()
        self._end(
            InstanceClosedError(f"{self.label} is closed. Make or name a new instance."),
            wait=free and in_time,
        )
        return CloseReport(closed=True, hooks=hooks, interrupted_calls=len(late), note=note)

    def abandon(self, error: BaseException) -> None:
        """End it without exit hooks, as if the process were killed; its calls get ``error``."""
        with self._changed:
            self.state = "lost"
            left = list(self._calls)
        for call in left:
            call.abandon(error)
        self._end(error, wait=False)

    def _end(self, error: BaseException, *, wait: bool) -> None:
        with self._changed:
            if self.state not in ("failed", "lost"):
                self.state = "closed"
            self.failure = error
            left = list(self._calls)
        for call in left:
            waits = self.state == "closed" and not call.begun  # else it is stuck, or lost
            call.fail(_refused(str(error)) if waits else error)
        self._clean_up(self)
        self.ready.set()
        self._threads.stop(wait=wait)
        if self._loop is not None:
            end_loop = partial(_end_loop, self._loop)
            # A loop that user code blocks cannot be joined.
            end_loop() if wait else threading.Thread(target=end_loop, daemon=True).start()

    def _run_exit_hooks(self) -> tuple[tuple[HookResult, ...], bool]:
        deadline = time.monotonic() + HOOKS_S
        results: list[HookResult] = []
        for name in reversed(self._spec.exit_hooks):
            begin = time.perf_counter()
            error = trace = None
            hook = self._submit_hook(name)
            try:
                failure = hook.result(max(0.0, deadline - time.monotonic()))
            except FutureTimeout:
                error = f"TimeoutError: exit hooks took longer than {HOOKS_S:g} s"
            else:
                if failure is not None:
                    message = text_of(failure)
                    name_of = type(failure).__name__
                    error = f"{name_of}: {message}" if message else name_of
                    trace = format_error(failure)
            if error is not None:
                print(
                    f"apothic: exit hook {name} of {self.label} failed\n{trace or error}",
                    file=sys.stderr,
                )
            duration_s = time.perf_counter() - begin
            results.append(
                HookResult(name=name, duration_s=duration_s, error=error, traceback=trace)
            )
            if not hook.done():
                return tuple(results), False
        return tuple(results), True

    # -- where user code runs -------------------------------------------------------------------

    def _hook(self, name: str) -> None:
        value = getattr(self.object, name)()
        if inspect.isawaitable(value):  # an async hook in a class without async methods
            asyncio.run(_await(value))

    def _submit_hook(self, name: str) -> Future[BaseException | None]:
        """Run a hook where it belongs; give a future of what it raised."""
        hook = getattr(self.object, name)
        if self._loop is not None and inspect.iscoroutinefunction(inspect.unwrap(hook)):
            return asyncio.run_coroutine_threadsafe(_attempt_async(hook()), self._loop.loop())
        return self._threads.submit(partial(_attempt, partial(self._hook, name)))

    async def _on_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._threads.submit(work))


# Exceptions go through futures as values: StopIteration and SystemExit would break a loop.


def _attempt(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


async def _attempt_async(work: Awaitable[object]) -> BaseException | None:
    try:
        await work
    except BaseException as error:
        return error
    return None


def stuck_error(call: Call) -> BaseException:
    """Give the error of a call that could not be interrupted."""
    if call.interrupted != "timeout":
        return JobCancelledError(f"{call.label} was cancelled.")
    error = FunctionTimeoutError(
        f"{call.label} ran longer than its timeout_s={call.timeout_s:g} and could not be interrupted, "
        f"as it was in native code. Its instance was replaced: what it held in memory is lost. Raise "
        f"timeout_s, or make the code interruptible."
    )
    error.state_lost = True
    return error


def _refused(text: str) -> InstanceClosedError:
    """Give the error of a call that did not run, since its instance was closed before."""
    error = InstanceClosedError(text)
    error.refused = True
    return error


def _end_loop(loop: LoopThread) -> None:
    loop.run(_finish_tasks())
    loop.stop()


async def _finish_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _await(value: Any) -> Any:
    return await value
