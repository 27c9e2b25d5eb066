"""`Function`, `RemoteFunction` and `Job`: one method of a class or instance, and one call of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from inspect import Signature
from typing import Any, Final, Generic, Literal, TypeVar

from apothic.backend import CallRef, ItemStream
from apothic.definition import bind_arguments
from apothic.errors import (
    JobCancelledError,
    PendingTasksExceededError,
    RemoteTraceback,
    UsageError,
    WaitTimeoutError,
)
from apothic.retries import Retries
from apothic.targets import Target
from apothic.twins import Twin, in_thread, twin
from apothic.values import MethodInfo

__all__ = ["Function", "FunctionAio", "Job", "JobAio", "RemoteFunction", "RemoteStream"]

_R = TypeVar("_R")

JobStatus = Literal["pending", "succeeded", "failed", "cancelled"]


class Job(Generic[_R]):
    """One submitted call. Await it, or `get` its value."""

    def __init__(self, call: CallRef) -> None:
        """Wrap a submitted call; made by `Function.spawn`."""
        self._call = call

    @property
    def aio(self) -> JobAio:
        """The async twins of `get` and `cancel`."""
        return JobAio(self)

    @property
    def object_ref(self) -> Any:
        """The engine's own reference: on Ray the ``ray.ObjectRef``, to pass on without fetching."""
        return self._call.native

    def get(self, timeout_s: float | None = None) -> _R:
        """Wait for the value.

        Args:
            timeout_s: seconds to wait; without it, for as long as it takes.

        Raises:
            WaitTimeoutError: when the time is up; the call goes on.
            JobCancelledError: when it was cancelled.
            Exception: whatever the call raised.
        """
        value: _R = self._call.result(timeout_s)
        return value

    def done(self) -> bool:
        """Tell whether the call has ended, with a value or an error."""
        return self._call.done()

    def cancel(self) -> None:
        """Stop the call: one that waits will not run, a running one is interrupted.

        One in native code cannot be: seconds later its process is replaced, and what the instance
        held in memory is lost, as when it runs longer than its ``timeout_s``.
        """
        self._call.cancel()

    def _withdraw(self) -> None:
        self._call.withdraw()

    @property
    def status(self) -> JobStatus:
        """How the call stands."""
        if not self._call.done():
            return "pending"
        try:
            self._call.result(0)
        except JobCancelledError:
            return "cancelled"
        except WaitTimeoutError as error:
            # It is sent again, or its value is on its way here; unless this is what it raised.
            return "failed" if isinstance(error.__cause__, RemoteTraceback) else "pending"
        except Exception:
            return "failed"
        return "succeeded"

    def __await__(self) -> Generator[Any, None, _R]:
        """Await the value; cancelling the awaiting task cancels the call."""
        return self._wait().__await__()

    async def _wait(self) -> _R:
        try:
            value: _R = await asyncio.wrap_future(self._call.future())
        except asyncio.CancelledError:
            self._call.cancel()
            raise
        return value

    def __repr__(self) -> str:
        """Show how it stands."""
        return f"<apothic.Job {self.status}>"


class JobAio(Twin[Job[Any]]):
    """Async twins of `Job`."""

    __slots__ = ()

    get: Final = twin(Job.get)
    done: Final = twin(Job.done)
    cancel: Final = twin(Job.cancel)


class RemoteStream(Generic[_R]):
    """The items of a generator method as they come; iterate with ``for`` or ``async for``.

    Leaving the loop early, `close`, or dropping the object stops the producer, so that its
    ``finally`` blocks run.
    """

    def __init__(self, stream: ItemStream) -> None:
        """Wrap a started producer; made by `Function.remote_gen`."""
        self._stream = stream
        self._ended = False

    def __iter__(self) -> Iterator[_R]:
        """Iterate over the items."""
        return self

    def __next__(self) -> _R:
        """Wait for the next item."""
        if self._ended:
            raise StopIteration
        try:
            item: _R = self._stream.next_item()
        except BaseException as error:
            self._note_end(error)
            raise
        return item

    def __aiter__(self) -> AsyncIterator[_R]:
        """Iterate over the items without blocking the event loop."""
        return self

    async def __anext__(self) -> _R:
        """Await the next item."""
        if self._ended:
            raise StopAsyncIteration
        try:
            item: _R = await self._stream.anext_item()
        except BaseException as error:
            self._note_end(error)
            raise
        return item

    def close(self) -> None:
        """Stop the producer; idempotent."""
        self._ended = True
        self._stream.close()

    async def aclose(self) -> None:
        """Stop the producer; idempotent."""
        await in_thread(self.close)

    def __enter__(self) -> RemoteStream[_R]:
        """Give the stream."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the producer."""
        self.close()

    def __del__(self) -> None:
        """Stop the producer when nobody can iterate any more."""
        if not getattr(self, "_ended", True):
            self.close()

    def _note_end(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError) or not isinstance(error, Exception):
            self.close()  # the producer goes on otherwise
        self._ended = True


class Function(Generic[_R]):
    """One method of a class, or of an instance, where it can be called."""

    def __init__(
        self,
        info: MethodInfo,
        signature: Signature | None,
        target: Target | None,
        *,
        owner: str,
        app_name: str | None,
        options: dict[str, Any],
        timeout_s: float,
        retries: Retries,
    ) -> None:
        """Describe a method; made by `Cls` and by instances."""
        self._info = info
        self._target = target
        self._owner = owner
        self._app_name = app_name
        self._options = options
        self._timeout_s = timeout_s
        self._retries = retries
        self._label = f"{owner}.{info.name}"
        self._signature = signature
        self._arity = _arity(signature)

    @property
    def name(self) -> str:
        """The method's name."""
        return self._info.name

    @property
    def kind(self) -> str:
        """``sync``, ``async``, ``generator`` or ``async_generator``."""
        return self._info.kind

    @property
    def info(self) -> MethodInfo:
        """All that is known of the method."""
        return self._info

    @property
    def signature(self) -> Signature | None:
        """The signature without ``self``."""
        return self._signature

    @property
    def options(self) -> dict[str, Any]:
        """The options of its class."""
        return dict(self._options)

    @property
    def timeout_s(self) -> float:
        """Limit on one call's execution, in seconds."""
        return self._timeout_s

    @property
    def retries(self) -> Retries:
        """The retry policy."""
        return self._retries

    @property
    def app_name(self) -> str | None:
        """The app it belongs to."""
        return self._app_name

    @property
    def aio(self) -> FunctionAio:
        """The async twins."""
        return FunctionAio(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what `remote` does; a generator method gives what `remote_gen` gives."""
        if self._info.is_generator:
            return self.remote_gen(*args, **kwargs)
        return self.remote(*args, **kwargs)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method and wait for its value.

        Raises:
            ArgumentError: when the arguments do not fit; nothing is submitted.
            UsageError: when it is a generator method, or stands on a class without an instance.
            PendingTasksExceededError: when too many calls are unfinished.
            FunctionTimeoutError: when it runs longer than `timeout_s`.
            InstanceLostError: when the instance died before the value was there.
            Exception: whatever the method raised.
        """
        target, timeout_s = self._ready(args, kwargs)
        return target.call(self._info, args, kwargs, timeout_s, self._retries)

    def spawn(self, *args: Any, **kwargs: Any) -> Job[_R]:
        """Submit a call and return at once.

        Raises:
            ArgumentError: when the arguments do not fit; nothing is submitted.
            UsageError: when it is a generator method, or stands on a class without an instance.
            PendingTasksExceededError: when too many calls are unfinished.
        """
        target, timeout_s = self._ready(args, kwargs)
        return Job(target.submit(self._info, args, kwargs, timeout_s, self._retries))

    def remote_gen(self, *args: Any, **kwargs: Any) -> RemoteStream[Any]:
        """Start a generator method and iterate over its items as they come.

        Raises:
            ArgumentError: when the arguments do not fit; nothing is submitted.
            UsageError: when the method does not yield.
        """
        if not self._info.is_generator:
            raise UsageError(
                f"{self._label} does not yield: remote_gen is for generator methods. "
                f"Write .remote(…) or .spawn(…)."
            )
        target, timeout_s = self._ready(args, kwargs, yields=True)
        return RemoteStream(target.stream(self._info, args, kwargs, timeout_s, self._retries))

    def map(self, items: Iterable[Any]) -> list[Any]:
        """Call the method with each item; give the values in their order.

        Calls run side by side as far as instance and ``max_pending_tasks`` allow.

        Raises:
            Exception: the first error in the order of the items; calls not yet begun are cancelled,
                those that run go on.
        """
        return self.starmap((item,) for item in items)

    def starmap(self, items: Iterable[Iterable[Any]]) -> list[Any]:
        """Call the method with the arguments in each item; give the values in their order."""
        jobs: list[Job[_R]] = []
        values: list[Any] = []
        try:
            for item in items:
                jobs.append(self._spawn_paced(tuple(item)))
                while len(values) < len(jobs) and jobs[len(values)].done():
                    values.append(jobs[len(values)].get())
            while len(values) < len(jobs):
                values.append(jobs[len(values)].get())
        except BaseException:
            # Those that run may be in native code, which to stop costs the instance its state.
            for job in jobs[len(values) :]:
                job._withdraw()
            raise
        return values

    def for_each(self, items: Iterable[Any]) -> None:
        """Call the method with each item and drop the values.

        Raises:
            Exception: the first error in the order of the items; calls not yet begun are cancelled,
                those that run go on.
        """
        self.starmap((item,) for item in items)

    def spawn_map(self, items: Iterable[Any]) -> list[Job[_R]]:
        """Submit a call for each item; wait only where ``max_pending_tasks`` demands it."""
        jobs: list[Job[_R]] = []
        for item in items:
            jobs.append(self._spawn_paced((item,)))
        return jobs

    def _spawn_paced(self, args: tuple[Any, ...]) -> Job[_R]:
        while True:
            try:
                return self.spawn(*args)
            except PendingTasksExceededError:
                if self._target is None:
                    raise
                self._target.wait_for_slot()

    def _ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, yields: bool = False
    ) -> tuple[Target, float | None]:
        """Check the call as far as this process can, before anything is submitted."""
        target = self._target
        if target is None:
            raise UsageError(
                f"{self._label} was called on the class: a method runs on an instance. Write "
                f"{self._owner}.bind(…).{self._info.name}.remote(…), or use new(…) or named(id, …)."
            )
        if self._info.is_generator and not yields:
            raise UsageError(
                f"{self._label} yields its items: remote and spawn give one value. "
                f"Write .remote_gen(…) and iterate."
            )
        self._check_arguments(args, kwargs)
        return target, None

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._signature is None:
            return
        if not kwargs and self._arity[0] <= len(args) <= self._arity[1]:
            return  # the common case, 50 times cheaper than binding
        bind_arguments(self._label, self._signature, args, kwargs)

    def __repr__(self) -> str:
        """Name the method and its kind."""
        return f"<apothic.{type(self).__name__} {self._label} ({self.kind})>"


class RemoteFunction(Function[_R]):
    """A method whose code is elsewhere. Its verbs also take ``timeout_s`` for the one call.

    A method that has a parameter ``timeout_s`` of its own gets it as any other argument.
    """

    def _ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, yields: bool = False
    ) -> tuple[Target, float | None]:
        timeout_s: float | None = None
        if "timeout_s" in kwargs and not (
            self._signature is not None and "timeout_s" in self._signature.parameters
        ):
            from apothic.options import check_seconds

            given = kwargs.pop("timeout_s")
            timeout_s = None if given is None else check_seconds("timeout_s", given)
        return super()._ready(args, kwargs, yields=yields)[0], timeout_s


def _arity(signature: Signature | None) -> tuple[int, float]:
    """Give the least and the most positional arguments; impossible when keywords are needed."""
    if signature is None:
        return 0, float("inf")
    least, most = 0, 0.0
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = float("inf")
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            return 1, 0
    return least, most


class FunctionAio(Twin[Function[Any]]):
    """Async twins of `Function`: ``remote`` and jobs are awaited natively, on no thread."""

    __slots__ = ()

    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Await the method's value; cancelling the task cancels the call."""
        return await (await self.spawn(*args, **kwargs))

    async def spawn(self, *args: Any, **kwargs: Any) -> Job[Any]:
        """Submit a call."""
        function = self._target
        if function._target is None or not function._target.would_open:
            return function.spawn(*args, **kwargs)
        return await in_thread(function.spawn, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what `remote` does; of a generator method, what `remote_gen` does."""
        if self._target.info.is_generator:
            return self.remote_gen(*args, **kwargs)
        return self.remote(*args, **kwargs)

    async def remote_gen(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Iterate over a generator method's items with ``async for``."""
        stream = await in_thread(self._target.remote_gen, *args, **kwargs)
        try:
            async for item in stream:
                yield item
        finally:
            await stream.aclose()

    map: Final = twin(Function.map)
    starmap: Final = twin(Function.starmap)
    for_each: Final = twin(Function.for_each)
    spawn_map: Final = twin(Function.spawn_map)
