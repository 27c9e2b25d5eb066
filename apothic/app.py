"""`App`: what an application defines."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from apothic.backend import ControlPlaneClient, connect
from apothic.cls import Cls
from apothic.decorators import check_metadata, check_tags
from apothic.definition import describe_class
from apothic.entrypoints import Entrypoints
from apothic.errors import (
    ConflictError,
    DefinitionError,
    InvalidOptionError,
)
from apothic.image import Image
from apothic.names import check_name
from apothic.options import ClassOptions, check_network
from apothic.remote_app import RemoteApp, class_of, member_of, methods_of, sandbox_of
from apothic.retries import Retries
from apothic.sandbox import Sandbox
from apothic.secret import Secret
from apothic.twins import Twin, Twins, class_twin, twin
from apothic.values import AppManifest, Network
from apothic.volume import StorageMount

if TYPE_CHECKING:
    from apothic.function import Function, RemoteFunction
    from apothic.offers import OfferFiltersModel

__all__ = ["App", "AppAio", "AppClassAio"]

_F = TypeVar("_F", bound=Callable[..., Any])


class App:
    """A named set of classes and sandboxes. Importing or defining one connects to nothing."""

    aio: ClassVar[Twins[App, AppClassAio, AppAio]] = Twins(
        lambda: AppClassAio(), lambda app: AppAio(app)
    )

    def __init__(self, name: str, *, client: ControlPlaneClient | None = None) -> None:
        """Name an app.

        Args:
            name: 1 to 63 letters, digits, ``_``, ``.`` or ``-``.
            client: the connection to use; without it, the first use connects: to Ray as this process
                has initialised it, else to ``RAY_ADDRESS``, else to a Ray that it starts here.

        Raises:
            InvalidOptionError: when the name is not valid, or client is no client.
        """
        self._name = check_name("app", name)
        if client is not None:
            connect(client)  # refuses what is no client
        self._given_client = client
        self._classes: dict[str, Cls] = {}
        self._sandboxes: dict[str, Sandbox] = {}
        self._entrypoints = Entrypoints(self._name)
        self._deployment_id: str | None = None

    # -- properties ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The app's name."""
        return self._name

    @property
    def client(self) -> ControlPlaneClient:
        """The connection; the first use connects.

        Raises:
            ConnectionFailedError: when the cluster cannot be reached.
        """
        return connect(self._given_client)

    @property
    def deployment_id(self) -> str | None:
        """The id that the last `deploy` of this object gave, or None."""
        return self._deployment_id

    @property
    def functions(self) -> dict[str, Function[Any] | RemoteFunction[Any]]:
        """The methods of the app's classes, as ``Class.method``; an app has no other functions."""
        return methods_of(self._classes)

    @property
    def classes(self) -> dict[str, Cls]:
        """The classes by name."""
        return dict(self._classes)

    @property
    def sandboxes(self) -> dict[str, Sandbox]:
        """The sandbox definitions by name."""
        return dict(self._sandboxes)

    @property
    def sandbox_names(self) -> tuple[str, ...]:
        """The names of the sandbox definitions."""
        return tuple(self.sandboxes)

    @property
    def local_entrypoints(self) -> dict[str, Callable[..., Any]]:
        """The local entry points by name."""
        return self._entrypoints.all

    # -- definitions ---------------------------------------------------------------------------

    def cls(
        self,
        *,
        name: str | None = None,
        gpu: str | list[str] | None = None,
        gpu_count: int | None = None,
        min_vram_gb: int | None = None,
        geolocation: str | list[str] | None = None,
        offer_filters: OfferFiltersModel | dict[str, Any] | None = None,
        max_cost_per_hour_usd: float | None = None,
        max_cost_per_tflop_hour_usd: float | None = None,
        min_total_flops: float | None = None,
        min_gpu_ram_bandwidth_gbps: float | None = None,
        min_cpu_cores: float | None = None,
        min_cpu_ram_gb: float | None = None,
        min_cpu_ghz: float | None = None,
        min_disk_bandwidth_mb_s: float | None = None,
        min_internet_upload_mbps: float | None = None,
        min_internet_download_mbps: float | None = None,
        secure_cloud_only: bool | None = None,
        cpu: int = 1,
        memory_mb: int = 1024,
        disk_gb: float | None = None,
        timeout_s: int = 600,
        retries: int | Retries | None = None,
        max_retries: int = 0,
        concurrent_requests: int = 1,
        max_pending_tasks: int = 100,
        max_containers: int = 1,
        tasks_per_container: int = 1,
        image: Image | None = None,
        secrets: list[Secret] | None = None,
        volumes: dict[str, StorageMount] | list[StorageMount] | None = None,
        tags: Iterable[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Callable[[type[Any]], Cls]:
        """Make a class a service of this app.

        Args:
            name: its name in the app; the class's own by default.
            gpu: GPU model, or several in the order of preference; ``any`` takes whichever is there.
            gpu_count: GPUs per container; 1 when another GPU constraint is given.
            min_vram_gb: memory per GPU, in GB of 1000 MB.
            geolocation: country code or region of the node, or several.
            offer_filters: further conditions on the node's offer, ``{field: {operator: value}}``.
            max_cost_per_hour_usd: cost of the container's share of the node, in USD per hour.
            max_cost_per_tflop_hour_usd: that cost per FP32 TFLOPS.
            min_total_flops: FP32 TFLOPS of the container's GPUs.
            min_gpu_ram_bandwidth_gbps: memory bandwidth per GPU, in GB/s.
            min_cpu_cores: of the node.
            min_cpu_ram_gb: of the node, in GB.
            min_cpu_ghz: of the node.
            min_disk_bandwidth_mb_s: of the node, in MB/s.
            min_internet_upload_mbps: of the node, in megabits per second.
            min_internet_download_mbps: of the node, in megabits per second.
            secure_cloud_only: only nodes that say they are in a secure cloud.
            cpu: CPU cores per container.
            memory_mb: memory per container, in MB.
            disk_gb: disk of the node, in GB.
            timeout_s: limit on one call's execution, in seconds; queueing is not counted.
            retries: a `Retries` policy, or that many retries with the default delays.
            max_retries: that many retries, when ``retries`` is not given.
            concurrent_requests: calls that run at once in one container. With 1, construction,
                hooks and all sync methods run on one thread.
            max_pending_tasks: unfinished calls of one process beyond which the next is refused.
            max_containers: upper limit of containers behind one bound instance.
            tasks_per_container: calls in flight per container before another one starts.
            image: what must be present where the class runs.
            secrets: environment variables, resolved in the worker.
            volumes: directories that outlive instances, by mount path.
            tags: words to find the class by.
            metadata: JSON values shown beside them.

        Returns:
            A decorator that gives a `Cls` in place of the class.

        Raises:
            InvalidOptionError: naming the option, the value, the rule and the remedy.
            DefinitionError: when the class cannot become a service.
            ConflictError: when the app has a class of this name.
        """
        options = ClassOptions.of_arguments(locals())
        if name is not None:
            check_name("class", name)
        checked_tags, checked_metadata = check_tags(tags), check_metadata(metadata)

        def decorate(local_cls: type[Any]) -> Cls:
            if isinstance(local_cls, Cls):
                raise DefinitionError(
                    f"{local_cls.name} is decorated with @app.cls already: a class belongs to one "
                    f"app. Inherit from it to use it in another."
                )
            definition = describe_class(local_cls)
            cls_name = check_name("class", name or local_cls.__name__)
            self._check_free(cls_name, local_cls)
            if (
                options.max_retries
                and any(info.is_generator for info in definition.methods.values())
                and all(info.is_generator for info in definition.methods.values())
            ):
                raise InvalidOptionError(
                    f"retries={options.max_retries} on {cls_name}, which has generator methods "
                    f"only: items that were delivered cannot be taken back. Leave retries out."
                )
            made = Cls(
                app_name=self._name,
                name=cls_name,
                local_cls=local_cls,
                definition=definition,
                options=options,
                tags=checked_tags,
                metadata=checked_metadata,
                client=lambda: self.client,
                deployment_id=lambda: self._deployment_id,
            )
            self._classes[cls_name] = made
            return made

        return decorate

    def _check_free(self, name: str, local_cls: type[Any]) -> None:
        if name in self._sandboxes:
            raise ConflictError(
                f"app {self._name!r} has a sandbox {name!r}: app.{name} would be either. Choose another "
                f"name with @app.cls(name=…)."
            )
        known = self._classes.get(name)
        if known is None or known.local_cls is None:
            return
        # Running a cell or reloading a module defines the same class again; that replaces it.
        same = (known.local_cls.__module__, known.local_cls.__qualname__)
        if same != (local_cls.__module__, local_cls.__qualname__):
            raise ConflictError(
                f"app {self._name!r} has a class {name!r} already, {known.local_cls!r}. Give one of "
                f"them another name with @app.cls(name=…)."
            )

    def sandbox(
        self,
        *,
        name: str = "default",
        gpu: str | list[str] | None = None,
        gpu_count: int | None = None,
        min_vram_gb: int | None = None,
        geolocation: str | list[str] | None = None,
        offer_filters: OfferFiltersModel | dict[str, Any] | None = None,
        max_cost_per_hour_usd: float | None = None,
        max_cost_per_tflop_hour_usd: float | None = None,
        min_total_flops: float | None = None,
        min_gpu_ram_bandwidth_gbps: float | None = None,
        min_cpu_cores: float | None = None,
        min_cpu_ram_gb: float | None = None,
        min_cpu_ghz: float | None = None,
        min_disk_bandwidth_mb_s: float | None = None,
        min_internet_upload_mbps: float | None = None,
        min_internet_download_mbps: float | None = None,
        secure_cloud_only: bool | None = None,
        cpu: int = 1,
        memory_mb: int = 1024,
        disk_gb: float | None = None,
        timeout_s: int = 3600,
        retries: int | Retries | None = None,
        max_retries: int = 0,
        concurrent_requests: int = 1,
        max_pending_tasks: int = 100,
        max_containers: int = 1,
        tasks_per_container: int = 1000,
        image: Image | None = None,
        secrets: list[Secret] | None = None,
        volumes: dict[str, StorageMount] | list[StorageMount] | None = None,
        network: Network = "none",
        tags: Iterable[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Sandbox:
        """Define workspaces of this app: each session of it is a container of its own.

        Args:
            name: its name in the app.
            gpu: as for `cls`, and so are the others up to ``min_internet_download_mbps``.
            gpu_count: GPUs per container.
            min_vram_gb: memory per GPU, in GB of 1000 MB.
            geolocation: country code or region of the node, or several.
            offer_filters: further conditions on the node's offer.
            max_cost_per_hour_usd: cost of the container's share of the node, in USD per hour.
            max_cost_per_tflop_hour_usd: that cost per FP32 TFLOPS.
            min_total_flops: FP32 TFLOPS of the container's GPUs.
            min_gpu_ram_bandwidth_gbps: memory bandwidth per GPU, in GB/s.
            min_cpu_cores: of the node.
            min_cpu_ram_gb: of the node, in GB.
            min_cpu_ghz: of the node.
            min_disk_bandwidth_mb_s: of the node, in MB/s.
            min_internet_upload_mbps: of the node, in megabits per second.
            min_internet_download_mbps: of the node, in megabits per second.
            secure_cloud_only: only nodes that say they are in a secure cloud.
            cpu: CPU cores of the container, a limit.
            memory_mb: memory of the container, in MB, a limit.
            disk_gb: disk of the container, in GB.
            timeout_s: limit on an exec that has none of its own, in seconds.
            retries: policy for opening a session that failed to start; execs are never repeated.
            max_retries: that many further attempts, when ``retries`` is not given.
            concurrent_requests: above 1, so many execs run at once in a session and the others wait
                their turn. The default sets no limit of its own: a program may wait for another.
            max_pending_tasks: unfinished verbs of one process on one session beyond which the next
                is refused.
            max_containers: with ``tasks_per_container`` a product: the cap on live sessions.
            tasks_per_container: see ``max_containers``; a session never shares its container.
            image: what is in the container.
            secrets: environment variables of every exec.
            volumes: directories that outlive sessions, by mount path.
            network: ``none``, or ``internet`` for the public internet and no private network.
            tags: words to find it by.
            metadata: JSON values shown beside them.

        Raises:
            InvalidOptionError: naming the option, the value, the rule and the remedy.
            ConflictError: when the app has a sandbox of this name with other options, or a class.
        """
        options = ClassOptions.of_arguments(locals())
        made = Sandbox(
            app_name=self._name,
            name=check_name("sandbox", name),
            options=options,
            network=check_network(network),
            tags=check_tags(tags),
            metadata=check_metadata(metadata),
            client=lambda: self.client,
            deployment_id=lambda: self._deployment_id,
        )
        if name in self._classes:
            raise ConflictError(
                f"app {self._name!r} has a class {name!r}: app.{name} would be either. Choose another "
                f"name."
            )
        # Running a cell or reloading a module defines the same sandbox again; that is no conflict.
        known = self._sandboxes.get(name)
        if known is not None and not known.same_as(made):
            raise ConflictError(
                f"app {self._name!r} has a sandbox {name!r} already, with other options. Give one of "
                f"them another name with app.sandbox(name=…)."
            )
        self._sandboxes[name] = made
        return made

    def local_entrypoint(self, *, name: str | None = None) -> Callable[[_F], _F]:
        """Make a function the program that `run_local` starts; it runs in this process.

        Raises:
            InvalidOptionError: when the name is not valid.
            ConflictError: when the app has an entry point of this name.
        """
        return self._entrypoints.decorator(name)

    # -- look-up -------------------------------------------------------------------------------

    @staticmethod
    def lookup(
        name: str,
        *,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> RemoteApp:
        """Find a deployed app.

        Raises:
            AppNotFoundError: when no such app is deployed; the message names those that are.
        """
        connection = connect(client, base_url)
        return RemoteApp(name, connection)

    def get_class(self, name: str) -> Cls:
        """Give a class of this app.

        Raises:
            ClassNotFoundError: when there is none of this name.
        """
        return class_of(self._name, self._classes, name)

    def get_sandbox(self, name: str) -> Sandbox:
        """Give a sandbox definition of this app.

        Raises:
            SandboxNotFoundError: when there is none of this name.
        """
        return sandbox_of(self._name, self._sandboxes, name)

    def get_local_entrypoint(self, name: str | None = None) -> Callable[..., Any]:
        """Give an entry point; without a name the only one.

        Raises:
            NotFoundError: when there is none of this name, or the name is needed.
        """
        return self._entrypoints.get(name)

    def __getattr__(self, name: str) -> Any:
        """Give a class or sandbox of this app as an attribute."""
        if name.startswith("_") or hasattr(type(self), name):
            # A property that raised AttributeError inside: its own message counts.
            return object.__getattribute__(self, name)
        return member_of(self._name, self._classes, self._sandboxes, name)

    def __dir__(self) -> list[str]:
        """List verbs, classes and sandboxes."""
        return sorted({*super().__dir__(), *self._classes, *self._sandboxes})

    # -- verbs ---------------------------------------------------------------------------------

    def manifest(self) -> AppManifest:
        """Describe the app as `deploy` stores it; packs the code of its classes.

        Raises:
            SerializationError: when a class cannot travel; the message names what stands in the way.
        """
        return AppManifest(
            name=self._name,
            classes={name: cls.spec for name, cls in self._classes.items()},
            sandboxes={name: sandbox.spec for name, sandbox in self._sandboxes.items()},
        )

    def deploy(self, *, close_outdated: bool = False) -> str:
        """Store the app on the cluster, so that any process can look its classes up by name.

        Deploying equal content again changes nothing and gives the same id. Instances that run keep
        their version.

        Args:
            close_outdated: close instances of older versions of these classes, with their exit
                hooks.

        Returns:
            The deployment id.

        Raises:
            SerializationError: when a class cannot travel.
            ConnectionFailedError: when the cluster cannot be reached.
        """
        manifest = self.manifest()
        blobs: dict[str, bytes] = {}
        for cls in self._classes.values():
            blobs.update(cls.blobs())
        for sandbox in self._sandboxes.values():
            blobs.update(sandbox.blobs())
        self.client.deploy(manifest, blobs, close_outdated=close_outdated)
        self._deployment_id = manifest.deployment_id
        return manifest.deployment_id

    def run_local(
        self,
        *,
        entrypoint_name: str | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an entry point in this process; an awaitable result is awaited.

        Raises:
            NotFoundError: when there is no such entry point.
        """
        value = self.get_local_entrypoint(entrypoint_name)(*(args or ()), **(kwargs or {}))
        if inspect.isawaitable(value):
            return asyncio.run(_await(value))
        return value

    def __reduce__(self) -> tuple[Callable[[str], App], tuple[str], dict[str, Any]]:
        """Travel without the connection.

        The state comes last, since classes and apps refer to one another.
        """
        state = {
            "_classes": self._classes,
            "_sandboxes": self._sandboxes,
            "_deployment_id": self._deployment_id,
        }
        return App, (self._name,), state

    def __repr__(self) -> str:
        """Name the app and what it has."""
        names = ", ".join([*self._classes, *self._sandboxes])
        return f"<apothic.App {self._name!r} ({names or 'no classes'})>"


class AppClassAio:
    """Async twin of `App.lookup`, which needs no app of this process: `App.aio`."""

    __slots__ = ()

    lookup: Final = class_twin(App.lookup)


class AppAio(Twin[App], AppClassAio):
    """Async twins of `App`."""

    __slots__ = ()

    deploy: Final = twin(App.deploy)
    manifest: Final = twin(App.manifest)

    async def run_local(
        self,
        *,
        entrypoint_name: str | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an entry point; an awaitable result is awaited on this loop."""
        value = self._target.get_local_entrypoint(entrypoint_name)(*(args or ()), **(kwargs or {}))
        return await value if inspect.isawaitable(value) else value


async def _await(value: Any) -> Any:
    return await value
