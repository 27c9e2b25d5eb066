"""A session whose core is in this process, as `SandboxSession` reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import uuid
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from typing_extensions import Self, override

from apothic.backend import CallRef, ItemStream, SandboxRef
from apothic.errors import SandboxClosedError
from apothic.inprocess import FutureCall, LoopThread
from apothic.local_session.pumped import PumpedStream
from apothic.local_session.workspace import LocalWorkspace
from apothic.sandbox_values import LOCAL_CLUSTER, SandboxHandle, SandboxSessionInfo
from apothic.session_core import SessionCore
from apothic.values import CloseReport, Network

__all__ = ["CoreRef", "open_local"]


def open_local(
    *,
    app: str,
    sandbox: str,
    cwd: bytes | None,
    env: Mapping[bytes, bytes | None],
    concurrent_requests: int,
) -> CoreRef:
    """Open a local session; without ``cwd`` it works in a directory of its own."""
    handle = SandboxHandle(
        cluster_id=LOCAL_CLUSTER,
        app=app,
        sandbox=sandbox,
        sandbox_id=f"local-{uuid.uuid4().hex}",
        spec_digest="",
        named=False,
    )
    label = f"{app}.{sandbox} (local)" if app else f"{sandbox} (local)"
    return CoreRef.open(
        handle, label=label, cwd=cwd, env=env, concurrent_requests=concurrent_requests
    )


class CoreRef(SandboxRef):
    """A core on an event loop of its own, in a thread of this process."""

    def __init__(self, handle: SandboxHandle, loop: LoopThread) -> None:
        """Note where it runs; `open` makes it."""
        self._handle = handle
        self._loop = loop
        self._lock = threading.Lock()
        self._closing = False  # verbs are refused
        self._being_closed = False  # by somebody, or it is closed
        self._close_run: Future[None] | None = None
        self._streams: weakref.WeakSet[PumpedStream] = weakref.WeakSet()
        self._core: SessionCore
        self._workspace: LocalWorkspace
        self._end: weakref.finalize[[int, LocalWorkspace, SessionCore, LoopThread], CoreRef]
        self.network: Network | None = None
        self.arguments_digest: str | None = None

    @classmethod
    def open(
        cls,
        handle: SandboxHandle,
        *,
        label: str,
        cwd: bytes | None,
        env: Mapping[bytes, bytes | None],
        concurrent_requests: int,
        secrets: Mapping[bytes, bytes] | None = None,
    ) -> Self:
        """Open a session on this machine.

        Raises:
            SandboxStartError: this machine refuses a process or a directory.
            SandboxFileError: ``cwd`` cannot be a directory.
        """
        ref = cls(handle, LoopThread())
        try:
            ref._loop.run(ref._open(label, cwd, env, concurrent_requests, secrets))
        except BaseException:
            ref._loop.stop()
            raise
        return ref

    async def _open(
        self,
        label: str,
        cwd: bytes | None,
        env: Mapping[bytes, bytes | None],
        concurrent_requests: int,
        secrets: Mapping[bytes, bytes] | None,
    ) -> None:
        self._workspace = LocalWorkspace()
        self._core = SessionCore(
            self._workspace, label=label, secrets=secrets, concurrent_requests=concurrent_requests
        )
        try:
            await self._core.start(cwd or self._workspace.directory.encode(), env)
        except BaseException:
            await self._core.close()
            raise
        self._end = weakref.finalize(
            self, _drop, os.getpid(), self._workspace, self._core, self._loop
        )

    @property
    @override
    def handle(self) -> SandboxHandle:
        return self._handle

    @property
    @override
    def native(self) -> SessionCore:
        """The core."""
        return self._core

    @override
    def call(self, verb: str, *args: Any) -> CallRef:
        with self._lock:
            loop = self._open_loop()
            coroutine = getattr(self._core, verb)(*args)
            return FutureCall(asyncio.run_coroutine_threadsafe(coroutine, loop))

    @override
    def stream(self, verb: str, *args: Any) -> ItemStream:
        with self._lock:
            stream = PumpedStream(getattr(self._core, verb)(*args), self._open_loop())
            self._streams.add(stream)
            return stream

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        if self._closing:
            raise SandboxClosedError(
                f"{self._handle.sandbox} {self._handle.sandbox_id!r} is closed. Open another session."
            )
        return self._loop.loop()

    @override
    def wait_ready(self) -> None:
        return None

    @override
    def inspect(self) -> SandboxSessionInfo:
        status = self._core.status()
        handle = self._handle
        return SandboxSessionInfo(
            app=handle.app,
            sandbox=handle.sandbox,
            sandbox_id=handle.sandbox_id,
            named=handle.named,
            local=handle.cluster_id == LOCAL_CLUSTER,
            state="closed" if self._closing else "ready",
            spec_digest=handle.spec_digest,
            cwd=status.cwd.decode("utf-8", "surrogateescape"),
            network=self.network,
            running_calls=status.running_calls,
            finished_calls=status.finished_calls,
            started_unix_s=status.started_unix_s,
            arguments_digest=self.arguments_digest,
        )

    @override
    def close(self) -> CloseReport:
        with self._lock:
            if self._being_closed:
                return CloseReport(closed=False, note="it was closed before")
            self._closing = self._being_closed = True
            run = self._close_run
            if run is None or run.done():  # else one goes on whose caller was interrupted
                self._end.detach()
                run = asyncio.run_coroutine_threadsafe(self._close(), self._loop.loop())
                self._close_run = run
        try:
            run.result()
        except BaseException:
            if run.done():
                self._loop.stop()
            self._being_closed = False
            raise
        self._loop.stop()
        return CloseReport(closed=True)

    async def _close(self) -> None:
        try:
            await self._core.close()
        finally:
            for stream in list(self._streams):
                stream.cancel()
            # The verbs that were running have failed; their callers are to learn it.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others)

    @override
    def release(self) -> None:
        self.close()


def _drop(owner: int, workspace: LocalWorkspace, core: SessionCore, loop: LoopThread) -> None:
    """End what nobody refers to any more, or what the end of the process finds open."""
    if os.getpid() != owner:
        return  # a fork's copy
    workspace.let_go()
    if not threading.main_thread().is_alive():
        return  # the process ends, and a thread would be cut off: the supervisor does the rest

    def close() -> None:
        loop.run(core.close())
        loop.stop()

    # A collection may come on the loop's own thread.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=close, name="apothic-drop", daemon=True).start()
