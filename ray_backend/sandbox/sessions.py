"""`Sandboxes`: sessions from the client's side: finding, making, listing and waiting for them."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions as rays

from apothic.backend import SandboxRequest
from apothic.errors import (
    BackendError,
    NoMatchingOfferError,
    PlacementError,
    SandboxClosedError,
    SandboxLimitError,
    SandboxLostError,
    SandboxSessionNotFoundError,
    SandboxStartError,
)
from apothic.options import ClassOptions
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
from apothic.values import SandboxSpec
from ray_backend.actors.ending import CONTROL_GROUP
from ray_backend.launch import Launched, find_actor, place_with_volumes
from ray_backend.leases import PINNED, SANDBOX
from ray_backend.moves import move, take_over
from ray_backend.names import NAMESPACE
from ray_backend.placement.live import ClusterView, Placement
from ray_backend.readiness import STOPPING_WAIT_S, MovedError, PlacementWatch
from ray_backend.registry import Registry
from ray_backend.sandbox.plan import SandboxPlan, Unsettled
from ray_backend.sandbox.progress import Progress
from ray_backend.sandbox.references import RaySandbox, session_actor_name

if TYPE_CHECKING:
    from ray_backend.client import RayClient

__all__ = ["Sandboxes"]

CONCURRENT_VERBS = 1000
"""Verbs that one session answers at once; what runs inside is limited by the definition."""

CONTROL_CALLS = 64
INLINE_BYTES = 64 * 1024
"""Variables up to this size go with the actor; Ray would keep larger ones in the creator's memory."""

CREATION_ATTEMPTS = 10
_RETRY_STEP_S = 0.05
_actor_classes: dict[str, Any] = {}


class Sandboxes:
    """The sandbox half of `RayClient`, which forwards to it."""

    def __init__(self, client: RayClient) -> None:
        """Use the client's registry, manager and view."""
        self.client = client

    @property
    def is_proxy(self) -> bool:
        """Whether this process talks through a proxy."""
        return self.client.is_proxy

    @property
    def registry(self) -> Registry:
        """The cluster's registry."""
        return self.client.registry

    def view(self) -> ClusterView:
        """Look at the cluster."""
        return self.client.view()

    # What waiting for room needs.

    def place(self, view: ClusterView, options: ClassOptions) -> Placement:
        """Decide where a session goes: where no Docker engine was found only if nowhere else."""
        dry = self.registry.nodes_without_engine()
        found = self._elsewhere(view, options, dry) if dry else None
        return found or place_with_volumes(self.registry, view, options)

    def _elsewhere(
        self, view: ClusterView, options: ClassOptions, dry: set[str]
    ) -> Placement | None:
        """Decide where a session goes other than to some nodes; None where it can go nowhere else."""
        others = [node for node in view.nodes if node["NodeID"] not in dry]
        with contextlib.suppress(NoMatchingOfferError):
            return place_with_volumes(self.registry, replace(view, nodes=others), options).avoiding(
                dry
            )
        return None

    def move(self, session: RaySandbox) -> bool:
        """Replace a session that still waits for room by one that asks for what is free now.

        Only for one that this process made. Its name and its lease stay; False when it has its room
        by now, or is being closed.

        Raises:
            NoMatchingOfferError: when nothing can run it any more; then it is gone.
        """
        request = session.request
        assert request is not None
        name, digest = session.name, session.handle.spec_digest
        return move(self.client.manager, session, lambda: self._launch(request, name, digest))

    def settle(self, session: RaySandbox, unsettled: Unsettled) -> None:
        """Make a named session again on the node that it got its room on, bound to it.

        Its container will be there, so that a process of it that ends must come back there. It was
        not bound from the start, since it waited for room wherever that came first.

        Where somebody else is at it, or closes it, this does nothing.

        Raises:
            NoMatchingOfferError: when nothing can run it any more; then it is gone.
        """
        plan, node_id, _ = unsettled

        def make() -> Launched:
            placement = self.place(self.view(), ClassOptions.model_validate(plan.spec.options))
            return self._make(plan, placement.on_node(node_id).with_a_node())

        self._hand_over(session, make)

    def go_elsewhere(
        self, session: RaySandbox, unsettled: Unsettled, tried: Collection[str]
    ) -> None:
        """Make a session again on another node than those that have no Docker engine.

        Args:
            session: the one.
            unsettled: from the node that it came to last.
            tried: the nodes that it came to before; none is tried twice.

        Raises:
            SandboxStartError: there is no other; then it is gone.
        """
        plan, node_id, reason = unsettled

        def make() -> Launched:
            options = ClassOptions.model_validate(plan.spec.options)
            dry = {node_id, *tried, *self.registry.nodes_without_engine()}
            placement = self._elsewhere(self.view(), options, dry)
            if placement is None or node_id in tried:
                raise SandboxStartError(
                    f"{session.label} could not be opened: {reason} (No other node of the cluster "
                    f"can take it.)"
                )
            return self._make(plan, placement)

        self._hand_over(session, make)

    def _hand_over(self, session: RaySandbox, make: Callable[[], Launched]) -> None:
        launched = take_over(
            self.client.manager, session.name, session.actor_id, make, has_room=True
        )
        if launched is not None:
            mine = session.placement is not None
            session.go_to(launched.actor, launched.placement if mine else None)
        else:
            time.sleep(_RETRY_STEP_S)

    def find_spec(self, digest: str) -> SandboxSpec | None:
        """Read a definition."""
        found = self.registry.get_spec(digest)
        return None if found is None else SandboxSpec.model_validate_json(found)

    # What the seam asks.

    def start(self, request: SandboxRequest) -> RaySandbox:
        """Lease first, then make the actor, so that an interrupted creation leaks nothing."""
        spec = request.spec
        name = session_actor_name(spec.app, spec.name, request.sandbox_id)
        digest = self.client.store(spec, request.blobs)

        def attempt() -> bool:
            return self._lease(request, name, digest)

        label = f"{spec.app}.{spec.name} {request.sandbox_id!r}"
        with self.client.leases.creating(name, label, attempt, shared=request.named):
            launched = self._launch(request, name, digest)
            handle = SandboxHandle(
                cluster_id=self.client.cluster_id,
                app=spec.app,
                sandbox=spec.name,
                sandbox_id=request.sandbox_id,
                spec_digest=digest,
                named=request.named,
            )
            if launched.placement is None:
                lease = self.registry.get_lease(name) or {}
                handle = handle.model_copy(update={"spec_digest": lease.get("spec_digest", digest)})
            return RaySandbox(
                self, handle, launched.actor, request=request, placement=launched.placement
            )

    def attach(self, handle: SandboxHandle) -> RaySandbox:
        """Reach a live session."""
        name = session_actor_name(handle.app, handle.sandbox, handle.sandbox_id)
        gone = SandboxSessionNotFoundError(
            f"{handle.app}.{handle.sandbox} {handle.sandbox_id!r} does not live: it was closed, or it "
            f"was lost. Open another."
        )
        actor, lease = find_actor(name), self.registry.get_lease(name)
        if actor is None or lease is None:
            raise gone
        if not lease["named"] and not self.client.leases.join(name):
            raise gone
        handle = handle.model_copy(
            update={"spec_digest": lease["spec_digest"], "named": lease["named"]}
        )
        return RaySandbox(self, handle, actor)

    def list(self, app: str | None = None, sandbox: str | None = None) -> list[SandboxSessionInfo]:
        """List live sessions as their leases and Ray know them, asking none of them."""
        found = self.client.manager.ask(lambda manager: manager.instances.remote())
        wanted = [
            lease
            for _, lease in sorted(found.items())
            if lease.get("kind") == SANDBOX
            and app in (None, lease["app"])
            and sandbox in (None, lease["sandbox"])
        ]
        specs = {
            digest: self.find_spec(digest) for digest in {each["spec_digest"] for each in wanted}
        }
        return [
            SandboxSessionInfo(
                app=lease["app"],
                sandbox=lease["sandbox"],
                sandbox_id=lease["sandbox_id"],
                named=lease["named"],
                local=False,
                state=lease["state"],
                spec_digest=lease["spec_digest"],
                network=spec.network if spec else None,
                node_id=lease["node_id"],
                restarts=lease["restarts"],
            )
            for lease in wanted
            for spec in [specs[lease["spec_digest"]]]
        ]

    def wait_ready(self, session: RaySandbox) -> None:
        """Wait until a session takes verbs; what cannot is removed before the error is raised."""
        deadline = time.monotonic() + STOPPING_WAIT_S
        watch = PlacementWatch(self, session)
        dry: set[str] = set()  # nodes without an engine, each tried once
        while True:
            try:
                start = session.native.apothic_start.remote()
                unsettled = watch.get(start, Progress(session))
                if unsettled is None:
                    return
                if unsettled.no_engine is None:
                    self.settle(session, unsettled)
                    continue
                self.go_elsewhere(session, unsettled, dry)
                dry.add(unsettled.node_id)
                continue
            except MovedError:
                continue
            except PlacementError:
                self._give_up(session)
                raise
            except rays.RayError as error:
                if session.follow_successor():
                    continue
                if isinstance(error, rays.ActorUnavailableError) and session.handle.named:
                    watch.look()
                    time.sleep(_RETRY_STEP_S)
                    continue
                request = session.request
                mine = session.placement is not None
                node_left = isinstance(error, rays.ActorUnschedulableError)
                if request is not None and mine and node_left and time.monotonic() < deadline:
                    session.follow(self.start(request))  # finds what there is now
                    continue
                found = session.error_of(error)
                again = request is not None and request.named and not mine
                gone = isinstance(found, SandboxClosedError | SandboxLostError)
                if not (again and gone) or time.monotonic() > deadline:
                    self._give_up(session)
                    if mine and isinstance(error, rays.RayActorError):
                        found = SandboxStartError(
                            f"{session.label} could not be opened: its process ended meanwhile. "
                            f"{found}"
                        )
                    raise found from None
            # A named one that somebody else closes just now, or that was lost: another takes its place.
            assert request is not None
            if isinstance(found, SandboxLostError):
                session.close()
            session.follow(self.start(request))

    def _give_up(self, session: RaySandbox) -> None:
        """Close what this process made; of others' it gives up the lease."""
        with contextlib.suppress(BackendError):
            if session.placement is not None or (self.is_proxy and session.request is not None):
                session.stop()
            elif not session.handle.named:
                session.release()

    def _lease(self, request: SandboxRequest, name: str, digest: str) -> bool:
        """Ask for the lease once; False while what had the name is being stopped."""
        spec = request.spec
        holder = PINNED if request.named else self.client.holder
        record = {
            "kind": SANDBOX,
            "app": spec.app,
            "sandbox": spec.name,
            "sandbox_id": request.sandbox_id,
            "named": request.named,
            "spec_digest": digest,
        }

        leased, alive = self.client.manager.ask(
            lambda manager: manager.acquire_sandbox.remote(
                name, holder, record, request.max_sessions
            )
        )
        if alive:
            raise SandboxLimitError(
                f"{alive} sessions of {spec.app}.{spec.name} live, which is max_containers × "
                f"tasks_per_container. Close some, or raise one of them."
            )
        return bool(leased)

    def _launch(self, request: SandboxRequest, name: str, digest: str) -> Launched:
        """Make the actor, or give the one of this name; a placement says that it was made here."""
        found = find_actor(name) if request.named else None
        if found is not None:
            return Launched(found, None)
        options = ClassOptions.model_validate(request.spec.options)
        view = self.view()
        placement = self.place(view, options)
        if request.named:
            placement = placement.with_a_node()
        env: bytes | None = pickle.dumps(dict(request.env))
        if env is not None and len(env) > INLINE_BYTES:
            key = self.registry.arguments_key(name, request.arguments_digest)
            self.registry.put_blob(key, env)
            env = None
        plan = SandboxPlan(
            actor_name=name,
            cluster_id=self.client.cluster_id,
            sandbox_id=request.sandbox_id,
            named=request.named,
            spec_json=request.spec.model_dump_json(),
            cwd=request.cwd,
            env=env,
            arguments_digest=request.arguments_digest,
        )
        return self._make(plan, placement)

    def _make(self, plan: SandboxPlan, placement: Placement) -> Launched:
        plan = replace(plan, settled=placement.node_id is not None)
        make = _actor_class().options(
            **placement.ray_options(),
            name=plan.actor_name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1 if plan.named else 0,
            max_task_retries=0,
            # One event an exec would push what else the dashboard knows out of it, and costs time.
            enable_task_events=False,
            max_concurrency=CONCURRENT_VERBS,
        )
        if self.is_proxy:
            return Launched(make.options(get_if_exists=plan.named).remote(plan), None)
        for attempt in range(CREATION_ATTEMPTS):
            try:
                return Launched(make.remote(plan), placement)
            except ValueError:
                found = find_actor(plan.actor_name) if plan.named else None
                if found is not None:
                    return Launched(found, None)
                if not plan.named or attempt == CREATION_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")


def _actor_class() -> Any:
    """Give the actor class; exported once per job."""
    job = ray.get_runtime_context().get_job_id()
    if job not in _actor_classes:
        # Imported when it is needed: with it comes docker-py, which takes 50 ms.
        from ray_backend.sandbox.actor import SandboxActor

        make: Any = ray.remote  # its stubs do not know concurrency groups
        _actor_classes[job] = make(concurrency_groups={CONTROL_GROUP: CONTROL_CALLS})(SandboxActor)
    return _actor_classes[job]
