"""Async twins: every blocking verb ``x.verb(…)`` is also ``await x.aio.verb(…)``.

There is one implementation of each verb. Where waiting is all it does, as for calls, the twin awaits
natively; the others run on threads of our own, so that neither the event loop nor its default
executor is held up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, Generic, TypeVar

from typing_extensions import ParamSpec

__all__ = ["Twin", "in_thread", "twin"]

_S = TypeVar("_S")
_R = TypeVar("_R")
_P = ParamSpec("_P")

# Verbs wait on the cluster, not on the processor: the bound only limits memory.
_MAX_THREADS = 256
_lock = threading.Lock()
_threads: ThreadPoolExecutor | None = None


async def in_thread(function: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Run a blocking function on one of our threads, in a copy of the caller's context."""
    return await asyncio.wrap_future(_submit(lambda: function(*args, **kwargs)))


def _submit(function: Callable[[], _R]) -> Future[_R]:
    global _threads
    with _lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="apothic-aio")
    return _threads.submit(contextvars.copy_context().run, function)


class Twin(Generic[_S]):
    """The async face of an object; its methods are made by `twin`."""

    __slots__ = ("_target",)

    def __init__(self, target: _S) -> None:
        """Wrap ``target``."""
        self._target = target

    def __repr__(self) -> str:
        """Name the object it belongs to."""
        return f"{self._target!r}.aio"


def twin(
    verb: Callable[Concatenate[_S, _P], _R],
    *,
    undo: Callable[[_R], object] | None = None,
) -> Callable[Concatenate[Twin[_S], _P], Coroutine[Any, Any, _R]]:
    """Make the async twin of a blocking method, with its parameters and result.

    Args:
        verb: the method.
        undo: takes a result that came after the awaiting task was cancelled, so that nobody has it.
    """

    def discard(done: Future[_R]) -> None:
        if undo is not None and not done.cancelled() and done.exception() is None:
            result = done.result()
            with contextlib.suppress(RuntimeError):  # the process ends, and everything with it
                _submit(lambda: undo(result))

    async def call(self: Twin[_S], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        running = _submit(lambda: verb(self._target, *args, **kwargs))
        try:
            return await asyncio.wrap_future(running)
        except BaseException:
            running.add_done_callback(discard)
            raise

    call.__name__ = getattr(verb, "__name__", "call")
    call.__doc__ = verb.__doc__
    call.__wrapped__ = verb  # type: ignore[attr-defined]  # inspect.signature shows its parameters
    return call
