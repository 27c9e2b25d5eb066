"""`FakeInstance`: one instance, and the process that it has at the moment."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from apothic.backend import CallRef, InstanceRef, ItemStream, StartRequest, version_lacks
from apothic.errors import ConflictError, InstanceClosedError, InstanceLostError, SerializationError
from apothic.inprocess import FutureCall, IteratorStream, LoopThread
from apothic.options import ClassOptions
from apothic.packing import dumps
from apothic.testing.process import Process, stuck_error
from apothic.testing.running import Call
from apothic.values import ClassInstanceHandle, CloseReport, InstanceInfo, MethodInfo

if TYPE_CHECKING:
    from apothic.testing.control_plane import FakeControlPlane

__all__ = ["FakeInstance"]


class FakeInstance(InstanceRef):
    """One instance: its name, and the process that it has at the moment."""

    def __init__(self, engine: FakeControlPlane, request: StartRequest, digest: str) -> None:
        self._engine = engine
        self._request = request
        self._options = ClassOptions.model_validate(request.spec.options)
        self._handle = ClassInstanceHandle(
            cluster_id=engine.cluster_id,
            app=request.spec.app,
            cls=request.spec.name,
            instance_id=request.instance_id,
            spec_digest=digest,
            named=request.named,
        )
        self._label = f"{request.spec.app}.{request.spec.name} {request.instance_id!r}"
        self._lock = threading.RLock()
        self._process: Process
        self._restarts = 0
        self._report: CloseReport | None = None
        self.closing: bool = False
        self.ended: threading.Event = threading.Event()

    def spawn(self) -> None:
        undo = ExitStack()

        def clean_up(process: Process) -> None:
            undo.close()
            if process.state == "failed":
                self._engine.forget(self)

        make = partial(
            self._engine.make_object,
            self._label,
            self._request.spec,
            self._options,
            self._request.arguments,
            undo,
        )
        concurrency = self._options.concurrent_requests
        self._process = Process(
            self._label, self._request.spec, concurrency, make, clean_up, self._engine.watch
        )

    def check_same(self, request: StartRequest) -> None:
        if request.match_arguments and (request.arguments_digest != self._request.arguments_digest):
            raise ConflictError(
                f"{self._label} exists already with other constructor arguments. Leave the arguments "
                f"out to use it as it is, close it first, or use another id."
            )

    @property
    def handle(self) -> ClassInstanceHandle:
        return self._handle

    @property
    def native(self) -> Any:
        """The user's object itself; only tests can reach it."""
        return self._process.object

    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> CallRef:
        call = self._submit(method, args, kwargs, timeout_s)
        return _FakeCall(call)

    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> ItemStream:
        feed = self._submit(method, args, kwargs, timeout_s).feed
        assert feed is not None  # only generators are streamed
        return IteratorStream(feed, LoopThread())

    def _submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Call:
        if all(known.name != method.name for known in self._request.spec.methods):
            raise version_lacks(self._label, method.name, self._handle.spec_digest)
        packed = _pack(f"{self._label}.{method.name}", args, kwargs)
        limit_s = self._options.timeout_s if timeout_s is None else timeout_s
        call = Call(self._label, method, limit_s, self._engine.watch)
        call.on_stuck = self._replace
        with self._lock:
            self._process.submit(call, packed)
        return call

    def wait_ready(self) -> None:
        process = self._process
        process.ready.wait()
        if process.failure is not None:
            raise process.failure

    def inspect(self) -> InstanceInfo:
        process = self._process
        if self.closing or process.state in ("failed", "lost"):
            raise process.failure or InstanceClosedError(
                f"{self._label} is closed. Make or name a new instance."
            )
        return self.info()

    def info(self) -> InstanceInfo:
        process, spec = self._process, self._request.spec
        return InstanceInfo(
            app=spec.app,
            cls=spec.name,
            instance_id=self._handle.instance_id,
            named=self._handle.named,
            state=process.state,
            spec_digest=self._handle.spec_digest,
            tags=spec.tags,
            metadata=spec.metadata,
            pid=os.getpid(),
            running_calls=process.running,
            finished_calls=process.finished,
            restarts=self._restarts,
            started_unix_s=process.started_unix_s,
            arguments_digest=self._request.arguments_digest,
        )

    def close(self) -> CloseReport:
        with self._lock:
            first, self.closing = not self.closing, True
        if not first:
            self.ended.wait()
            return self._report or CloseReport(closed=False)
        try:
            self._report = self._process.stop()
        finally:
            self._engine.forget(self)
            self.ended.set()
        return self._report

    def release(self) -> None:
        # This process is the only holder there can be; named instances are held by nobody.
        if not self._handle.named:
            self.close()

    def kill(self) -> None:
        lost = InstanceLostError(
            f"{self._label} lost its process; calls in flight may or may not have had effects. A named "
            f"instance comes back by itself, retries= tries again."
        )
        with self._lock:
            old = self._process
            if self._handle.named:
                self._restarts += 1
                self.spawn()
            else:
                self.closing = True
                self._engine.forget(self)
                self.ended.set()
        old.abandon(lost)

    def _replace(self, call: Call) -> None:
        """Leave a thread that cannot be interrupted to itself, and start anew."""
        with self._lock:
            old = self._process
            if self.closing or call.future.done():
                return
            call.fail(stuck_error(call))
            self._restarts += 1
            self.spawn()
        old.abandon(
            InstanceLostError(
                f"{self._label} was replaced, since {call.method.name} could not be interrupted; "
                f"calls in flight may or may not have had effects. retries= tries again."
            )
        )


class _FakeCall(FutureCall):
    """A call that its thread may not have come to yet."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        super().__init__(call.future, partial(call.interrupt, "cancelled"))
        self._call = call

    def withdraw(self) -> None:
        self._call.withdraw()


def _pack(label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return dumps((args, kwargs))
    except SerializationError:
        for name, value in [*((f"#{i}", a) for i, a in enumerate(args, 1)), *kwargs.items()]:
            try:
                dumps(value)
            except SerializationError as error:
                raise SerializationError(
                    f"{label}: argument {name} of type {type(value).__qualname__} cannot travel: "
                    f"{error}"
                ) from error
        raise
