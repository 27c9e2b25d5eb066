"""`Instances`: instances from the client's side: making, finding, listing and waiting for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from apothic.backend import StartRequest
from apothic.errors import InstanceNotFoundError
from apothic.names import actor_name
from apothic.options import ClassOptions
from apothic.values import ClassInstanceHandle, ClassSpec, InstanceInfo
from ray_backend.instances import RayInstance
from ray_backend.launch import Launched, homes, launch
from ray_backend.leases import PINNED
from ray_backend.moves import move
from ray_backend.names import NAMESPACE
from ray_backend.placement.live import ClusterView, Placement, place
from ray_backend.readiness import wait_ready
from ray_backend.starting import Starts

if TYPE_CHECKING:
    from ray_backend.client import RayClient

__all__ = ["Instances"]


class Instances:
    """The class half of `RayClient`, which forwards to it."""

    def __init__(self, client: RayClient) -> None:
        """Use the client's registry, manager and view."""
        self.client = client
        self._starts = Starts(self)

    # What waiting for room needs.

    def place(self, view: ClusterView, options: ClassOptions) -> Placement:
        """Decide where an instance goes."""
        return place(view, options, homes(self.client.registry, options.mounts))

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
        name, digest = instance.name, instance.handle.spec_digest
        return move(self.client.manager, instance, lambda: self._launch(request, name, digest))

    def find_spec(self, digest: str) -> ClassSpec | None:
        """Read a class spec."""
        found = self.client.registry.get_spec(digest)
        return None if found is None else ClassSpec.model_validate_json(found)

    # What the seam asks.

    def start(self, request: StartRequest) -> RayInstance:
        """Lease first, then make the actor, so that an interrupted creation leaks nothing."""
        spec = request.spec
        name = actor_name(spec.app, spec.name, request.instance_id)
        digest = self.client.store(spec, request.blobs)
        holder = PINNED if request.named else self.client.holder
        record = {
            "app": spec.app,
            "cls": spec.name,
            "instance_id": request.instance_id,
            "named": request.named,
            "spec_digest": digest,
        }

        def attempt() -> bool:
            return bool(
                self.client.manager.ask(
                    lambda manager: manager.acquire.remote(name, holder, record)
                )
            )

        label = f"{spec.app}.{spec.name} {request.instance_id!r}"
        shared = request.named or request.reuse
        with self.client.leases.creating(name, label, attempt, shared=shared):
            launched = self._launch(request, name, digest)
            handle = ClassInstanceHandle(
                cluster_id=self.client.cluster_id,
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
                self._starts.watch(instance)  # nobody need wait for what `bind` starts
            return instance

    def attach(self, handle: ClassInstanceHandle) -> RayInstance:
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
        lease = self.client.registry.get_lease(name)
        if lease is None:
            raise gone
        if not lease["named"] and not self.client.leases.join(name):
            raise gone
        handle = handle.model_copy(
            update={"spec_digest": lease["spec_digest"], "named": lease["named"]}
        )
        return RayInstance(self, handle, actor, ready=False)

    def wait_ready(self, instance: RayInstance) -> None:
        """Wait for ``enter``; what cannot become ready is removed before the error is raised."""
        self._starts.forget(instance)
        try:
            wait_ready(self, instance)
        finally:
            instance.end_waiting()

    def _launch(self, request: StartRequest, name: str, digest: str) -> Launched:
        return launch(self.client.registry, request, name, digest, self.client.view)

    def list(self, app: str | None = None, cls: str | None = None) -> list[InstanceInfo]:
        """List live instances as their leases and Ray know them, asking none of them.

        So ``ready`` means that the process is up; `RayInstance.inspect` asks whether ``enter`` is done.
        """
        found = self.client.manager.ask(lambda manager: manager.instances.remote())
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
