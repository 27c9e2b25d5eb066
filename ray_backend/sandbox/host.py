"""`SandboxHost`: the life of one session on its node; plain, on one event loop, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from apothic.errors import (
    ImageBuildError,
    ImageNotFoundError,
    InvalidOptionError,
    SandboxClosedError,
    SandboxEngineError,
    SandboxError,
    SandboxFileError,
    SandboxLostError,
    SandboxNetworkError,
    SandboxStartError,
)
from apothic.session_core import SessionCore
from ray_backend.sandbox.containers import (
    DISK_LOOK_S,
    NODES_LOOK_S,
    NodeSurroundings,
    SessionContainer,
    find_container,
    open_container,
    remove_leftover,
    secret_variables,
)
from ray_backend.sandbox.engine.address import NoEngineError
from ray_backend.sandbox.engine.faults import FaultPoint, no_fault
from ray_backend.sandbox.plan import SandboxPlan

if TYPE_CHECKING:
    from ray_backend.sandbox.agent_workspace import AgentWorkspace

__all__ = ["HostState", "SandboxHost"]

HostState = Literal["new", "starting", "ready", "lost", "closing", "closed"]

_ITSELF = (
    ImageBuildError,
    ImageNotFoundError,
    InvalidOptionError,
    SandboxFileError,
    SandboxNetworkError,
    SandboxStartError,
)
"""Failures to start that say themselves what the user is to change; others are the node's."""


class SandboxHost:
    """One session: its container, its core, and which state it is in."""

    def __init__(
        self,
        plan: SandboxPlan,
        around: NodeSurroundings,
        *,
        restarted: bool = False,
        was_ready: bool = False,
        started: Callable[[], None] = lambda: None,
        at: FaultPoint = no_fault,
    ) -> None:
        """Do nothing yet.

        Args:
            plan: the session.
            around: its node.
            restarted: there was a process of the same actor before this one.
            was_ready: an earlier process of the same actor had it ready: its container is attached
                to again, and if that is gone, so is the session.
            started: called in a thread when it has become ready.
            at: fault points, see `open_container`.
        """
        self._plan = plan
        self._around = around
        self._restarted = restarted
        self._was_ready = was_ready
        self._note_started = started
        self._at = at
        self.state: HostState = "new"
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._container: SessionContainer | None = None
        self._workspace: AgentWorkspace | None = None
        self._core: SessionCore | None = None
        self._loss: SandboxLostError | None = None
        self._progress = ""
        self._interrupted = False
        self._engine_failed = False
        self.no_engine: str | None = None
        self._since_unix_s = time.time()

    async def start(self) -> None:
        """Bring the session up, once for all callers; when that fails, nothing of it is left.

        But a session whose process was replaced keeps its container, and the next caller tries again.

        Raises:
            SandboxStartError: the node could not; its cause tells what failed.
            SandboxError: as itself, where the definition or an argument is to be changed.
            SandboxLostError: its container has gone while its process was replaced.
            SandboxClosedError: it was closed meanwhile.
        """
        if self.state in ("closing", "closed"):
            raise self.closed_error()
        if self._starting is None:
            self.state = "starting"
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(_seen)
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            if starting.cancelled():
                raise self.closed_error() from None
            raise
        if self._loss is not None:
            raise SandboxLostError(*self._loss.args)

    @property
    def ready_core(self) -> SessionCore | None:
        """What has the verbs, where it can be had without waiting."""
        return self._core if self.state == "ready" else None

    async def core(self) -> SessionCore:
        """Give what has the verbs; waits while the session starts.

        Raises:
            SandboxLostError: it is lost.
            SandboxClosedError: it was closed.
            SandboxStartError: it could not start.
        """
        if self.state != "ready":
            await self.start()
        assert self._core is not None  # it has started
        return self._core

    async def stop(self) -> bool:
        """End every program and remove the container; idempotent. False if it was closed before."""
        first = self._stopping is None
        if self._stopping is None:
            self.state = "closing"
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)
        return first

    @property
    def left_nothing(self) -> bool:
        """Whether it is closed, and saw all that it made removed: else a sweep is to look."""
        return self.state == "closed" and not (self._interrupted or self._engine_failed)

    def status(self) -> dict[str, Any]:
        """Tell how it is, in plain data."""
        found = None if self._core is None else self._core.status()
        container = self._container
        return {
            "state": "starting" if self.state == "new" else self.state,
            "running": found.running_calls if found else 0,
            "finished": found.finished_calls if found else 0,
            "cwd": found.cwd if found else None,
            "started_unix_s": found.started_unix_s if found else self._since_unix_s,
            "spec_digest": self._plan.spec_digest,
            "arguments_digest": self._plan.arguments_digest,
            "container_id": None if container is None else container.id,
            "notes": () if container is None else container.notes,
            "progress": self._progress,
            "pid": os.getpid(),
        }

    def closed_error(self) -> SandboxClosedError:
        """Make the error for a verb of a session that is closed."""
        return SandboxClosedError(f"{self._plan.label} is closed. Open another session.")

    async def _start(self) -> None:
        try:
            await self._bring_up()
        except BaseException as error:
            ends = isinstance(error, SandboxLostError) or self._stopping is not None
            if self._restarted and not ends:
                self._try_again_later()
            else:
                await self._undo()
            if isinstance(error, NoEngineError) and not self._restarted:
                self.no_engine = str(error)
            if isinstance(error, SandboxLostError):
                self._loss = error
                self.state = "lost"
                raise
            if isinstance(error, _ITSELF) or not isinstance(error, SandboxError | OSError):
                raise
            raise SandboxStartError(f"{self._plan.label} could not be opened: {error}") from error

    async def _bring_up(self) -> None:
        plan, around = self._plan, self._around
        await asyncio.to_thread(around.arrive)
        secrets = await asyncio.to_thread(secret_variables, plan, around)
        # The name of an unnamed session's container was never used before.
        container = await find_container(plan, around) if plan.named else None
        found = container is not None
        if container is None:
            if self._was_ready:
                raise SandboxLostError(
                    f"{plan.label} was lost: its container ended while its process was being "
                    f"replaced. Close it, and open it again under the same name."
                )
            with self._sweepable(again=True):
                container = await open_container(plan, around, tell=self._tell, at=self._at)
        self._container = container
        workspace = await container.workspace(plan.label, resync=found)
        self._workspace = workspace
        core = SessionCore(
            workspace,
            label=plan.label,
            secrets=secrets,
            concurrent_requests=plan.options.concurrent_requests,
        )
        variables = await asyncio.to_thread(plan.variables, around.fetch)
        await core.start(plan.cwd, variables)
        self._core = core
        await asyncio.to_thread(self._note_started)
        self.state = "ready"
        self._watching.append(asyncio.create_task(self._watch_loss(workspace, container)))
        if container.disk_gb is not None:
            self._watching.append(asyncio.create_task(self._watch_disk(workspace, container)))
        if container.internet:
            self._watching.append(asyncio.create_task(self._watch_nodes(container)))

    def _tell(self, line: str) -> None:
        self._progress = line

    def _try_again_later(self) -> None:
        """Keep the container with its files: what failed may be the node's trouble, and pass."""
        if self._container is not None:
            self._container.let_go()
        self._container = self._workspace = self._core = self._starting = None
        self.state = "new"

    async def _undo(self) -> None:
        """Remove what a failed start has made."""
        container, self._container = self._container, None
        if container is None:
            return
        with self._sweepable():
            if self._workspace is not None:
                await self._workspace.close()
            else:
                await container.remove()

    async def _stop(self) -> None:
        for task in self._watching:
            task.cancel()
        if self._starting is not None and not self._starting.done():
            self._interrupted = True
            self._starting.cancel()
            await asyncio.wait({self._starting})
        with self._sweepable():
            if self._core is not None:
                await self._core.close()
            elif self._restarted and self._container is None:
                await remove_leftover(self._plan, self._around)
        if self._watching:
            await asyncio.wait(self._watching)
        self.state = "closed"

    @contextlib.contextmanager
    def _sweepable(self, *, again: bool = False) -> Iterator[None]:
        """Note that the engine failed, and may have kept something; ``again`` raises it as well."""
        try:
            yield
        except SandboxEngineError as error:
            if again and isinstance(error, NoEngineError):
                raise  # nothing was made
            self._engine_failed = self._engine_failed or not isinstance(error, _ITSELF)
            if again:
                raise

    async def _watch_loss(self, workspace: AgentWorkspace, container: SessionContainer) -> None:
        loss = await workspace.wait_lost()
        if self.state == "ready":
            self._loss = loss
            self.state = "lost"
            with contextlib.suppress(SandboxEngineError):  # `stop` tries again
                await container.remove()

    async def _watch_disk(self, workspace: AgentWorkspace, container: SessionContainer) -> None:
        while self.state == "ready":
            await asyncio.sleep(DISK_LOOK_S)
            with contextlib.suppress(SandboxEngineError):
                if await container.disk_is_full():
                    workspace.lose(
                        SandboxLostError(
                            f"{self._plan.label} was lost: it wrote more than disk_gb="
                            f"{container.disk_gb:g} to its disk. Open another session with more."
                        )
                    )
                    await container.remove()

    async def _watch_nodes(self, container: SessionContainer) -> None:
        """Keep nodes out of reach that join the cluster later: their addresses may be public."""
        known = container.public_nodes
        if known is not None:  # else it was found again, and nobody has looked meanwhile
            await asyncio.sleep(NODES_LOOK_S)
        while self.state == "ready":
            # Whatever fails, the GCS or the engine: the next look tries again.
            try:
                known = await container.block_nodes(self._around.node_addresses, known)
            except Exception as error:
                self._engine_failed = self._engine_failed or isinstance(error, SandboxEngineError)
            await asyncio.sleep(NODES_LOOK_S)


def _seen(task: asyncio.Task[None]) -> None:
    """Take note of a failure: whoever waited may be gone."""
    if not task.cancelled():
        task.exception()
