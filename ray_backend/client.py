"""`RayClient`: the control plane on Ray. It keeps handles, the registry and leases together."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from ray import exceptions as rays

from apothic.backend import (
    ControlPlaneClient,
    InstanceRef,
    SandboxRef,
    SandboxRequest,
    StartRequest,
)
from apothic.errors import (
    AppNotFoundError,
    BackendError,
    InstanceNotFoundError,
)
from apothic.names import actor_name
from apothic.node_types import NodeType
from apothic.options import ClassOptions
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
from apothic.values import (
    AppManifest,
    ClassInstanceHandle,
    ClassSpec,
    CloseReport,
    InstanceInfo,
    SandboxSpec,
)
from apothic.volume import StorageMount
from ray_backend import ray_api, volumes
from ray_backend.actors.loading import share_class_identities
from ray_backend.connection import ensure_connected
from ray_backend.instances import RayInstance
from ray_backend.launch import Launched, homes, launch
from ray_backend.leases import PINNED
from ray_backend.manager import instance_names
from ray_backend.manager_link import ManagerLink
from ray_backend.moves import find_other_actor, take_over
from ray_backend.names import NAMESPACE
from ray_backend.placement.catalogue import Catalogue
from ray_backend.placement.live import (
    ClusterView,
    Placeable,
    Placement,
    explain,
    offers_table,
    place,
)
from ray_backend.readiness import STOPPING_WAIT_S, wait_ready
from ray_backend.registry import Registry
from ray_backend.sandbox.sessions import Sandboxes
from ray_backend.starting import Starts
from ray_backend.translate import translate

__all__ = ["RayClient", "connect"]

_T = TypeVar("_T")

EXIT_WAIT_S = 60.0
"""Seconds that the end of a process waits for the exit hooks of what it leased."""

SUCCESSOR_WAIT_S = 15.0
"""Seconds to wait for the process after one that hung, which says what became of its calls."""

_lock = threading.Lock()
_client: RayClient | None = None


def connect(base_url: str | None) -> RayClient:
    """Give this process's client, connecting first if need be.

    Raises:
        ConnectionFailedError: when the cluster cannot be reached.
        InvalidOptionError: when ``base_url`` is malformed, or another than the connection there is.
    """
    global _client
    with _lock:
        ensure_connected(base_url)
        session = ray.get_runtime_context().get_job_id()
        if _client is None or not _client.is_of(session):
            _client = RayClient(session)
        return _client


def is_connected() -> bool:
    """Tell whether this process has a connection, so that `connect` starts nothing."""
    return bool(ray.is_initialized())


class RayClient(ControlPlaneClient):
    """A process's connection to Ray: one per process, as Ray has it."""

    def __init__(self, job_id: str) -> None:
        """Wrap the connection that `ensure_connected` made."""
        share_class_identities()
        self._job_id = job_id
        self._worker = ray_api.connection_id()
        self.registry = Registry()
        self._catalogue = Catalogue(self.registry)
        self._cluster_id = self.registry.cluster_id()
        self.holder = self._find_holder()
        self._sandboxes = Sandboxes(self)
        self._own_cluster = ray_api.is_own_cluster()
        self.manager = ManagerLink()
        self._leased = False
        self.starts = Starts(self)
        self.background = ThreadPoolExecutor(8, thread_name_prefix="apothic-ray")
        self.is_proxy = ray_api.is_client_mode()
        if self.holder.startswith("job:"):
            # Registered after Ray's own, so it runs before: the cluster still answers.
            atexit.register(self._at_exit)
        if self._own_cluster:
            _close_before_shutdown(self._at_exit)

    def is_of(self, job_id: str) -> bool:
        """Tell whether this client belongs to the connection that the process has now."""
        return self._job_id == job_id and self._worker == ray_api.connection_id()

    @property
    def is_live(self) -> bool:
        """Whether its connection is still there; asking Ray without one would start a cluster."""
        return ray.is_initialized() and self._worker == ray_api.connection_id()

    @staticmethod
    def _find_holder() -> str:
        context = ray.get_runtime_context()
        with contextlib.suppress(Exception):
            actor_id = context.get_actor_id()
            if actor_id:
                return f"actor:{actor_id}"
        return f"job:{context.get_job_id()}"

    @property
    def cluster_id(self) -> str:
        """Name the cluster."""
        return self._cluster_id

    @property
    def job_id(self) -> str:
        """Name this process's Ray job."""
        return self._job_id

    # -- apps ------------------------------------------------------------------------------------

    def deploy(
        self, manifest: AppManifest, blobs: Mapping[str, bytes], *, close_outdated: bool
    ) -> None:
        """Store the code first, then the manifest: who finds the app finds its code."""
        specs: list[ClassSpec | SandboxSpec] = [*manifest.classes.values()]
        specs += manifest.sandboxes.values()
        digests = [self.store(spec, lambda: blobs) for spec in specs]
        record = {"manifest": manifest.model_dump(mode="json"), "spec_digests": digests}
        self.registry.put_app(manifest.name, json.dumps(record))
        if close_outdated:
            current = set(digests)
            outdated = [
                name
                for name, lease in self.manager.ask(
                    lambda manager: manager.records.remote()
                ).items()
                if lease.get("app") == manifest.name and lease.get("spec_digest") not in current
            ]
            list(self.background.map(self.manager.close, outdated))

    def find_app(self, name: str) -> AppManifest:
        """Read a deployed app's manifest."""
        found = self.registry.get_app(name)
        if found is None:
            known = ", ".join(self.list_apps()) or "none"
            raise AppNotFoundError(
                f"no app {name!r} is deployed on this cluster: deployed are {known}. Deploy it with "
                f"app.deploy(), or check the name."
            )
        return AppManifest.model_validate(json.loads(found)["manifest"])

    def list_apps(self) -> list[str]:
        """Name the deployed apps."""
        return self.registry.list_apps()

    def find_spec(self, digest: str) -> ClassSpec | None:
        """Read a class spec."""
        found = self.registry.get_spec(digest)
        return None if found is None else ClassSpec.model_validate_json(found)

    def explain(self, spec: ClassSpec | SandboxSpec) -> str:
        """Tell where an instance could run."""
        return self.explain_options(ClassOptions.model_validate(spec.options))

    def explain_options(self, wanted: Placeable) -> str:
        """Tell where something with these options could run, of a class or of a sandbox."""
        return explain(self.view(), wanted, homes(self.registry, wanted.mounts))

    def view(self) -> ClusterView:
        """Look at the cluster: its nodes, what is free on them, what the autoscaler could start."""
        if self.is_proxy:
            available = self.manager.ask(lambda manager: manager.free_resources.remote())
        else:
            available = ray_api.free_resources()
        return ClusterView(ray_api.live_nodes(), available, self._catalogue.offers())

    def place(self, view: ClusterView, options: ClassOptions) -> Placement:
        """Decide where an instance goes."""
        return place(view, options, homes(self.registry, options.mounts))

    def seat(self, actor_id: str) -> ray_api.ActorSeat | None:
        """Tell where an actor is, or what it waits for."""
        if self.is_proxy:
            found: ray_api.ActorSeat | None = self.manager.ask(
                lambda manager: manager.seat.remote(actor_id)
            )
            return found
        return ray_api.actor_seat(actor_id)

    def seats(self, state: str | None = None) -> list[ray_api.ActorSeat]:
        """Tell where all actors are, or those in one of Ray's states."""
        if self.is_proxy:
            found: list[ray_api.ActorSeat] = self.manager.ask(
                lambda manager: manager.seats.remote(state)
            )
            return found
        return ray_api.actor_seats(state)

    def offers_table(self) -> str:
        """List the kinds of nodes that there are or could be started."""
        return offers_table(self.view())

    def register_node_types(self, node_types: Sequence[NodeType]) -> None:
        """Make node types known that the autoscaler could start."""
        self._catalogue.register(node_types)

    def list_node_types(self) -> list[NodeType]:
        """List the registered node types."""
        return self._catalogue.node_types()

    def unregister_node_type(self, name: str) -> bool:
        """Forget a registered node type."""
        return self._catalogue.unregister(name)

    # -- instances -------------------------------------------------------------------------------

    def start(self, request: StartRequest) -> RayInstance:
        """Lease first, then make the actor, so that an interrupted creation leaks nothing."""
        spec = request.spec
        name = actor_name(spec.app, spec.name, request.instance_id)
        digest = self.store(spec, request.blobs)
        holder = PINNED if request.named else self.holder
        record = {
            "app": spec.app,
            "cls": spec.name,
            "instance_id": request.instance_id,
            "named": request.named,
            "spec_digest": digest,
        }
        deadline = time.monotonic() + STOPPING_WAIT_S
        while True:
            self.note_lease()
            if self.manager.ask(lambda manager: manager.acquire.remote(name, holder, record)):
                break
            if time.monotonic() > deadline:
                raise BackendError(
                    f"{spec.app}.{spec.name} {request.instance_id!r} is still being stopped after "
                    f"{STOPPING_WAIT_S:g} s. Try again, or use another id."
                )
            time.sleep(0.01)
        try:
            launched = self._launch(request, name, digest)
        except BaseException:
            if not self._actor_exists(name):
                self.manager.ask(lambda manager: manager.forget.remote(name))
            raise
        handle = ClassInstanceHandle(
            cluster_id=self._cluster_id,
            app=spec.app,
            cls=spec.name,
            instance_id=request.instance_id,
            spec_digest=digest,
            named=request.named,
        )
        instance = RayInstance(self, handle, launched.actor, ready=False)
        instance.request = request
        instance.placement = launched.placement
        if request.reuse and not request.named:
            self.starts.watch(instance)  # nobody need wait for what `bind` starts
        return instance

    def move(self, instance: RayInstance) -> bool:
        """Replace an instance that still waits for room by one that asks for what is free now.

        Only for one that this process made. Its name and its lease stay; False when it has its room
        by now, or is being stopped.

        Raises:
            NoMatchingOfferError: when nothing can run it any more; then it is gone.
        """
        request = instance.request
        assert request is not None
        assert instance.placement is not None
        name, actor_id = self._name(instance.handle), instance.native._actor_id.hex()
        digest = instance.handle.spec_digest
        launched = take_over(
            self.manager, name, actor_id, lambda: self._launch(request, name, digest)
        )
        if launched is None:
            return False
        instance.follow(launched.actor, launched.placement)
        return True

    def attach(self, handle: ClassInstanceHandle) -> InstanceRef:
        """Reach a live instance."""
        name = actor_name(handle.app, handle.cls, handle.instance_id)
        gone = InstanceNotFoundError(
            f"{handle.app}.{handle.cls} {handle.instance_id!r} does not live: it was closed, or it was "
            f"lost. Start another."
        )
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            raise gone from None
        lease = self.registry.get_lease(name)
        if lease is None:
            raise gone
        if not lease["named"]:
            self.note_lease()
            if not self.manager.ask(lambda manager: manager.join.remote(name, self.holder)):
                raise gone
        handle = handle.model_copy(
            update={"spec_digest": lease["spec_digest"], "named": lease["named"]}
        )
        return RayInstance(self, handle, actor, ready=False)

    def find_successor(self, handle: ClassInstanceHandle, actor_id: str) -> Any:
        """Find the actor that took an instance over on another node; None where none did.

        One that was closed, and made again by somebody, is another instance.
        """
        name = self._name(handle)
        if not self.registry.was_moved(actor_id) and not self._lost_its_nodes(handle, actor_id):
            return None
        return find_other_actor(name, actor_id)

    def _lost_its_nodes(self, handle: ClassInstanceHandle, actor_id: str) -> bool:
        if not handle.named or self.is_proxy:
            return False
        seat = ray_api.actor_seat(actor_id)
        return seat is not None and seat.unschedulable

    def wait_ready(self, instance: RayInstance) -> None:
        """Wait for ``enter``; what cannot become ready is removed before the error is raised."""
        self.starts.forget(instance)
        try:
            wait_ready(self, instance)
        finally:
            instance.end_waiting()

    def died_at_start(self, instance: RayInstance) -> bool:
        """Tell whether an instance that lost its process had never been ready."""
        record = self.registry.start_record(self._name(instance.handle))
        return bool(record.begun) and not record.was_ready

    def inspect_instance(self, handle: ClassInstanceHandle, actor: Any, label: str) -> InstanceInfo:
        """Ask an instance how it is."""
        try:
            status = ray.get(actor.apothic_status.remote())
        except rays.RayError as error:
            raise translate(error, label) from None
        record = {} if self.is_proxy else ray_api.actor_record(actor._actor_id.hex())
        spec = self.find_spec(status["spec_digest"])
        return InstanceInfo(
            app=handle.app,
            cls=handle.cls,
            instance_id=handle.instance_id,
            named=handle.named,
            state=status["state"],
            spec_digest=status["spec_digest"],
            tags=spec.tags if spec else (),
            metadata=spec.metadata if spec else {},
            pid=status["pid"],
            node_id=record.get("Address", {}).get("NodeID"),
            running_calls=status["running"],
            finished_calls=status["finished"],
            restarts=record.get("NumRestarts", 0),
            started_unix_s=status["started_unix_s"],
            arguments_digest=status["arguments_digest"],
        )

    def close_instance(self, instance: RayInstance) -> CloseReport:
        """Stop an instance."""
        return self.manager.close(self._name(instance.handle), instance.native._actor_id.hex())

    def release(self, instance: RayInstance) -> None:
        """Give up this process's lease on an instance."""
        name = self._name(instance.handle)
        self.manager.ask(lambda manager: manager.release.remote(name, self.holder))

    def list_instances(self, app: str | None = None, cls: str | None = None) -> list[InstanceInfo]:
        """List live instances as their leases and Ray know them, asking none of them.

        So ``ready`` means that the process is up; `inspect_instance` asks whether ``enter`` is done.
        """
        found = self.manager.ask(lambda manager: manager.instances.remote())
        wanted = [
            lease
            for _, lease in sorted(found.items())
            if "cls" in lease and app in (None, lease["app"]) and cls in (None, lease["cls"])
        ]
        specs = {
            digest: self.find_spec(digest) for digest in {each["spec_digest"] for each in wanted}
        }
        return [
            InstanceInfo(
                app=lease["app"],
                cls=lease["cls"],
                instance_id=lease["instance_id"],
                named=lease["named"],
                state=lease["state"],
                spec_digest=lease["spec_digest"],
                tags=spec.tags if spec else (),
                metadata=spec.metadata if spec else {},
                pid=lease["pid"],
                node_id=lease["node_id"],
                restarts=lease["restarts"],
            )
            for lease in wanted
            for spec in [specs[lease["spec_digest"]]]
        ]

    def take_timeout(
        self, task_id: str, actor_id: str, *, overdue: bool, until: float = math.inf
    ) -> str | None:
        """Read what a replaced process left for a call.

        A process that hung with the interpreter lock could leave none; its successor does. For a call
        that is ``overdue`` this waits until the successor is there, or none is coming, at most to the
        time ``until``.
        """
        found = self.registry.take_timeout(task_id)
        if found is not None or not overdue or self.is_proxy:
            return found
        began = time.monotonic()
        while time.monotonic() < min(began + SUCCESSOR_WAIT_S, until):
            state = ray_api.actor_record(actor_id).get("State")
            found = self.registry.take_timeout(task_id)
            # Its death may be news to the GCS: for a moment it still says ALIVE.
            settled = state == "ALIVE" and time.monotonic() - began > 1.0
            if found is not None or settled or state not in ("ALIVE", "RESTARTING"):
                return found
            time.sleep(0.05)
        return None

    # -- sandboxes -------------------------------------------------------------------------------

    def start_sandbox(self, request: SandboxRequest) -> SandboxRef:
        """Start or find a session."""
        return self._sandboxes.start(request)

    def attach_sandbox(self, handle: SandboxHandle) -> SandboxRef:
        """Reach a live session."""
        return self._sandboxes.attach(handle)

    def find_sandbox_spec(self, digest: str) -> SandboxSpec | None:
        """Read a definition of a sandbox."""
        return self._sandboxes.find_spec(digest)

    def list_sandboxes(
        self, app: str | None = None, sandbox: str | None = None
    ) -> list[SandboxSessionInfo]:
        """List live sessions."""
        return self._sandboxes.list(app, sandbox)

    # -- secrets and volumes ---------------------------------------------------------------------

    def put_secret(self, name: str, variables: Mapping[str, str], *, overwrite: bool) -> bool:
        """Store a secret in the registry."""
        return self.registry.put_secret(name, variables, overwrite=overwrite)

    def list_secrets(self) -> list[str]:
        """Name the stored secrets."""
        return self.registry.list_secrets()

    def delete_secret(self, name: str) -> bool:
        """Remove a secret."""
        return self.registry.delete_secret(name)

    def ensure_volume(self, volume: StorageMount) -> None:
        """Record a volume, or check that the recorded one is the same."""
        volumes.ensure(self.registry, volume)

    def list_volumes(self) -> list[StorageMount]:
        """List recorded volumes."""
        return volumes.list_all(self.registry)

    def delete_volume(self, name: str) -> bool:
        """Remove a volume and its files."""
        return volumes.delete(self.registry, name)

    # -- end -------------------------------------------------------------------------------------

    def disconnect(self) -> None:
        """Close what this process leased, then end the connection."""
        atexit.unregister(self._at_exit)
        self._at_exit()
        ray.shutdown()

    def _at_exit(self) -> None:
        """Close at once what only this process kept; on a cluster of its own, everything."""
        if not ray.is_initialized() or not self.is_of(ray.get_runtime_context().get_job_id()):
            return
        with contextlib.suppress(Exception):
            if self._own_cluster:
                if self._leased or instance_names():
                    ray.get(self.manager.actor().stop_all.remote(), timeout=EXIT_WAIT_S)
            elif self._leased:
                ray.get(self.manager.actor().release_all.remote(self.holder), timeout=EXIT_WAIT_S)

    def note_lease(self) -> None:
        """Note that this process is about to hold a lease, to be given up at its end."""
        self._leased = True

    # -- inside ----------------------------------------------------------------------------------

    def _launch(self, request: StartRequest, name: str, digest: str) -> Launched:
        return launch(self.registry, request, name, digest, self.view)

    @staticmethod
    def _name(handle: ClassInstanceHandle) -> str:
        return actor_name(handle.app, handle.cls, handle.instance_id)

    @staticmethod
    def _actor_exists(name: str) -> bool:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return False
        return True

    def store(self, spec: ClassSpec | SandboxSpec, blobs: Callable[[], Mapping[str, bytes]]) -> str:
        """Store a version of a class or sandbox, its contents first; give its digest."""
        digest = spec.digest
        if self.registry.get_spec(digest) is None:
            for key, content in blobs().items():
                self.registry.put_blob(key, content)
            self.registry.put_spec(digest, spec.model_dump_json())
        return digest


def _close_before_shutdown(close: Callable[[], None]) -> None:
    """Have ``ray.shutdown()`` end our instances first, where it ends their cluster.

    Ray kills the workers then, and has no hook before it does.
    """
    shutdown = ray.shutdown

    @functools.wraps(shutdown)
    def close_and_shutdown(*args: Any, **kwargs: Any) -> None:
        ray.shutdown = shutdown
        close()
        shutdown(*args, **kwargs)

    ray.shutdown = close_and_shutdown
