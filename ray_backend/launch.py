"""Launch an instance: its plan, its placement and its options, as one detached named actor."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import ray
from ray.runtime_env import RuntimeEnv

from apothic.backend import StartRequest
from apothic.options import ClassOptions, MountSpec
from apothic.values import ClassSpec
from apothic.volume import HOST_LOCAL, StorageMount
from ray_backend import volumes
from ray_backend.actors.compile import CONTROL_GROUP, CONTROL_THREADS, compile_actor
from ray_backend.actors.plan import InstancePlan
from ray_backend.environments import Environment, compile_image
from ray_backend.names import NAMESPACE
from ray_backend.placement.live import ClusterView, Placement, place
from ray_backend.ray_api import is_client_mode
from ray_backend.registry import Registry

__all__ = [
    "Launched",
    "find_actor",
    "homes",
    "launch",
    "place_with_volumes",
    "relaunch",
    "tied_nodes",
]

INLINE_BYTES = 64 * 1024
"""Constructor arguments up to this size go with the actor; Ray keeps larger ones in the creator's
memory, and a restart after the creator's end would fail for ever. They go to the registry."""

CREATION_ATTEMPTS = 10
"""How often to try for a name that is taken by an actor which is gone when it is looked for."""

_compiled: dict[str, Any] = {}
_environments: dict[str, Environment] = {}


class Launched(NamedTuple):
    """An actor, and where it was asked for; None when it is one that somebody else made."""

    actor: Any
    placement: Placement | None


def launch(
    registry: Registry,
    request: StartRequest,
    name: str,
    spec_digest: str,
    view: Callable[[], ClusterView],
) -> Launched:
    """Make the actor, or give the one of this name when the request reuses it.

    Args:
        registry: of the cluster.
        request: what is wanted.
        name: the actor's.
        spec_digest: the class's.
        view: gives the cluster as it is; asked only when an actor is to be made.

    Raises:
        NoMatchingOfferError: when no node can ever run it.
        EnvironmentSetupError: when no node can make its image.
        ConflictError: when a volume exists with another backend or size.
    """
    if request.reuse:
        found = find_actor(name)
        if found is not None:
            return Launched(found, None)
    spec = request.spec
    options = ClassOptions.model_validate(spec.options)
    environment = _environments.get(spec_digest)
    if environment is None:
        environment = _environments[spec_digest] = compile_image(options.image)
    placement = place_with_volumes(registry, view(), options)
    plan = make_plan(request, name, spec_digest, options, environment)
    if plan.arguments is None:
        key = registry.arguments_key(name, plan.arguments_digest)
        registry.put_blob(key, request.arguments)
    # Its restarts keep to what is asked for now; the manager asks anew when that is gone.
    revivable = request.named and not placement.is_free and placement.tied_to is None
    ray_options = _ray_options(name, options, placement)
    if environment.runtime_env is not None:
        ray_options["runtime_env"] = environment.runtime_env
    make = _actor_class(spec, spec_digest, plan)
    if is_client_mode():
        # A proxy makes actors later, and does not tell who made one.
        make = make.options(get_if_exists=request.reuse, **ray_options)
        return Launched(make.remote(replace(plan, keeps_revival=revivable)), None)
    for attempt in range(CREATION_ATTEMPTS):
        try:
            launched = Launched(make.options(**ray_options).remote(plan), placement)
        except ValueError:
            # Somebody was quicker; we must know, since only who made an actor may move it.
            found = find_actor(name) if request.reuse else None
            if found is not None:
                return Launched(found, None)
            if not request.reuse or attempt == CREATION_ATTEMPTS - 1:
                raise
        else:
            if revivable:
                _keep_revival(registry, name, plan.revival(spec.model_dump_json()))
            return launched
    raise AssertionError("unreachable")


def _keep_revival(registry: Registry, name: str, record: bytes) -> None:
    """Store how to make an actor again that was made just now, unless it is gone already."""
    registry.put_revival(name, record)
    if registry.get_lease(name) is None:  # closed meanwhile, and nobody will look for this again
        registry.delete_revival(name)


def relaunch(
    registry: Registry, record: bytes, view: ClusterView, runtime_env: Mapping[str, Any] | None
) -> tuple[Placement, Callable[[], None]]:
    """Prepare to make a named actor again from what `launch` stored, where there is room now.

    Args:
        registry: the cluster's.
        record: the stored one.
        view: the cluster.
        runtime_env: of the actor that it replaces; None takes that of the calling process.

    Returns:
        Where it would go, and what makes it.

    Raises:
        NoMatchingOfferError: when nothing can run it.
    """
    plan, text = pickle.loads(record)
    spec = ClassSpec.model_validate_json(text)
    options = ClassOptions.model_validate(spec.options)
    placement = place(view, options, tied_nodes(registry, options))
    ray_options = _ray_options(plan.actor_name, options, placement)
    if runtime_env:
        ray_options["runtime_env"] = RuntimeEnv.deserialize(json.dumps(dict(runtime_env)))

    def make() -> None:
        _actor_class(spec, plan.spec_digest, plan).options(**ray_options).remote(plan)

    return placement, make


def _ray_options(name: str, options: ClassOptions, placement: Placement) -> dict[str, Any]:
    return {
        **placement.ray_options(),
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": options.concurrent_requests,
    }


def place_with_volumes(registry: Registry, view: ClusterView, options: ClassOptions) -> Placement:
    """Decide where an instance runs, and tie its new host-local volumes to that node.

    Tied only once they are mounted, a process that is replaced could come to another node, where they
    are not. Where nothing has room, the node that has it first decides.
    """
    placement = place(view, options, tied_nodes(registry, options))
    new = [
        mount.volume
        for mount in options.mounts
        if mount.backend == HOST_LOCAL and registry.volume_node(mount.volume) is None
    ]
    node = placement.with_a_node().node_id
    if not new or node is None:
        return placement
    for name in new:
        registry.pin_volume(name, node)  # who is quicker decides for all
    return place(view, options, homes(registry, options.mounts))


def tied_nodes(registry: Registry, options: ClassOptions) -> list[str]:
    """Record the volumes that a class mounts; name the nodes that its host-local ones are on."""
    for mount in options.mounts:
        volumes.ensure(
            registry,
            StorageMount(
                mount.volume, mount.backend, mount.size_gb, mount.path, mount.create_if_missing
            ),
        )
    return homes(registry, options.mounts)


def homes(registry: Registry, mounts: Iterable[MountSpec]) -> list[str]:
    """Name the nodes that host-local volumes are tied to."""
    found = {registry.volume_node(mount.volume) for mount in mounts if mount.backend == HOST_LOCAL}
    return sorted(node for node in found if node is not None)


def find_actor(name: str) -> Any:
    """Give the actor of a name; None when there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _actor_class(spec: ClassSpec, spec_digest: str, plan: InstancePlan) -> Any:
    """Give the actor class of a spec; compiled and exported once per job."""
    key = f"{ray.get_runtime_context().get_job_id()}/{spec_digest}"
    if key not in _compiled:
        make: Any = ray.remote  # its stubs do not know concurrency groups
        _compiled[key] = make(concurrency_groups={CONTROL_GROUP: CONTROL_THREADS})(
            compile_actor(plan)
        )
    return _compiled[key]


def make_plan(
    request: StartRequest,
    name: str,
    spec_digest: str,
    options: ClassOptions,
    environment: Environment,
) -> InstancePlan:
    """Write down what the worker must know."""
    spec = request.spec
    inline = len(request.arguments) <= INLINE_BYTES
    return InstancePlan(
        app=spec.app,
        cls=spec.name,
        instance_id=request.instance_id,
        actor_name=name,
        named=request.named,
        spec_digest=spec_digest,
        blob_digest=spec.blob_digest,
        methods=tuple((method.name, method.kind) for method in spec.methods),
        enter_hooks=spec.enter_hooks,
        exit_hooks=spec.exit_hooks,
        arguments=request.arguments if inline else None,
        arguments_digest=request.arguments_digest,
        timeout_s=options.timeout_s,
        concurrency=options.concurrent_requests,
        secrets=options.secrets,
        mounts=tuple(mount.model_dump() for mount in options.mounts),
        files=environment.files,
        workdir=environment.workdir,
    )
