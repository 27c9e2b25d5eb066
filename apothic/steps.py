"""Verbs written once, for callers that wait and for callers that await.

A verb is a generator that yields what it waits for: a `CallRef`, whose value it gets back, or an
`ItemStream`, of which it gets the next item, or `END` after the last. `verb` makes the blocking method
of it, `awaited` the twin that awaits natively, on no thread.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Concatenate, Final, TypeAlias, TypeVar

from typing_extensions import ParamSpec

from apothic.backend import CallRef, ItemStream
from apothic.twins import Twin

__all__ = ["END", "Steps", "awaited", "verb"]

_S = TypeVar("_S")
_R = TypeVar("_R")
_P = ParamSpec("_P")

Steps: TypeAlias = Generator["CallRef | ItemStream", Any, _R]

END: Final = object()
"""What a verb gets in place of an item after the last one."""

_STEPS = "__apothic_steps__"


def verb(
    steps: Callable[Concatenate[_S, _P], Steps[_R]],
) -> Callable[Concatenate[_S, _P], _R]:
    """Make the blocking method of a verb. Whatever interrupts it cancels what it waits for."""

    @functools.wraps(steps)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        run = steps(self, *args, **kwargs)
        try:
            wait = next(run)
            while True:
                try:
                    value = _wait(wait)
                except BaseException as error:
                    if isinstance(wait, CallRef) and not isinstance(error, Exception):
                        wait.cancel()
                    wait = run.throw(error)
                else:
                    wait = run.send(value)
        except StopIteration as stop:
            result: _R = stop.value
            return result

    # Tools read the signature; theirs is the value's, not the generator's.
    call.__annotations__ = dict(steps.__annotations__)
    call.__annotations__["return"] = _inner(steps.__annotations__["return"])
    signature = inspect.signature(steps)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        return_annotation=call.__annotations__["return"]
    )
    setattr(call, _STEPS, steps)
    return call


def awaited(
    method: Callable[Concatenate[_S, _P], _R],
) -> Callable[Concatenate[Twin[_S], _P], Coroutine[Any, Any, _R]]:
    """Make the async twin of a method that `verb` made. Cancelling the task cancels the call."""
    steps: Callable[..., Steps[_R]] = getattr(method, _STEPS)

    async def call(self: Twin[_S], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        run = steps(self._target, *args, **kwargs)
        try:
            wait = next(run)
            while True:
                try:
                    value = await _await(wait)
                except BaseException as error:
                    if isinstance(wait, CallRef) and isinstance(error, asyncio.CancelledError):
                        wait.cancel()
                    wait = run.throw(error)
                else:
                    wait = run.send(value)
        except StopIteration as stop:
            result: _R = stop.value
            return result

    call.__name__ = getattr(method, "__name__", "call")
    call.__doc__ = method.__doc__
    call.__wrapped__ = method  # type: ignore[attr-defined]  # inspect.signature shows its parameters
    return call


def _wait(wait: CallRef | ItemStream) -> Any:
    if isinstance(wait, CallRef):
        return wait.result()
    try:
        return wait.next_item()
    except StopIteration:
        return END


async def _await(wait: CallRef | ItemStream) -> Any:
    if isinstance(wait, CallRef):
        return await asyncio.wrap_future(wait.future())
    try:
        return await wait.anext_item()
    except StopAsyncIteration:
        return END


def _inner(annotation: str) -> str:
    """Give ``X`` for ``Steps[X]``."""
    return annotation.removeprefix("Steps[").removesuffix("]")
