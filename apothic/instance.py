"""`ClassInstance` and `LocalClassInstance`: what the verbs of `Cls` give."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from apothic.backend import CallRef, InstanceRef, ItemStream, connected
from apothic.errors import (
    ApothicError,
    InstanceClosedError,
    InstanceNotFoundError,
    MethodNotFoundError,
    UsageError,
)
from apothic.function import Function, RemoteFunction
from apothic.inprocess import (
    Awaiting,
    FutureCall,
    IteratorStream,
    LoopThread,
    await_steps,
    format_error,
    run_now,
    run_steps,
)
from apothic.targets import Target
from apothic.tracebacks import text_of
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
    instance can be passed to other remote calls and pickles to its handle: it is attached again where
    it is loaded if that process is connected, else at first use. With ``with`` it is closed at the
    end.
    """

    def __init__(self, cls: Cls, target: Target) -> None:
        """Wrap a target; made by the verbs of `Cls`."""
        self._parts: tuple[Cls, Target] | None = (cls, target)
        self._loaded: ClassInstanceHandle | None = None
        self._functions: dict[str, RemoteFunction[Any]] = {}

    @classmethod
    def _unattached(cls, handle: ClassInstanceHandle) -> ClassInstance:
        made = cls.__new__(cls)
        made._parts, made._loaded, made._functions = None, handle, {}
        return made

    def _attached(self) -> tuple[Cls, Target]:
        if self._parts is None:
            from apothic.cls import Cls

            assert self._loaded is not None  # it has one or the other
            self._parts = Cls.from_handle(self._loaded)._attached()
        return self._parts

    @property
    def _cls(self) -> Cls:
        return self._attached()[0]

    @property
    def _target(self) -> Target:
        return self._attached()[1]

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
        if self._parts is None and self._loaded is not None:
            return self._loaded
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
        return self._parts is not None and self._parts[1].closed

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
        try:
            target = self._target
        except InstanceNotFoundError:
            return CloseReport(closed=False, note="it was closed before")
        return target.close()

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
        methods = () if self._parts is None else self._parts[0].method_names
        return sorted({*super().__dir__(), *methods})

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
        """Travel as the handle; see the class."""
        return _from_handle, (self.handle_json,)

    def __repr__(self) -> str:
        """Name the class and, once known, the id."""
        if self._parts is None:
            handle = self.handle
            label = f"{handle.app}.{handle.cls} {handle.instance_id!r}"
            return f"<apothic.ClassInstance {label} (not attached)>"
        target = self._parts[1]
        state = "closed" if target.closed else "open" if target.is_open else "not started"
        return f"<apothic.ClassInstance {target.label} ({state})>"


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
    made = ClassInstance._unattached(ClassInstanceHandle.parse(handle_json))
    # What it came in must load, also where it is gone, or no cluster can be reached: its first use
    # says so. But a process that is connected takes its lease now: until its first use whoever sent
    # it may have ended, and the instance with its last lease.
    with contextlib.suppress(ApothicError):
        if connected() is not None:
            made._attached()
    return made


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
        return CloseReport(
            closed=True
        )  # the owner runs the hooks, where its caller waits or awaits

    def release(self) -> None:
        return None


class LocalClassInstance:
    """The user's object in this process, after its ``enter`` hooks, until `close`.

    Its attributes are the object's own. A remote method is called directly, ``inst.predict(x)``, on
    the calling thread; its verbs (``.remote``, ``.map``, …) work too and run at once. Hooks run on
    the thread that makes or closes it. Async ones are awaited by ``Cls.aio.local`` on the caller's
    loop; with ``Cls.local`` they run on a loop of the instance's own. Placement, time limits,
    retries, secrets and volumes are the cluster's and do not apply here.
    """

    def __init__(self, cls: Cls, obj: Any) -> None:
        """Wrap a constructed object, before its enter hooks; made by `Cls.local`."""
        self._cls = cls
        self._obj = obj
        self._loop = LoopThread()
        self._awaits_here = False
        self._target = Target(
            lambda _: _LocalRef(self), label=f"{cls._label} (local)", max_pending=2**31
        )
        self._target.primary()  # it is there: no verb need wait for it on another thread
        self._functions: dict[str, Function[Any]] = {}

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
        """Run the exit hooks, once, each even if another failed; idempotent.

        Returns:
            The hooks that ran, and how; a failing one is reported here and on stderr, not raised.
        """
        return run_steps(self._exiting(), self._loop)

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

    def _entered(self) -> LocalClassInstance:
        return run_steps(self._entering(), self._loop)

    async def _aentered(self) -> LocalClassInstance:
        self._awaits_here = True
        return await await_steps(self._entering(), None)

    async def _aclose(self) -> CloseReport:
        return await await_steps(self._exiting(), None if self._awaits_here else self._loop)

    def _entering(self) -> Awaiting[LocalClassInstance]:
        try:
            for name in self._cls.enter_hook_names:
                yield from self._hook(name)
        except BaseException:
            self._loop.stop()
            raise
        return self

    def _exiting(self) -> Awaiting[CloseReport]:
        report = self._target.close()
        if not report.closed:
            return report
        results: list[HookResult] = []
        interrupt: KeyboardInterrupt | None = None
        try:
            for name in reversed(self._cls.exit_hook_names):
                begin = time.perf_counter()
                failure: BaseException | None = None
                try:
                    yield from self._hook(name)
                except GeneratorExit:  # whoever closes it has gone
                    raise
                except KeyboardInterrupt as error:
                    failure = interrupt = error
                except BaseException as error:
                    failure = error
                results.append(self._result(name, time.perf_counter() - begin, failure))
        finally:
            self._loop.stop()
        if interrupt is not None:
            raise interrupt
        return CloseReport(closed=True, hooks=tuple(results))

    def _hook(self, name: str) -> Awaiting[None]:
        value = getattr(self._obj, name)()
        if inspect.isawaitable(value):
            yield value

    def _result(self, name: str, duration_s: float, failure: BaseException | None) -> HookResult:
        if failure is None:
            return HookResult(name=name, duration_s=duration_s)
        kind, text, trace = type(failure).__name__, text_of(failure), format_error(failure)
        print(f"apothic: exit hook {name} of {self._target.label} failed\n{trace}", file=sys.stderr)
        return HookResult(
            name=name,
            duration_s=duration_s,
            error=f"{kind}: {text}" if text else kind,
            traceback=trace,
        )

    def __repr__(self) -> str:
        """Name the class and the state."""
        return (
            f"<apothic.LocalClassInstance {self._cls.name} ({'closed' if self.closed else 'open'})>"
        )


class LocalClassInstanceAio(Twin[LocalClassInstance]):
    """Async twin of `LocalClassInstance`; it stays on the calling thread."""

    __slots__ = ()

    async def close(self) -> CloseReport:
        """Do what `LocalClassInstance.close` does, and await the async hooks."""
        return await self._target._aclose()


class _LocalMethod(Function[Any]):
    """A method of a local object: called directly it is the object's own bound method."""

    def __init__(self, function: Function[Any], bound: Callable[..., Any]) -> None:
        self.__dict__.update(function.__dict__)
        self._bound = bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._bound(*args, **kwargs)


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
