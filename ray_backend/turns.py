"""Fewer turns of the event loop for each call of an async actor that runs no code of users.

Ray takes an async actor's calls on a thread of its own, and hands its event loop two coroutines for
each: one reads the arguments there, the other runs the method. That is a switch there and back for each,
and one more turn of the loop until the thread may have what the second has returned: 0.1 ms of a call.
Here the arguments are read by Ray's thread itself, and a result is the thread's as soon as it is there.

Ray reads them on the loop since a fiber of its thread has a stack of 256 KiB only, which what users
pickle may outgrow. So this is for actors whose arguments are bytes (`ray_backend.sandbox.packed`).
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from ray import _raylet

__all__ = ["spare_turns"]

T = TypeVar("T")

_READER = "deserialize_args"
"""Ray's function that reads the arguments of one call; it waits for nothing."""


def spare_turns() -> None:
    """Have Ray run the calls of this process so; a Ray whose inside is another does as it did."""
    raylet: Any = _raylet
    if "asyncio" not in vars(raylet):
        return
    # Only Ray's own calls are to come here, so that the module is not changed but stood in for.
    stand_in: Any = ModuleType("asyncio")
    vars(stand_in).update(vars(asyncio))
    stand_in.run_coroutine_threadsafe = _run
    raylet.asyncio = stand_in


def _run(coro: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Future[T]:
    """Do what `asyncio.run_coroutine_threadsafe` does."""
    future: Future[T] = Future()
    if _reads_arguments(coro):
        _read(coro, future)
    else:
        loop.call_soon_threadsafe(_begin, coro, loop, future)
    return future


def _reads_arguments(coro: object) -> bool:
    # Cython keeps what a coroutine of Ray calls in a closure of its closure.
    found = gc.get_referents(*gc.get_referents(*gc.get_referents(coro)))
    return any(getattr(each, "__name__", None) == _READER for each in found)


def _read(coro: Coroutine[Any, Any, T], future: Future[T]) -> None:
    try:
        contextvars.copy_context().run(coro.send, None)
    except StopIteration as end:
        future.set_result(end.value)
    except BaseException as error:  # whoever takes the result is told
        future.set_exception(error)
    else:
        coro.close()
        raylet: Any = _raylet
        raylet.asyncio = asyncio  # the next calls are run as Ray has it
        future.set_exception(RuntimeError(f"Ray's {_READER} waits for something in this version"))
    finally:
        del coro, future  # an error holds this frame


def _begin(
    coro: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, future: Future[T]
) -> None:
    task = loop.create_task(_finish(coro, future))
    # `ray.cancel` cancels the future.
    future.add_done_callback(partial(_pass_on_cancel, task, loop))


async def _finish(coro: Coroutine[Any, Any, T], future: Future[T]) -> None:
    try:
        result = await coro
    except asyncio.CancelledError:
        future.cancel()
        raise
    except BaseException as error:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
        if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
            raise  # what ends a program ends its loop
    else:
        if future.set_running_or_notify_cancel():
            future.set_result(result)
    finally:
        del coro, future  # an error holds this frame, and with it what the call was given


def _pass_on_cancel(
    task: asyncio.Task[None], loop: asyncio.AbstractEventLoop, future: Future[Any]
) -> None:
    if future.cancelled() and not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)
