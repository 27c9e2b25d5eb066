"""Calls that run in this process: behind `Cls.local`, `Cls.close_function` and the test engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from apothic import tracebacks
from apothic.backend import CallRef, ItemStream
from apothic.errors import JobCancelledError, WaitTimeoutError
from apothic.values import MethodInfo

__all__ = [
    "Awaiting",
    "FutureCall",
    "IteratorStream",
    "LoopThread",
    "await_steps",
    "format_error",
    "run_now",
    "run_steps",
]

_T = TypeVar("_T")
_PACKAGE = Path(__file__).parent

Awaiting: TypeAlias = Generator[Awaitable[Any], Any, _T]
"""Steps on the calling thread, which yield what is to be awaited between them."""


class FutureCall(CallRef):
    """A call whose outcome is a `concurrent.futures.Future`."""

    __slots__ = ("_future", "_interrupt")

    def __init__(self, future: Future[Any], interrupt: Callable[[], None] | None = None) -> None:
        """Wrap ``future``; ``interrupt`` stops the work if it has begun."""
        self._future = future
        self._interrupt = interrupt

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value."""
        try:
            return self._future.result(timeout_s)
        except CancelledError:
            raise JobCancelledError("the call was cancelled.") from None
        except FutureTimeout:
            if self._future.done():
                return self._future.result()  # the call's own error, or it ended just now
            raise WaitTimeoutError(
                f"the call has not ended after {timeout_s} s; it goes on. Wait longer, or cancel it."
            ) from None

    def future(self) -> Future[Any]:
        """Give the future itself."""
        return self._future

    def done(self) -> bool:
        """Tell whether it has an outcome."""
        return self._future.done()

    def cancel(self) -> None:
        """Cancel it if it waits, interrupt it if it runs."""
        if not self._future.cancel() and self._interrupt is not None:
            self._interrupt()

    @property
    def native(self) -> Any:
        """The future."""
        return self._future


class LoopThread:
    """An event loop on a daemon thread: runs coroutines for callers that have no loop."""

    def __init__(self) -> None:
        """Start nothing yet; the first coroutine does."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end and give its value; an interrupt cancels it."""
        running = asyncio.run_coroutine_threadsafe(_outcome(coroutine), self.loop())
        try:
            value, error = running.result()
        except BaseException:
            running.cancel()
            raise
        if error is not None:
            raise error
        return value

    async def await_(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Do what `run` does, without blocking the caller's loop."""
        running = asyncio.run_coroutine_threadsafe(_outcome(coroutine), self.loop())
        value, error = await asyncio.wrap_future(running)
        if error is not None:
            raise error
        return value

    def loop(self) -> asyncio.AbstractEventLoop:
        """Give the loop, starting it if there is none."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="apothic-loop", daemon=True
                )
                self._thread.start()
            return self._loop

    def stop(self) -> None:
        """End the loop and its thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def _outcome(coroutine: Coroutine[Any, Any, _T]) -> tuple[_T, BaseException | None]:
    # As a value, since a SystemExit that leaves its task ends the loop, and nobody is told.
    try:
        return await coroutine, None
    except BaseException as error:
        return None, error  # type: ignore[return-value]  # nobody reads the value beside an error


def run_steps(steps: Awaiting[_T], loop: LoopThread) -> _T:
    """Run steps on the calling thread and what they yield on ``loop``; give their value."""
    try:
        wait = next(steps)
        while True:
            try:
                value = loop.run(_awaited(wait))
            except BaseException as error:
                wait = steps.throw(error)
            else:
                wait = steps.send(value)
    except StopIteration as stop:
        result: _T = stop.value
        return result


async def await_steps(steps: Awaiting[_T], loop: LoopThread | None) -> _T:
    """Run steps on the calling thread; await what they yield there too, or on ``loop``.

    When the task is cancelled, the steps go on past what they waited for; the cancellation follows.
    """
    cancelled: asyncio.CancelledError | None = None
    try:
        wait = next(steps)
        while True:
            try:
                value = await (wait if loop is None else loop.await_(_awaited(wait)))
            except GeneratorExit:  # the coroutine was dropped: it can wait for nothing more
                steps.close()
                raise
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                    cancelled = error
                wait = steps.throw(error)
            else:
                wait = steps.send(value)
    except StopIteration as stop:
        if cancelled is not None:
            raise cancelled from None
        result: _T = stop.value
        return result


def _is_cancelled() -> bool:
    """Tell whether the task itself is cancelled, not only what it awaited; yes if unknown."""
    cancelling: Callable[[], int] | None = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0  # Python 3.10 does not say


async def _awaited(value: Awaitable[_T]) -> _T:
    return await value


def format_error(error: BaseException) -> str:
    """Format an exception with its causes, without the frames of this package that lead to it."""
    return tracebacks.format_error(error, lambda file: _PACKAGE in Path(file).parents)


def run_now(
    loop: LoopThread, bound: Callable[..., Any], method: MethodInfo, args: Any, kwargs: Any
) -> Future[Any]:
    """Run a method on the calling thread, a coroutine on ``loop``; give the finished future."""
    future: Future[Any] = Future()
    try:
        value = bound(*args, **kwargs)
        future.set_result(loop.run(value) if method.kind == "async" else value)
    except Exception as error:
        future.set_exception(error)
    return future


class IteratorStream(ItemStream):
    """The items of a generator, or async generator, that lives in this process."""

    def __init__(self, items: Iterator[Any] | AsyncIterator[Any], loop: LoopThread) -> None:
        """Wrap a fresh iterator; ``loop`` drives an async one."""
        self._items = items
        self._loop = loop

    def next_item(self) -> Any:
        """Give the next item."""
        if isinstance(self._items, AsyncIterator):
            try:
                return self._loop.run(_anext(self._items))
            except StopAsyncIteration:
                raise StopIteration from None
        return next(self._items)

    async def anext_item(self) -> Any:
        """Give the next item, with the generator's code on its own thread or loop."""
        from apothic.twins import in_thread

        try:
            return await in_thread(_next_or_end, self)
        except _End:
            raise StopAsyncIteration from None

    def close(self) -> None:
        """Close the generator, so that its ``finally`` blocks run."""
        if isinstance(self._items, AsyncIterator):
            aclose = getattr(self._items, "aclose", None)
            if aclose is not None:
                self._loop.run(aclose())
        else:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()


class _End(Exception):  # noqa: N818 - StopIteration cannot pass through a future
    pass


def _next_or_end(stream: IteratorStream) -> Any:
    try:
        return stream.next_item()
    except StopIteration:
        raise _End from None


async def _anext(items: AsyncIterator[_T]) -> _T:
    return await items.__anext__()
