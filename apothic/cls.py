"""`Cls`: a class of an app, and the verbs that give instances of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from inspect import BoundArguments
from typing import Any, ClassVar, Final

from apothic.backend import CallRef as _CallRef
from apothic.backend import ControlPlaneClient, InstanceRef, StartRequest, connect
from apothic.bound import BoundCls
from apothic.definition import bind_arguments, signature_from
from apothic.described import DescribedClass
from apothic.errors import (
    ArgumentError,
    ClassNotFoundError,
    HandleError,
    InstanceNotFoundError,
    InstanceStartError,
    UsageError,
)
from apothic.function import Function, RemoteFunction
from apothic.inprocess import FutureCall, run_now
from apothic.instance import ClassInstance, LocalClassInstance
from apothic.names import check_instance_id
from apothic.packing import arguments_digest, dumps
from apothic.pools import Pool, close_everywhere, pool_of, shared_pool
from apothic.targets import Target
from apothic.twins import Twin, Twins, class_twin, twin
from apothic.values import (
    ClassInfo,
    ClassInstanceHandle,
    CloseReport,
    InstanceInfo,
    MethodInfo,
    ParameterInfo,
    digest_of,
)

__all__ = ["Cls", "ClsAio", "ClsClassAio"]


class Cls(DescribedClass):
    """A class of an app: defined here with `@app.cls`, or looked up by name.

    Verbs: `bind` and `remote` give the instance for some arguments, `new` a fresh one, `named` one
    that lives until closed, `local` one in this process, `attach` one that lives already. Calling
    the object is refused: which of these is meant would be a guess.
    """

    aio: ClassVar[Twins[Cls, ClsClassAio, ClsAio]] = Twins(
        lambda: ClsClassAio(), lambda cls: ClsAio(cls)
    )

    # -- look-up -------------------------------------------------------------------------------

    @staticmethod
    def from_name(
        app_name: str,
        class_name: str,
        *,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> Cls:
        """Look up a class of a deployed app. Neither its code nor its dependencies are needed here.

        Raises:
            AppNotFoundError: when no such app is deployed.
            ClassNotFoundError: when the app has no such class.
        """
        connection = connect(client, base_url)
        manifest = connection.find_app(app_name)
        spec = manifest.classes.get(class_name)
        if spec is None:
            raise ClassNotFoundError(
                f"app {app_name!r} has no class {class_name!r}: it has "
                f"{', '.join(manifest.classes) or 'none'}. Check the spelling, or deploy it again."
            )
        return Cls(spec, client=lambda: connection, deployment_id=lambda: manifest.deployment_id)

    @staticmethod
    def from_handle(
        handle: ClassInstanceHandle | dict[str, Any] | str,
        *,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> ClassInstance:
        """Reach a live instance of any class by its handle, from any job of the cluster.

        Raises:
            HandleError: when the handle is malformed or of another cluster.
            InstanceNotFoundError: when the instance is gone.
        """
        parsed = ClassInstanceHandle.parse(handle)
        connection = connect(client, base_url)
        _check_cluster(parsed, connection)
        spec = connection.find_spec(parsed.spec_digest)
        if spec is None:
            raise InstanceNotFoundError(
                f"instance {parsed.instance_id!r} of {parsed.app}.{parsed.cls} is not known to the "
                f"cluster: it was closed, or its cluster has ended since. Start another."
            )
        return Cls(spec, client=lambda: connection).attach(parsed)

    @property
    def close_function(self) -> Function[Any] | RemoteFunction[Any] | None:
        """A function that closes the instance of a handle; None when no exit hook would run."""
        if not self._described.exit_hooks:
            return None
        info = MethodInfo(
            name="close",
            kind="sync",
            parameters=(ParameterInfo(name="handle", kind="POSITIONAL_OR_KEYWORD"),),
            doc="Close the instance that a handle names.",
        )
        target = Target(lambda _: _Closer(self), label=self._label, max_pending=2**31)
        function: RemoteFunction[Any] = self._function(
            info, signature_from(info.parameters), target, RemoteFunction
        )
        return function

    # -- looking -------------------------------------------------------------------------------

    def inspect(self) -> ClassInfo:
        """Tell what is known of the class; its live instances too where a deployment is known."""
        deployment_id = self._deployment_id()
        known = self.remote_only or deployment_id is not None
        instances: tuple[str, ...] = ()
        if known:
            found = self._client().list_instances(self._app_name, self._name)
            instances = tuple(info.instance_id for info in found)
        return ClassInfo(
            name=self._name,
            app_name=self._app_name,
            methods=tuple(self._described.methods.values()),
            parameters=self.parameters,
            enter_hook_names=self._described.enter_hooks,
            exit_hook_names=self._described.exit_hooks,
            tags=self._tags,
            metadata=self._metadata,
            options=self._options.model_dump(mode="json"),
            remote_only=self.remote_only,
            deployment_id=deployment_id,
            spec_digest=self.spec.digest if known else None,
            instances=instances,
        )

    def explain(self) -> str:
        """Tell which nodes could run an instance and why others could not, starting nothing."""
        return self._client().explain(self.spec)

    # -- verbs ---------------------------------------------------------------------------------

    def bind(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Give the instance for these arguments; it starts at first use.

        Every client of a deployed app that binds equal arguments gets the same one; an app that is
        only defined in a script keeps it private to the job. It lives while someone leases it and
        scales with ``max_containers`` and ``tasks_per_container``.

        Raises:
            ArgumentError: when the arguments do not fit the constructor.
            SerializationError: when an argument cannot travel.
        """
        bound = self._bind(args, kwargs)
        digest = arguments_digest(bound)
        packed = self._pack(args, kwargs)

        def find_pool() -> Pool:
            client = self._client()
            shared = self.remote_only or self._deployment_id() is not None
            scope = "" if shared else client.job_id
            key = f"bind-{digest_of([self.spec.digest, digest, scope])[:24]}"

            def open_replica(index: int) -> InstanceRef:
                return client.start(
                    self._request(f"{key}-{index}", packed, digest, named=False, reuse=True)
                )

            def make() -> Pool:
                return Pool(
                    open_replica,
                    label=self._label,
                    max_pending=self._options.max_pending_tasks,
                    max_containers=self._options.max_containers,
                    tasks_per_container=self._options.tasks_per_container,
                    replaceable=True,
                    client=client,
                )

            return shared_pool(client, (key,), make)

        return ClassInstance(self, Target.shared(find_pool, self._label))

    def remote(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Do what `bind` does, start the instance now, and return when ``enter`` has finished.

        Raises:
            ArgumentError: when the arguments do not fit the constructor.
            InstanceStartError: when construction or an enter hook failed.
            NoMatchingOfferError: when no node can ever run it.
        """
        instance = self.bind(*args, **kwargs)
        instance._target.primary().wait_ready()
        return instance

    def partial(self, *args: Any, **kwargs: Any) -> BoundCls:
        """Keep some arguments; later ones are appended, later keywords win."""
        return BoundCls(self, args, kwargs)

    def new(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Start a fresh instance, leased to this job (or to the actor that this runs in).

        Raises:
            ArgumentError: when the arguments do not fit the constructor.
            InstanceStartError: when construction or an enter hook failed; nothing is left behind.
            NoMatchingOfferError: when no node can ever run it.
        """
        digest = arguments_digest(self._bind(args, kwargs))
        request = self._request(
            uuid.uuid4().hex, self._pack(args, kwargs), digest, named=False, reuse=False
        )
        return self._started(lambda: self._client().start(request))

    def named(self, instance_id: str, *args: Any, **kwargs: Any) -> ClassInstance:
        """Get or create the instance of an id, free of races. It lives until it is closed.

        An existing one is given when the arguments are absent or equal to its own. After a crash it
        comes back by itself, with a new construction and ``enter``.

        Raises:
            ConflictError: when it exists with other arguments.
            ArgumentError: when it must be created and the arguments do not fit.
            InvalidOptionError: when the id is not valid.
            InstanceStartError: when construction or an enter hook failed; the name is free again.
            NoMatchingOfferError: when no node can ever run it.
        """
        check_instance_id(instance_id)
        client = self._client()
        try:
            bound = self._bind(args, kwargs)
        except ArgumentError as error:
            if args or kwargs:
                raise
            # Without arguments an existing one is meant, whatever its constructor wants.
            try:
                return self._started(lambda: client.attach(self._named_handle(instance_id)))
            except InstanceNotFoundError:
                raise error from None
        request = self._request(
            instance_id,
            self._pack(args, kwargs),
            arguments_digest(bound),
            named=True,
            reuse=True,
            match=bool(args or kwargs),
        )
        return self._started(lambda: client.start(request))

    def local(self, *args: Any, **kwargs: Any) -> LocalClassInstance:
        """Make the object in this process and run its enter hooks, sync and async ones.

        Raises:
            UsageError: when the code is not in this process.
            ArgumentError: when the arguments do not fit the constructor.
        """
        return self._constructed(args, kwargs)._entered()

    def attach(self, handle: ClassInstanceHandle | dict[str, Any] | str) -> ClassInstance:
        """Reach a live instance of this class, under a lease of this job unless it is named.

        Raises:
            HandleError: when the handle is malformed, or of another cluster, app or class.
            InstanceNotFoundError: when the instance is gone.
        """
        parsed, client = self._check_handle(handle)
        return self._instance(client.attach(parsed))

    def close_handle(self, handle: ClassInstanceHandle | dict[str, Any] | str) -> CloseReport:
        """Close the instance that a handle names; idempotent.

        Raises:
            HandleError: when the handle is malformed, or of another cluster, app or class.
        """
        parsed, client = self._check_handle(handle)
        try:
            return close_everywhere(client, client.attach(parsed))
        except InstanceNotFoundError:
            return CloseReport(closed=False, note="it was closed before")

    def close_named(self, instance_id: str, *args: Any, **kwargs: Any) -> CloseReport:
        """Close the named instance of an id; idempotent.

        Args:
            instance_id: its id.
            *args: when any are given, they must equal those that it was made with.
            **kwargs: likewise.

        Raises:
            ArgumentError: when arguments are given that differ from its own.
            InvalidOptionError: when the id is not valid.
        """
        check_instance_id(instance_id)
        try:
            client = self._client()
            ref = client.attach(self._named_handle(instance_id))
            if args or kwargs:
                digest = arguments_digest(self._bind(args, kwargs))
                if ref.inspect().arguments_digest != digest:
                    raise ArgumentError(
                        f"{self._label} {instance_id!r} was made with other arguments than those "
                        f"given, so it is left alone. Leave the arguments out to close it anyway."
                    )
            return close_everywhere(client, ref)
        except InstanceNotFoundError:
            return CloseReport(closed=False, note="no instance of this id lives")

    # -- inside --------------------------------------------------------------------------------

    def _constructed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LocalClassInstance:
        if self._local_cls is None:
            raise UsageError(
                f"{self._name} was looked up by name: its code is not in this process, so it has "
                f"no local instance. Import the module that defines it."
            )
        self._bind(args, kwargs)
        return LocalClassInstance(self, self._local_cls(*args, **kwargs))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
        return bind_arguments(self._name, self._described.signature, args, kwargs)

    def _pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        return dumps((args, kwargs))

    def _request(
        self,
        instance_id: str,
        packed: bytes,
        digest: str,
        *,
        named: bool,
        reuse: bool,
        match: bool = True,
    ) -> StartRequest:
        return StartRequest(
            spec=self.spec,
            instance_id=instance_id,
            named=named,
            reuse=reuse,
            arguments=packed,
            arguments_digest=digest,
            match_arguments=match,
            blobs=self.blobs,
        )

    def _named_handle(self, instance_id: str) -> ClassInstanceHandle:
        return ClassInstanceHandle(
            cluster_id=self._client().cluster_id,
            app=self._app_name or "",
            cls=self._name,
            instance_id=instance_id,
            spec_digest="",
            named=True,
        )

    def _check_handle(
        self, handle: ClassInstanceHandle | dict[str, Any] | str
    ) -> tuple[ClassInstanceHandle, ControlPlaneClient]:
        parsed = ClassInstanceHandle.parse(handle)
        if (parsed.app, parsed.cls) != (self._app_name, self._name):
            raise HandleError(
                f"the handle is of {parsed.app}.{parsed.cls}, not of {self._label}. Use "
                f"Cls.from_handle, or the class that it belongs to."
            )
        client = self._client()
        _check_cluster(parsed, client)
        return parsed, client

    def _started(self, find: Callable[[], InstanceRef]) -> ClassInstance:
        ref: InstanceRef | None = None
        try:
            ref = find()  # within, so that nothing is left whenever Ctrl-C comes
            ref.wait_ready()
            return self._instance(ref)
        except InstanceStartError:
            raise  # nothing of it is left
        except BaseException:
            if ref is not None:
                ref.release()  # nobody else knows of a fresh one; a named one is not leased
            raise

    def _instance(self, ref: InstanceRef) -> ClassInstance:
        label = f"{self._label} {ref.handle.instance_id!r}"
        target = Target.shared(
            lambda: pool_of(
                self._client(), ref, label=label, max_pending=self._options.max_pending_tasks
            ),
            label,
        )
        target.primary()
        return ClassInstance(self, target)

    def __call__(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Refuse: a call could mean a local object or any of the remote verbs.

        Raises:
            UsageError: always; the message lists the verbs.
        """
        raise UsageError(
            f"{self._name}(…) does not say where the instance lives. Write {self._name}.bind(…) or "
            f".remote(…) for the one of these arguments, .new(…) for a fresh one, "
            f".named('id', …) for one that stays, .local(…) for one in this process."
        )

    def __getattr__(self, name: str) -> Function[Any] | RemoteFunction[Any]:
        """Give a remote method to read; calling it says that it needs an instance."""
        if name.startswith("_") or hasattr(type(self), name):
            return object.__getattribute__(self, name)  # type: ignore[no-any-return]
        return self._class_function(name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type[Any], ...]:
        """Let classes inherit from a decorated class."""
        if self._local_cls is None:
            raise UsageError(
                f"{self._name} was looked up by name: its code is not in this process, so nothing "
                f"can inherit from it. Import the module that defines it."
            )
        return (self._local_cls,)

    def __reduce__(self) -> tuple[Callable[[], Cls], tuple[()], dict[str, Any]]:
        """Travel without the connection.

        The state comes last, since classes and apps refer to one another.
        """
        state = {
            "spec": self._spec if self._local_cls is None else None,
            "app_name": self._app_name,
            "name": self._name,
            "local_cls": self._local_cls,
            "options": self._options,
            "tags": self._tags,
            "metadata": self._metadata,
            "deployed": self._deployment_id(),
        }
        return _empty, (), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state over; the connection is this process's own."""
        deployed = state.pop("deployed")
        Cls.__init__(self, **state, deployment_id=lambda: deployed)

    def __repr__(self) -> str:
        """Name app, class and where the code is."""
        where = "remote" if self.remote_only else "local"
        return f"<apothic.Cls {self._label} ({where} code)>"


class ClsClassAio:
    """Async twins of the look-ups, which need no class: `Cls.aio`."""

    __slots__ = ()

    from_name: Final = class_twin(Cls.from_name)
    from_handle: Final = class_twin(Cls.from_handle)


class ClsAio(Twin[Cls], ClsClassAio):
    """Async twins of `Cls`."""

    __slots__ = ()

    inspect: Final = twin(Cls.inspect)
    explain: Final = twin(Cls.explain)
    remote: Final = twin(Cls.remote)
    bind: Final = twin(Cls.bind)
    new: Final = twin(Cls.new, undo=ClassInstance.close)
    named: Final = twin(Cls.named)
    attach: Final = twin(Cls.attach)
    close_handle: Final = twin(Cls.close_handle)
    close_named: Final = twin(Cls.close_named)

    async def local(self, *args: Any, **kwargs: Any) -> LocalClassInstance:
        """Do what `Cls.local` does on the calling thread, and await the async hooks."""
        return await self._target._constructed(args, kwargs)._aentered()


class _Closer(InstanceRef):
    """What `Cls.close_function` calls: it closes handles through the class."""

    def __init__(self, cls: Cls) -> None:
        self._cls = cls

    @property
    def handle(self) -> ClassInstanceHandle:
        raise UsageError("close_function is no instance: it takes the handle of one.")

    @property
    def native(self) -> Any:
        return self._cls

    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> _CallRef:
        from apothic.inprocess import LoopThread

        return FutureCall(run_now(LoopThread(), self._cls.close_handle, method, args, kwargs))

    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        raise UsageError("close_function gives one value: use remote or spawn.")

    def wait_ready(self) -> None:
        return None

    def inspect(self) -> InstanceInfo:
        raise UsageError("close_function is no instance: it takes the handle of one.")

    def close(self) -> CloseReport:
        return CloseReport(closed=False)

    def release(self) -> None:
        return None


def _empty() -> Cls:
    return Cls.__new__(Cls)


def _check_cluster(handle: ClassInstanceHandle, client: ControlPlaneClient) -> None:
    if handle.cluster_id != client.cluster_id:
        raise HandleError(
            f"the handle is of cluster {handle.cluster_id!r}, this process is connected to "
            f"{client.cluster_id!r}. Connect to the handle's cluster with base_url, or make a new "
            f"instance here."
        )
