"""Sessions in containers without Ray: `SandboxHost` on a thread of this process, behind the seam."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import threading
from typing import Any

from typing_extensions import override

from apothic.backend import CallRef, ItemStream, SandboxRef, SandboxRequest
from apothic.errors import SandboxLimitError, SandboxSessionNotFoundError
from apothic.inprocess import FutureCall, LoopThread
from apothic.local_session.pumped import PumpedStream
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo, SandboxSpec
from apothic.testing import FakeControlPlane
from apothic.values import CloseReport
from ray_backend.sandbox.containers import NodeSurroundings
from ray_backend.sandbox.engine.labels import OwnerLabels, RayletId
from ray_backend.sandbox.host import SandboxHost
from ray_backend.sandbox.plan import SandboxPlan

NODE = "this-node"


class DirectEngine(FakeControlPlane):
    """The engine for tests, with containers in place of this machine."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[tuple[str, str, str], DirectRef] = {}
        self.opened: list[DirectRef] = []
        self.specs: dict[str, SandboxSpec] = {}
        self.blobs: dict[str, bytes] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.node_addresses: list[str] = []
        self._sandbox_lock = threading.Lock()

    @override
    def start_sandbox(self, request: SandboxRequest) -> SandboxRef:
        spec = request.spec
        key = (spec.app, spec.name, request.sandbox_id)
        with self._sandbox_lock:
            if key in self.sessions:
                return self.sessions[key]
            if sum(other[:2] == key[:2] for other in self.sessions) >= request.max_sessions:
                raise SandboxLimitError("max_containers × tasks_per_container sessions live.")
            self.blobs.update(request.blobs())
            self.specs[spec.digest] = spec
            self.sessions[key] = ref = DirectRef(self, self.plan(request), request.named)
            self.opened.append(ref)
            return ref

    def plan(self, request: SandboxRequest) -> SandboxPlan:
        return SandboxPlan(
            actor_name=f"{request.spec.app}:~{request.spec.name}:{request.sandbox_id}",
            cluster_id=self.cluster_id,
            sandbox_id=request.sandbox_id,
            named=request.named,
            spec_json=request.spec.model_dump_json(),
            cwd=request.cwd,
            env=pickle.dumps(dict(request.env)),
            arguments_digest=request.arguments_digest,
        )

    def around(self, plan: SandboxPlan) -> NodeSurroundings:
        raylet = RayletId.of_process(os.getpid())
        return NodeSurroundings(
            owner=OwnerLabels(self.cluster_id, "tests", raylet, plan.actor_name, "actor"),
            node_id=NODE,
            gpu_ids=(),
            fetch=self.blobs.__getitem__,
            secret=self.secrets.get,
            pin_volume=lambda name: NODE,
            node_addresses=lambda: self.node_addresses,
        )

    @override
    def attach_sandbox(self, handle: SandboxHandle) -> SandboxRef:
        found = self.sessions.get((handle.app, handle.sandbox, handle.sandbox_id))
        if found is None:
            raise SandboxSessionNotFoundError(f"{handle.sandbox_id!r} does not live.")
        return found

    @override
    def find_sandbox_spec(self, digest: str) -> SandboxSpec | None:
        return self.specs.get(digest)

    @override
    def list_sandboxes(
        self, app: str | None = None, sandbox: str | None = None
    ) -> list[SandboxSessionInfo]:
        return [ref.inspect() for ref in self.sessions.values()]

    @override
    def disconnect(self) -> None:
        for ref in self.opened:
            ref.close()
            ref.end()
        super().disconnect()


class DirectRef(SandboxRef):
    """One session."""

    def __init__(self, engine: DirectEngine, plan: SandboxPlan, named: bool) -> None:
        spec = plan.spec
        self._engine = engine
        self.plan = plan
        self._loop = LoopThread()
        self._handle = SandboxHandle(
            cluster_id=engine.cluster_id,
            app=spec.app,
            sandbox=spec.name,
            sandbox_id=plan.sandbox_id,
            spec_digest=spec.digest,
            named=named,
        )
        self.host = SandboxHost(plan, engine.around(plan))
        self._closed = False
        self._lock = threading.Lock()

    @property
    @override
    def handle(self) -> SandboxHandle:
        return self._handle

    @property
    @override
    def native(self) -> SandboxHost:
        return self.host

    @override
    def call(self, verb: str, *args: Any) -> CallRef:
        async def run() -> Any:
            return await getattr(await self.host.core(), verb)(*args)

        return FutureCall(asyncio.run_coroutine_threadsafe(run(), self._loop.loop()))

    @override
    def stream(self, verb: str, *args: Any) -> ItemStream:
        core = self._loop.run(self.host.core())
        return PumpedStream(getattr(core, verb)(*args), self._loop.loop())

    @override
    def wait_ready(self) -> None:
        try:
            self._loop.run(self.host.start())
        except BaseException:
            self.close()
            raise

    @override
    def inspect(self) -> SandboxSessionInfo:
        async def ask() -> dict[str, Any]:
            await self.host.core()
            return self.host.status()

        status = self._loop.run(ask())
        handle = self._handle
        return SandboxSessionInfo(
            app=handle.app,
            sandbox=handle.sandbox,
            sandbox_id=handle.sandbox_id,
            named=handle.named,
            local=False,
            state=status["state"],
            cwd=status["cwd"].decode(),
            running_calls=status["running"],
            finished_calls=status["finished"],
            arguments_digest=status["arguments_digest"],
            container_id=status["container_id"],
            notes=tuple(status["notes"]),
        )

    @override
    def close(self) -> CloseReport:
        with self._lock:
            if self._closed:
                return CloseReport(closed=False)
            self._closed = True
        self._loop.run(self._stop())
        key = (self._handle.app, self._handle.sandbox, self._handle.sandbox_id)
        with contextlib.suppress(KeyError):
            del self._engine.sessions[key]
        return CloseReport(closed=True)

    async def _stop(self) -> None:
        await self.host.stop()

    def end(self) -> None:
        """End the thread."""
        self._loop.stop()

    @override
    def release(self) -> None:
        self.close()
