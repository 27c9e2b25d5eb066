"""A session whose workspace is a container, on an event loop of this process: no Ray between."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from apothic import Sandbox, SandboxSession
from apothic.backend import CallRef, ItemStream, SandboxRef
from apothic.errors import SandboxClosedError
from apothic.inprocess import FutureCall, LoopThread
from apothic.local_session.pumped import PumpedStream
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
from apothic.session_core import SessionCore
from apothic.values import CloseReport
from ray_backend.sandbox.containers import ContainerPlan, OpenedContainer, open_container
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import OwnerLabels

IMAGE = "apothic-test-debian"


class ContainerRef(SandboxRef):
    """What an engine's reference is, without an engine."""

    def __init__(
        self, engine: Engine, owner: OwnerLabels, concurrent_requests: int = 1, **changes: Any
    ) -> None:
        name = f"apothic-{uuid.uuid4().hex[:12]}"
        self.loop = LoopThread()
        fields: dict[str, Any] = {
            "name": name,
            "label": f"conformance {name!r}",
            "image": IMAGE,
            "owner": owner,
            "memory_mb": 512,
            "cpu": 0,
        }
        self.plan = ContainerPlan(**{**fields, **changes})
        self.opened: OpenedContainer
        self._handle = SandboxHandle(
            cluster_id="none", app="", sandbox="conformance", sandbox_id=name, spec_digest="",
            named=False,
        )  # fmt: skip
        self._closed = False
        try:
            self.loop.run(self._open(engine, concurrent_requests))
        except BaseException:
            self.loop.stop()
            raise

    async def _open(self, engine: Engine, concurrent_requests: int) -> None:
        self.opened = await open_container(engine, self.plan)
        self.core = SessionCore(
            self.opened.workspace,
            label=self.plan.label,
            concurrent_requests=concurrent_requests,
        )
        try:
            await self.core.start(b"/", {})
        except BaseException:
            await self.core.close()
            raise

    @property
    def handle(self) -> SandboxHandle:
        return self._handle

    @property
    def native(self) -> OpenedContainer:
        return self.opened

    def call(self, verb: str, *args: Any) -> CallRef:
        self._check()
        coroutine = getattr(self.core, verb)(*args)
        return FutureCall(asyncio.run_coroutine_threadsafe(coroutine, self.loop.loop()))

    def stream(self, verb: str, *args: Any) -> ItemStream:
        self._check()
        return PumpedStream(getattr(self.core, verb)(*args), self.loop.loop())

    def _check(self) -> None:
        if self._closed:
            raise SandboxClosedError(f"{self.plan.label} is closed. Open another session.")

    def wait_ready(self) -> None:
        return None

    def inspect(self) -> SandboxSessionInfo:
        status = self.core.status()
        return SandboxSessionInfo(
            app="",
            sandbox="conformance",
            sandbox_id=self._handle.sandbox_id,
            named=False,
            local=False,
            state="closed" if self._closed else "ready",
            cwd=status.cwd.decode(),
            running_calls=status.running_calls,
            finished_calls=status.finished_calls,
            started_unix_s=status.started_unix_s,
            container_id=self.opened.id,
        )

    def close(self) -> CloseReport:
        if self._closed:
            return CloseReport(closed=False)
        self._closed = True
        try:
            self.loop.run(self._close())
        finally:
            self.loop.stop()
        return CloseReport(closed=True)

    async def _close(self) -> None:
        await self.core.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    def release(self) -> None:
        self.close()


def open_session(
    engine: Engine, owner: OwnerLabels, sandbox: Sandbox, **changes: Any
) -> SandboxSession:
    """Open a session in a container of its own."""
    at_once = sandbox.options.concurrent_requests
    return SandboxSession(sandbox, ContainerRef(engine, owner, at_once, **changes))
