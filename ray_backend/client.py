"""`RayClient`: the control plane on Ray. It keeps the registry, leases and its two halves together."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from apothic.backend import (
    ControlPlaneClient,
    InstanceRef,
    SandboxRef,
    SandboxRequest,
    StartRequest,
)
from apothic.errors import AppNotFoundError
from apothic.node_types import NodeType
from apothic.options import ClassOptions
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
from apothic.values import (
    AppManifest,
    ClassInstanceHandle,
    ClassSpec,
    InstanceInfo,
    SandboxSpec,
)
from apothic.volume import StorageMount
from ray_backend import ray_api, volumes
from ray_backend.actors.loading import share_class_identities
from ray_backend.connection import ensure_connected
from ray_backend.launch import homes
from ray_backend.lease_link import LeaseLink
from ray_backend.lifecycle import Instances
from ray_backend.manager import instance_names
from ray_backend.manager_link import ManagerLink
from ray_backend.placement.catalogue import Catalogue
from ray_backend.placement.live import ClusterView, Placeable, explain, offers_table
from ray_backend.registry import Registry
from ray_backend.sandbox.sessions import Sandboxes

__all__ = ["RayClient", "connect"]

EXIT_WAIT_S = 60.0
"""Seconds that the end of a process waits for the exit hooks of what it leased."""

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
        self._instances = Instances(self)
        self._sandboxes = Sandboxes(self)
        self._own_cluster = ray_api.is_own_cluster()
        self.manager = ManagerLink()
        self.leases = LeaseLink(self)
        self._leased = False
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

    def store(self, spec: ClassSpec | SandboxSpec, blobs: Callable[[], Mapping[str, bytes]]) -> str:
        """Store a version of a class or sandbox, its contents first; give its digest."""
        digest = spec.digest
        if self.registry.get_spec(digest) is None:
            for key, content in blobs().items():
                self.registry.put_blob(key, content)
            self.registry.put_spec(digest, spec.model_dump_json())
        return digest

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

    def start(self, request: StartRequest) -> InstanceRef:
        """Start or find an instance."""
        return self._instances.start(request)

    def attach(self, handle: ClassInstanceHandle) -> InstanceRef:
        """Reach a live instance."""
        return self._instances.attach(handle)

    def find_spec(self, digest: str) -> ClassSpec | None:
        """Read a class spec."""
        return self._instances.find_spec(digest)

    def list_instances(self, app: str | None = None, cls: str | None = None) -> list[InstanceInfo]:
        """List live instances."""
        return self._instances.list(app, cls)

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
