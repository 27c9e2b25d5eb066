"""`RaySandbox`: the seam's reference to a session, over an actor handle."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions as rays
from typing_extensions import override

from apothic.backend import CallRef, ItemStream, SandboxRef, SandboxRequest
from apothic.errors import (
    ApothicError,
    InstanceClosedError,
    InstanceLostError,
    SandboxClosedError,
    SandboxLostError,
    UsageError,
)
from apothic.names import actor_name
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
from apothic.values import CloseReport
from ray_backend import ray_api
from ray_backend.actors.gate import CONSUMER_KEY
from ray_backend.moves import find_other_actor
from ray_backend.names import SESSION_MARK
from ray_backend.sandbox.calls import RESTART_S, RaySandboxCall, RaySandboxStream
from ray_backend.sandbox.packed import pack_arguments
from ray_backend.translate import translate

if TYPE_CHECKING:
    from ray_backend.placement.live import Placement
    from ray_backend.sandbox.sessions import Sandboxes

__all__ = ["RaySandbox", "session_actor_name"]

CAUSE_WAIT_S = 5.0
"""Seconds to wait until the cluster knows why an actor ended."""

_RETRY_STEP_S = 0.05


def session_actor_name(app: str, sandbox: str, sandbox_id: str) -> str:
    """Give the name of a session's actor."""
    return actor_name(app, f"{SESSION_MARK}{sandbox}", sandbox_id)


class RaySandbox(SandboxRef):
    """A live session: its actor, and how to call it."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        handle: SandboxHandle,
        actor: Any,
        *,
        request: SandboxRequest | None = None,
        placement: Placement | None = None,
    ) -> None:
        """Wrap an actor.

        Args:
            sandboxes: of the client.
            handle: where it is.
            actor: its handle.
            request: what was asked for, where it may not be ready yet.
            placement: where it was asked for, of an actor that this process made.
        """
        self._sandboxes = sandboxes
        self._handle = handle
        self._actor = actor
        self._methods: dict[str, Any] = {}
        self.request = request
        self.placement = placement
        self._node_id = (placement and placement.node_id) or ""
        self.label = f"{handle.app}.{handle.sandbox} {handle.sandbox_id!r}"
        self._closed = False

    @property
    @override
    def handle(self) -> SandboxHandle:
        return self._handle

    @property
    @override
    def identity(self) -> Hashable:
        """The actor's id: it is another actor's when the name is, and stays through restarts."""
        return self._handle.cluster_id, self.actor_id

    @property
    @override
    def native(self) -> Any:
        """The Ray actor handle."""
        return self._actor

    @property
    def name(self) -> str:
        """The actor's name."""
        handle = self._handle
        return session_actor_name(handle.app, handle.sandbox, handle.sandbox_id)

    @property
    def actor_id(self) -> str:
        """The actor's id, in hex."""
        found: str = self._actor._actor_id.hex()
        return found

    @override
    def call(self, verb: str, *args: Any) -> CallRef:
        self._check_open()
        return RaySandboxCall(self, verb, args)

    @override
    def stream(self, verb: str, *args: Any) -> ItemStream:
        self._check_open()
        if self._sandboxes.is_proxy:
            raise UsageError(
                f"{self.label}.{verb}: nothing can stream through a ray:// connection, which Ray does "
                f"not support. Run the program on the cluster with `ray job submit`."
            )
        packed, consumer = pack_arguments(args), self._sandboxes.client.holder

        def send() -> Any:
            submit = getattr(self._actor, verb).options(num_returns="streaming").remote
            return submit(*packed, **{CONSUMER_KEY: consumer})

        return RaySandboxStream(self, send)

    @override
    def wait_ready(self) -> None:
        # One that is reached by a handle may still wait for room if somebody chose its id.
        if self.request is not None or self._handle.named:
            self._sandboxes.wait_ready(self)
            self.request = None

    @override
    def inspect(self) -> SandboxSessionInfo:
        self._check_open()
        try:
            status = self._status()
        except rays.RayError as error:
            raise self.error_of(error) from None
        if status["state"] in ("closing", "closed"):
            raise self._closed_error()
        record: dict[str, Any] = {}
        if not self._sandboxes.is_proxy:
            record = ray_api.actor_record(self._actor._actor_id.hex())
        spec = self._sandboxes.find_spec(status["spec_digest"])
        handle, cwd = self._handle, status["cwd"]
        return SandboxSessionInfo(
            app=handle.app,
            sandbox=handle.sandbox,
            sandbox_id=handle.sandbox_id,
            named=handle.named,
            local=False,
            state=status["state"],
            spec_digest=status["spec_digest"],
            cwd=None if cwd is None else cwd.decode("utf-8", "surrogateescape"),
            network=spec.network if spec else None,
            running_calls=status["running"],
            finished_calls=status["finished"],
            restarts=record.get("NumRestarts", 0),
            started_unix_s=status["started_unix_s"],
            node_id=record.get("Address", {}).get("NodeID"),
            container_id=status["container_id"],
            arguments_digest=status["arguments_digest"],
            notes=tuple(status["notes"]),
        )

    def _status(self) -> dict[str, Any]:
        while True:
            try:
                found: dict[str, Any] = ray.get(self._actor.apothic_status.remote())
                return found
            except rays.ActorUnavailableError:
                if not self._handle.named:
                    raise
            self.wait_for_restart()

    @override
    def close(self) -> CloseReport:
        report = self.stop()
        self._closed = True
        return report

    def stop(self) -> CloseReport:
        """Have the manager stop it, which sees to it even if this process ends meanwhile."""
        manager = self._sandboxes.client.manager
        report = manager.close(self.name, self.actor_id)
        if not report.closed and self.follow_successor():  # it was moved, and nobody asked it since
            report = manager.close(self.name, self.actor_id)
        return report

    @override
    def release(self) -> None:
        self._sandboxes.client.leases.release(self.name)

    def follow(self, other: RaySandbox) -> None:
        """Go on with another actor of the same name."""
        self.go_to(other._actor, other.placement)
        self._handle = other._handle
        self._closed = False

    def go_to(self, actor: Any, placement: Placement | None) -> None:
        """Go on with the actor that has taken this session over, before anything of it was made."""
        self._actor, self.placement = actor, placement
        self._methods = {}
        self._node_id = (placement and placement.node_id) or ""

    def follow_successor(self) -> bool:
        """Go on with the actor that took over where this one waited for room; False where none did."""
        if not self._sandboxes.registry.was_moved(self.actor_id):
            return False
        actor = find_other_actor(self.name, self.actor_id)
        if actor is None:
            return False
        self.go_to(actor, None)
        return True

    def method(self, verb: str) -> Any:
        """Give the actor's method of a verb; a handle makes a new one each time it is asked."""
        found = self._methods.get(verb)
        if found is None:
            found = self._methods[verb] = getattr(self._actor, verb)
        return found

    def cancel(self, task_id: str, wait_s: float = 0.0) -> None:
        """End a verb, wherever it is; wait up to ``wait_s`` until nothing of it is alive."""
        with contextlib.suppress(rays.RayError):
            ended = self._actor.apothic_cancel.remote(task_id)
            if wait_s:
                ray.get(ended, timeout=wait_s)

    def error_of(self, error: BaseException, waited_s: float | None = None) -> BaseException:
        """Give our error for what a verb raised; one of ours that was raised inside as itself."""
        cause = getattr(error, "cause", None)
        if isinstance(error, rays.RayTaskError) and isinstance(cause, ApothicError):
            return cause
        if isinstance(error, rays.ActorUnavailableError) and self._handle.named:
            return self._interrupted()
        found = translate(error, self.label, timeout_s=waited_s)
        if isinstance(found, InstanceClosedError):
            return self._closed_error()
        if isinstance(found, InstanceLostError) or isinstance(error, rays.ActorUnschedulableError):
            return SandboxLostError(f"{self.label} was lost: {self._cause()} Open another session.")
        return found

    def _interrupted(self) -> BaseException:
        """Wait for what becomes of a named session whose process ended during a verb; tell that."""
        try:
            self.wait_for_restart()
        except (rays.RayError, ApothicError) as error:
            return self.error_of(error)
        return SandboxLostError(
            f"{self.label}: its process was replaced while this ran, which may or may not have had "
            f"effects. The session goes on, with its files and what runs in the background."
        )

    def _cause(self) -> str:
        """Tell what became of the actor, once the cluster knows; a lost node is noticed late."""
        if self._sandboxes.is_proxy:
            return "its process or its node died."
        deadline = time.monotonic() + CAUSE_WAIT_S
        while True:
            seat = ray_api.actor_seat(self.actor_id)
            if seat is None or seat.state == "DEAD" or time.monotonic() > deadline:
                break
            time.sleep(_RETRY_STEP_S)
        death = "" if seat is None else " ".join(seat.death.split())
        node_id = "" if seat is None else seat.node_id
        if seat is None or seat.unschedulable:
            node_id = self._sandboxes.registry.start_record(self.name).node_id or self._node_id
        node = next((each for each in ray_api.live_nodes() if each["NodeID"] == node_id), None)
        if node is not None and node["Alive"]:
            told = f"Ray says: {death}" if death else "Ray does not know yet why."
            return f"its process on node {node_id} ended. {told}"
        why = "" if node is None else node.get("DeathReasonMessage", "")
        return (
            f"its node{f' {node_id}' if node_id else ''} died{f' ({why})' if why else ''}, and its "
            f"container and its files with it."
        )

    def wait_for_restart(self) -> None:
        """Wait until a named session whose process was replaced takes verbs again.

        Raises:
            SandboxLostError: it is not back in time.
        """
        deadline = time.monotonic() + RESTART_S
        while True:
            try:
                ray.get(self._actor.apothic_start.remote(), timeout=RESTART_S)
                return
            except (rays.ActorUnavailableError, rays.GetTimeoutError):
                if time.monotonic() > deadline:
                    raise SandboxLostError(
                        f"{self.label}: its process ended and has not come back within {RESTART_S:g} "
                        f"s. It comes back as soon as its node has room and answers; try again then."
                    ) from None
                time.sleep(_RETRY_STEP_S)

    @property
    def in_background(self) -> Any:
        """The threads for what must not wait on Ray's own."""
        return self._sandboxes.client.background

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> SandboxClosedError:
        return SandboxClosedError(
            f"{self.label} is closed, by this process or by another. Open another session."
        )
