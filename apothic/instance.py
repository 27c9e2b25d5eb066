"""`ClassInstance` and `LocalClassInstance`: what the verbs of `Cls` give."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from apothic.backend import CallRef, InstanceRef, ItemStream
from apothic.errors import InstanceClosedError, MethodNotFoundError, UsageError
from apothic.function import Function, RemoteFunction
from apothic.inprocess import FutureCall, IteratorStream, LoopThread, run_now
from apothic.targets import Target
from apothic.twins import Twin, twin
from apothic.values import (
    ClassInstanceHandle,
    CloseReport,
    HookResult,
    InstanceInfo,
    MethodInfo,
)

if TYPE_CHECKING:
    from apothic.cls import Cls

__all__ = ["ClassInstance", "ClassInstanceAio", "LocalClassInstance", "LocalClassInstanceAio"]


class ClassInstance:
    """A live instance of a class on the cluster. Its remote methods are its attributes.

    ``inst.predict.remote(x)`` calls and waits, ``inst.predict.spawn(x)`` submits,
    ``await inst.predict.aio.remote(x)`` awaits, and ``inst.predict(x)`` is ``.remote(x)``. An
    instance can be passed to other remote calls and pickles to its handle. With ``with`` it is
    closed at the end.
    """

    def __init__(self, cls: Cls, target: Target) -> None:
        """Wrap a target; made by the verbs of `Cls`."""
        self._cls = cls
        self._target = target
        self._functions: dict[str, RemoteFunction[Any]] = {}

    @property
    def cls(self) -> Cls:
        """The class."""
        return self._cls

    @property
    def aio(self) -> ClassInstanceAio:
        """The async twins of `inspect` and `close`."""
        return ClassInstanceAio(self)

    @property
    def handle(self) -> ClassInstanceHandle:
        """Where it is, for `Cls.attach` in any job of the cluster."""
        return self._target.primary().handle

    @property
    def handle_json(self) -> str:
        """The handle as JSON."""
        return self.handle.model_dump_json()

    @property
    def id(self) -> str:
        """Its id within the class."""
        return self.handle.instance_id

    @property
    def actor(self) -> Any:
        """The engine's own handle: on Ray the actor handle."""
        return self._target.primary().native

    @property
    def closed(self) -> bool:
        """Whether it was closed through this object."""
        return self._target.closed

    def inspect(self) -> InstanceInfo:
        """Ask how it is; answered also while calls are running.

        Raises:
            InstanceClosedError: when it is closed.
            InstanceLostError: when its process is gone.
        """
        return self._target.primary().inspect()

    def close(self) -> CloseReport:
        """Stop it: refuse new calls, let running ones finish, run the exit hooks, free the name.

        Running calls get 10 seconds, then they are interrupted. Idempotent. It is closed for every
        object that reaches it; another one of `Cls.bind` starts it again at its next call.

        Returns:
            The exit hooks that ran, and how; a failing hook is reported here, not raised.
        """
        return self._target.close()

    def __enter__(self) -> ClassInstance:
        """Wait until it is ready."""
        self._target.primary().wait_ready()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    async def __aenter__(self) -> ClassInstance:
        """Wait until it is ready."""
        return await self.aio.__aenter__()

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        await self.aio.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the remote method ``__call__``, where the class has one."""
        return self._function("__call__")(*args, **kwargs)

    def __getattr__(self, name: str) -> RemoteFunction[Any]:
        """Give a remote method."""
        if name.startswith("_") or hasattr(type(self), name):
            return object.__getattribute__(self, name)  # type: ignore[no-any-return]
        return self._function(name)

    def __dir__(self) -> list[str]:
        """List verbs and remote methods."""
        return sorted({*super().__dir__(), *self._cls.method_names})

    def _function(self, name: str) -> RemoteFunction[Any]:
        function = self._functions.get(name)
        if function is None:
            function = self._cls._instance_function(name, self._target)
            # In the instance's dict the next access finds it without __getattr__.
            self._functions[name] = function
            if not name.startswith("_"):
                self.__dict__[name] = function
        return function

    def __reduce__(self) -> tuple[Callable[[str], ClassInstance], tuple[str]]:
        """Travel as the handle; the other side attaches at first use."""
        return _from_handle, (self.handle_json,)

    def __repr__(self) -> str:
        """Name the class and, once known, the id."""
        state = "closed" if self.closed else "open" if self._target.is_open else "not started"
        return f"<apothic.ClassInstance {self._target.label} ({state})>"


class ClassInstanceAio(Twin[ClassInstance]):
    """Async twins of `ClassInstance`."""

    __slots__ = ()

    inspect: Final = twin(ClassInstance.inspect)
    close: Final = twin(ClassInstance.close)

    async def __aenter__(self) -> ClassInstance:
        """Wait until the instance is ready."""
        await twin(ClassInstance.__enter__)(self)
        return self._target

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        await self.close()


def _from_handle(handle_json: str) -> ClassInstance:
    from apothic.cls import Cls

    return Cls.from_handle(handle_json)


class _LocalRef(InstanceRef):
    """The user's object in this process, as a target sees it."""

    def __init__(self, owner: LocalClassInstance) -> None:
        self._owner = owner

    @property
    def handle(self) -> ClassInstanceHandle:
        raise UsageError(
            "a local instance has no handle: it lives in this process only. Use new or named for "
            "one that others can reach."
        )

    @property
    def native(self) -> Any:
        return self._owner.obj

    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> CallRef:
        bound = getattr(self._owner.obj, method.name)
        return FutureCall(run_now(self._owner._loop, bound, method, args, kwargs))

    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> ItemStream:
        items = getattr(self._owner.obj, method.name)(*args, **kwargs)
        return IteratorStream(items, self._owner._loop)

    def wait_ready(self) -> None:
        return None

    def inspect(self) -> InstanceInfo:
        raise UsageError("a local instance is not on the cluster: look at its .obj.")

    def close(self) -> CloseReport:
        return self._owner._run_exit_hooks()

    def release(self) -> None:
        self._owner._run_exit_hooks()


class LocalClassInstance:
    """The user's object in this process, after its ``enter`` hooks, until `close`.

    Its attributes are the object's own. A remote method is called directly, ``inst.predict(x)``, on
    the calling thread; its verbs (``.remote``, ``.map``, …) work too and run at once. Placement,
    time limits, retries, secrets and volumes are the cluster's and do not apply here.
    """

    def __init__(self, cls: Cls, obj: Any) -> None:
        """Wrap a constructed object and run its enter hooks; made by `Cls.local`."""
        self._cls = cls
        self._obj = obj
        self._loop = LoopThread()
        self._target = Target(
            lambda _: _LocalRef(self), label=f"{cls.name} (local)", max_pending=2**31
        )
        self._functions: dict[str, Function[Any]] = {}
        try:
            for name in cls.enter_hook_names:
                self._run_hook(name)
        except BaseException:
            self._loop.stop()
            raise

    @property
    def cls(self) -> Cls:
        """The class."""
        return self._cls

    @property
    def obj(self) -> Any:
        """The user's object."""
        return self._obj

    @property
    def aio(self) -> LocalClassInstanceAio:
        """The async twin of `close`."""
        return LocalClassInstanceAio(self)

    @property
    def closed(self) -> bool:
        """Whether `close` ran."""
        return self._target.closed

    def close(self) -> CloseReport:
        """Run the exit hooks, once; idempotent."""
        self._target.primary() if not self.closed else None
        return self._target.close()

    def __enter__(self) -> LocalClassInstance:
        """Give the instance; its enter hooks have run."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Run the exit hooks."""
        self.close()

    async def __aenter__(self) -> LocalClassInstance:
        """Give the instance; its enter hooks have run."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Run the exit hooks."""
        await self.aio.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the object."""
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Give a remote method with its verbs, or the object's own attribute."""
        if name.startswith("__") or "_obj" not in self.__dict__:
            raise AttributeError(name)
        if self._target.closed:
            raise InstanceClosedError(
                f"{self._cls.name} (local) is closed. Make another with {self._cls.name}.local(…)."
            )
        if self._cls.has_method(name):
            if name not in self._functions:
                function = self._cls._local_function(name, self._target)
                self._functions[name] = _LocalMethod(function, getattr(self._obj, name))
            return self._functions[name]
        return getattr(self._obj, name)

    def _run_hook(self, name: str) -> None:
        value = getattr(self._obj, name)()
        if inspect.isawaitable(value):
            self._loop.run(_await(value))

    def _run_exit_hooks(self) -> CloseReport:
        import time
        import traceback

        results = []
        for name in reversed(self._cls.exit_hook_names):
            begin = time.perf_counter()
            error = trace = None
            try:
                self._run_hook(name)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
                trace = "".join(traceback.format_exception(failure))
            results.append(
                HookResult(
                    name=name,
                    duration_s=time.perf_counter() - begin,
                    error=error,
                    traceback=trace,
                )
            )
        self._loop.stop()
        return CloseReport(closed=True, hooks=tuple(results))

    def __repr__(self) -> str:
        """Name the class and the state."""
        return (
            f"<apothic.LocalClassInstance {self._cls.name} ({'closed' if self.closed else 'open'})>"
        )


class LocalClassInstanceAio(Twin[LocalClassInstance]):
    """Async twin of `LocalClassInstance`."""

    __slots__ = ()

    close: Final = twin(LocalClassInstance.close)


class _LocalMethod(Function[Any]):
    """A method of a local object: called directly it is the object's own bound method."""

    def __init__(self, function: Function[Any], bound: Callable[..., Any]) -> None:
        self.__dict__.update(function.__dict__)
        self._bound = bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._bound(*args, **kwargs)


async def _await(value: Any) -> Any:
    return await value


def missing_method(owner: str, name: str, known: tuple[str, ...], local: object) -> Exception:
    """Give the error for a method that is not remote, saying why and which there are."""
    if local is not None and hasattr(local, name):
        kind = "property" if isinstance(getattr(local, name), property) else "attribute"
        if callable(getattr(local, name)):
            kind = "function"
        return MethodNotFoundError(
            f"{owner}.{name} is a {kind} of the class, not a remote method: an instance runs in "
            f"another process, where only methods marked @method() can be called. Mark it, or "
            f"write a method that returns it."
        )
    return MethodNotFoundError(
        f"{owner} has no remote method {name!r}: it has {', '.join(known) or 'none'}. "
        f"Check the spelling, or mark the method with @method()."
    )
