"""Async twins: every blocking verb ``x.verb(…)`` is also ``await x.aio.verb(…)``.

What a class itself can be asked, as ``Cls.from_name(…)``, is also ``await Cls.aio.from_name(…)``.

There is one implementation of each verb. Where waiting is all it does, as for calls, the twin awaits
natively; the others run on threads of our own, so that neither the event loop nor its default
executor is held up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, Generic, TypeVar, overload

from typing_extensions import ParamSpec

__all__ = ["Twin", "Twins", "class_twin", "in_thread", "twin"]

_S = TypeVar("_S")
_R = TypeVar("_R")
_P = ParamSpec("_P")
_OfClass = TypeVar("_OfClass")
_OfInstance = TypeVar("_OfInstance")

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


class Twins(Generic[_S, _OfClass, _OfInstance]):
    """The attribute ``aio`` of a class that has verbs of its own beside those of its instances."""

    def __init__(
        self, of_class: Callable[[], _OfClass], of_instance: Callable[[_S], _OfInstance]
    ) -> None:
        """Say what makes the twins of the class and those of an instance."""
        self._of_class = of_class
        self._of_instance = of_instance
        self.__doc__ = "The async twins of the verbs."

    @overload
    def __get__(self, instance: None, owner: type[_S]) -> _OfClass: ...

    @overload
    def __get__(self, instance: _S, owner: type[_S]) -> _OfInstance: ...

    def __get__(self, instance: _S | None, owner: type[_S]) -> _OfClass | _OfInstance:
        """Give the twins of the class, or of an instance."""
        return self._of_class() if instance is None else self._of_instance(instance)


def class_twin(
    verb: Callable[_P, _R],
) -> Callable[Concatenate[object, _P], Coroutine[Any, Any, _R]]:
    """Make the async twin of a static or class method, with its parameters and result."""

    async def call(_: object, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return await in_thread(verb, *args, **kwargs)

    call.__name__ = getattr(verb, "__name__", "call")
    call.__doc__ = verb.__doc__
    signature = inspect.signature(verb)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[own, *signature.parameters.values()]
    )
    return call


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
