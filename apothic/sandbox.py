"""`Sandbox`: a definition of workspaces, and the verbs that give sessions of it."""

from __future__ import annotations

import inspect
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from apothic.backend import ControlPlaneClient, SandboxRef, SandboxRequest, connect
from apothic.digests import digest_of
from apothic.errors import (
    ArgumentError,
    HandleError,
    InvalidOptionError,
    SandboxLostError,
    SandboxNotFoundError,
    SandboxSessionNotFoundError,
    SandboxStartError,
)
from apothic.names import check_instance_id
from apothic.options import ClassOptions
from apothic.sandbox_values import LOCAL_CLUSTER, SandboxHandle, SandboxInfo, SandboxSpec
from apothic.session import METHOD_NAMES, SandboxSession
from apothic.session_arguments import env_bytes
from apothic.twins import Twin, Twins, class_twin, twin
from apothic.values import CloseReport, Network

__all__ = ["Sandbox", "SandboxAio", "session_from_handle"]


class Sandbox:
    """A definition of workspaces: made with `App.sandbox`, or looked up by name.

    `create` gives a fresh session, `named` one that lives until closed, `local` one on this machine,
    `attach` one that lives already.
    """

    def __init__(
        self,
        spec: SandboxSpec | None = None,
        *,
        app_name: str | None = None,
        name: str = "default",
        options: ClassOptions | None = None,
        network: Network = "none",
        tags: tuple[str, ...] = (),
        metadata: dict[str, Any] | None = None,
        client: Callable[[], ControlPlaneClient] = connect,
        deployment_id: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Describe a sandbox, from a spec or from options; made by `App.sandbox` and by look-ups."""
        self._remote_only = spec is not None
        self._spec = spec
        self._app_name = spec.app if spec is not None else app_name
        self._name = spec.name if spec is not None else name
        self._options = (
            ClassOptions.model_validate(spec.options) if spec is not None else options
        ) or ClassOptions()
        self._network: Network = spec.network if spec is not None else network
        self._tags = spec.tags if spec is not None else tags
        self._metadata = dict((spec.metadata if spec is not None else metadata) or {})
        self._client = client
        self._deployment_id = deployment_id
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    aio: ClassVar[Twins[Sandbox, SandboxClassAio, SandboxAio]] = Twins(
        lambda: SandboxClassAio(), lambda sandbox: SandboxAio(sandbox)
    )

    # -- look-up -------------------------------------------------------------------------------

    @staticmethod
    def from_name(
        app_name: str,
        sandbox_name: str,
        *,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> Sandbox:
        """Look up a sandbox definition of a deployed app.

        Raises:
            AppNotFoundError: when no such app is deployed.
            SandboxNotFoundError: when the app has no such definition.
        """
        connection = connect(client, base_url)
        manifest = connection.find_app(app_name)
        spec = manifest.sandboxes.get(sandbox_name)
        if spec is None:
            raise SandboxNotFoundError(
                f"app {app_name!r} has no sandbox {sandbox_name!r}: it has "
                f"{', '.join(manifest.sandboxes) or 'none'}. Check the spelling, or deploy it again."
            )
        return Sandbox(
            spec, client=lambda: connection, deployment_id=lambda: manifest.deployment_id
        )

    # -- properties ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The definition's name in its app."""
        return self._name

    @property
    def app_name(self) -> str | None:
        """The app's name."""
        return self._app_name

    @property
    def method_names(self) -> tuple[str, ...]:
        """Names of the verbs of its sessions."""
        return METHOD_NAMES

    @property
    def tags(self) -> tuple[str, ...]:
        """As given to `App.sandbox`."""
        return self._tags

    @property
    def metadata(self) -> dict[str, Any]:
        """As given to `App.sandbox`."""
        return dict(self._metadata)

    @property
    def signature(self) -> inspect.Signature | None:
        """What opening a session takes, as of `create`."""
        signature = inspect.signature(self.create)
        return signature.replace(return_annotation=inspect.Signature.empty)

    @property
    def options(self) -> ClassOptions:
        """The checked options."""
        return self._options

    @property
    def network(self) -> Network:
        """What its sessions reach: ``none`` or ``internet``."""
        return self._network

    @property
    def label(self) -> str:
        """App and name, for messages."""
        return f"{self._app_name}.{self._name}" if self._app_name else self._name

    # -- looking -------------------------------------------------------------------------------

    def inspect(self) -> SandboxInfo:
        """Tell what is known of it; its live sessions too where a deployment is known."""
        deployment_id = self._deployment_id()
        known = self._remote_only or deployment_id is not None
        sessions: tuple[str, ...] = ()
        if known:
            found = self._client().list_sandboxes(self._app_name, self._name)
            sessions = tuple(info.sandbox_id for info in found)
        return SandboxInfo(
            name=self._name,
            app_name=self._app_name,
            method_names=METHOD_NAMES,
            tags=self._tags,
            metadata=self._metadata,
            options=self._options.model_dump(mode="json"),
            network=self._network,
            remote_only=self._remote_only,
            deployment_id=deployment_id,
            spec_digest=self.spec.digest if known else None,
            sessions=sessions,
        )

    def explain(self) -> str:
        """Tell which nodes could run a session and why others could not, starting nothing."""
        return self._client().explain(self.spec)

    # -- verbs ---------------------------------------------------------------------------------

    def create(self, *, cwd: str = "/", env: dict[str, Any] | None = None) -> SandboxSession:
        """Open a fresh session, leased to this job (or to the actor that this runs in).

        Args:
            cwd: its working directory, made if it is missing; relative to ``/``.
            env: variables of all its execs, converted with ``str``; None as a value removes one that
                the image or a secret sets.

        Raises:
            SandboxStartError: when it could not be opened; nothing is left behind.
            SandboxLimitError: when ``max_containers`` × ``tasks_per_container`` sessions live.
            NoMatchingOfferError: when no node can ever run it.
            InvalidOptionError: when cwd or env break their rule.
        """
        where, variables = _place(cwd), env_bytes(env)
        return self._opened(lambda: self._request(uuid.uuid4().hex, where, variables, named=False))

    def named(
        self, sandbox_id: str, *, cwd: str = "/", env: dict[str, Any] | None = None
    ) -> SandboxSession:
        """Get or create the session of an id, free of races. It lives until it is closed.

        It outlives its creators. When its actor dies it comes back, on its node, with files, working
        directory, variables and background processes. When that node dies it is lost, and this verb
        opens another on a node that qualifies.

        Args:
            sandbox_id: its id: 1 to 128 printable characters.
            cwd: as for `create`; counts only when the session is created now.
            env: likewise.

        Raises:
            SandboxStartError: when it could not be opened; the id is free again.
            SandboxLimitError: when ``max_containers`` × ``tasks_per_container`` sessions live.
            NoMatchingOfferError: when no node can ever run it.
            InvalidOptionError: when id, cwd or env break their rule.
        """
        check_instance_id(sandbox_id)
        where, variables = _place(cwd), env_bytes(env)
        return self._opened(lambda: self._request(sandbox_id, where, variables, named=True))

    def local(self, *, cwd: str = "/", env: dict[str, Any] | None = None) -> SandboxSession:
        """Open a session on this machine: plain processes and files, no container, **no isolation**.

        What runs in it can do all that this process can do. Paths are those of this machine. It starts
        with the environment of this process. Placement, image, secrets, volumes, network and the
        limits of processor, memory and sessions are the cluster's and do not apply; ``timeout_s`` and
        ``max_pending_tasks`` do. At `SandboxSession.close`, or when this process ends in whatever way,
        every program that it started is killed, in the background too.

        On macOS a timeout ends the process group of an exec; what has left it lives until it ends by
        itself. On Linux nothing escapes.

        Args:
            cwd: its working directory, made if it is missing; with the default a fresh temporary one,
                which is removed at the end, so that relative paths do not land in ``/``.
            env: as for `create`.

        Raises:
            SandboxStartError: when it could not be opened.
            SandboxFileError: when cwd cannot be a directory.
        """
        from apothic.local_session import open_local

        where, variables = _place(cwd), env_bytes(env)
        ref = open_local(
            app=self._app_name or "",
            sandbox=self._name,
            cwd=None if where == b"/" else where,
            env=variables,
            concurrent_requests=self._options.concurrent_requests,
        )
        return SandboxSession(self, ref, local=True)

    def attach(self, handle: SandboxHandle | dict[str, Any] | str) -> SandboxSession:
        """Reach a live session of this definition, under a lease of this job unless it is named.

        Raises:
            HandleError: when the handle is malformed, or of another cluster, app or definition.
            SandboxSessionNotFoundError: when the session is gone.
            SandboxLostError: when it is a named one that was lost and not closed yet.
        """
        ref = self._find(handle)
        ref.wait_ready()
        return SandboxSession(self, ref)

    def close_handle(self, handle: SandboxHandle | dict[str, Any] | str) -> CloseReport:
        """Close the session that a handle names; idempotent.

        Raises:
            HandleError: when the handle is malformed, or of another cluster, app or definition.
        """
        try:
            return self._find(handle).close()
        except SandboxSessionNotFoundError:
            return CloseReport(closed=False, note="it was closed before")

    def close_named(
        self, sandbox_id: str, *, cwd: str = "/", env: dict[str, Any] | None = None
    ) -> CloseReport:
        """Close the named session of an id; idempotent.

        Args:
            sandbox_id: its id.
            cwd: when this or ``env`` is given, both must equal those that it was created with.
            env: likewise.

        Raises:
            ArgumentError: when they differ; the session is left alone.
            InvalidOptionError: when id, cwd or env break their rule.
        """
        check_instance_id(sandbox_id)
        where, variables = _place(cwd), env_bytes(env)
        client = self._client()
        handle = SandboxHandle(
            cluster_id=client.cluster_id,
            app=self._app_name or "",
            sandbox=self._name,
            sandbox_id=sandbox_id,
            spec_digest="",
            named=True,
        )
        try:
            ref = client.attach_sandbox(handle)
            given = where != b"/" or bool(variables)
            if given and ref.inspect().arguments_digest != _arguments_digest(where, variables):
                raise ArgumentError(
                    f"{self.label} {sandbox_id!r} was created with another cwd or env than given, "
                    f"so it is left alone. Leave both out to close it anyway."
                )
            return ref.close()
        except SandboxSessionNotFoundError:
            return CloseReport(closed=False, note="no session of this id lives")

    def __repr__(self) -> str:
        """Name the definition."""
        return f"<apothic.Sandbox {self.label}>"

    def __reduce__(self) -> tuple[type[Sandbox], tuple[SandboxSpec]]:
        """Travel as the spec; the other side connects by itself."""
        return Sandbox, (self.spec,)

    # -- inside --------------------------------------------------------------------------------

    @property
    def spec(self) -> SandboxSpec:
        """The definition as the cluster knows it; reads the image's local files at first use."""
        with self._lock:
            if self._spec is None:
                options = self._options
                if options.image is not None:
                    image, self._blobs = options.image.pack()
                    options = options.model_copy(update={"image": image})
                self._spec = SandboxSpec(
                    app=self._app_name or "",
                    name=self._name,
                    options=options.model_dump(mode="json"),
                    network=self._network,
                    tags=self._tags,
                    metadata=self._metadata,
                )
            return self._spec

    def blobs(self) -> Mapping[str, bytes]:
        """Give the contents that the spec names by digest; empty for a looked-up definition."""
        _ = self.spec
        return self._blobs

    def same_as(self, other: Sandbox) -> bool:
        """Tell whether another definition says the same."""
        return (self._options, self._network, self._tags, self._metadata) == (
            other._options,
            other._network,
            other._tags,
            other._metadata,
        )

    def _request(
        self, sandbox_id: str, cwd: bytes, env: Mapping[bytes, bytes | None], *, named: bool
    ) -> SandboxRequest:
        return SandboxRequest(
            spec=self.spec,
            sandbox_id=sandbox_id,
            named=named,
            cwd=cwd,
            env=env,
            arguments_digest=_arguments_digest(cwd, env),
            max_sessions=self._options.max_containers * self._options.tasks_per_container,
            blobs=self.blobs,
        )

    def _opened(self, request: Callable[[], SandboxRequest]) -> SandboxSession:
        """Open a session, again after a failure as far as ``retries`` allows; execs have no retries."""
        client, policy, attempt = self._client(), self._options.retries, 1
        while True:
            try:
                return self._open_once(client, request())
            except (SandboxStartError, SandboxLostError):
                if attempt > policy.max_retries:
                    raise
            time.sleep(policy.delay_s(attempt))
            attempt += 1

    def _open_once(self, client: ControlPlaneClient, request: SandboxRequest) -> SandboxSession:
        ref: SandboxRef | None = None
        try:
            ref = client.start_sandbox(request)  # within, as nothing is left whenever Ctrl-C comes
            ref.wait_ready()
            return SandboxSession(self, ref)
        except (SandboxStartError, SandboxLostError):
            raise  # nothing of it is left
        except BaseException:
            if ref is not None:
                ref.release()
            raise

    def _find(self, handle: SandboxHandle | dict[str, Any] | str) -> SandboxRef:
        parsed = _parse(handle)
        if (parsed.app, parsed.sandbox) != (self._app_name or "", self._name):
            raise HandleError(
                f"the handle is of {parsed.app}.{parsed.sandbox}, not of {self.label}. Use the sandbox "
                f"that it belongs to."
            )
        client = self._client()
        _check_cluster(parsed, client)
        return client.attach_sandbox(parsed)


class SandboxClassAio:
    """Async twin of the look-up, which needs no sandbox: `Sandbox.aio`."""

    __slots__ = ()

    from_name: Final = class_twin(Sandbox.from_name)


class SandboxAio(Twin[Sandbox], SandboxClassAio):
    """Async twins of `Sandbox`."""

    __slots__ = ()

    inspect: Final = twin(Sandbox.inspect)
    explain: Final = twin(Sandbox.explain)
    create: Final = twin(Sandbox.create, undo=SandboxSession.close)
    named: Final = twin(Sandbox.named)
    local: Final = twin(Sandbox.local, undo=SandboxSession.close)
    attach: Final = twin(Sandbox.attach)
    close_handle: Final = twin(Sandbox.close_handle)
    close_named: Final = twin(Sandbox.close_named)


def session_from_handle(handle: SandboxHandle | dict[str, Any] | str) -> SandboxSession:
    """Reach a live session of any definition by its handle, as unpickling one does.

    Raises:
        HandleError: when the handle is malformed or of another cluster.
        SandboxSessionNotFoundError: when the session is gone.
    """
    parsed, connection = _parse(handle), connect()
    _check_cluster(parsed, connection)
    spec = connection.find_sandbox_spec(parsed.spec_digest)
    if spec is None:
        raise SandboxSessionNotFoundError(
            f"session {parsed.sandbox_id!r} of {parsed.app}.{parsed.sandbox} is not known to the "
            f"cluster: it was closed, or its cluster has ended since. Open another."
        )
    return Sandbox(spec, client=lambda: connection).attach(parsed)


def _parse(handle: SandboxHandle | dict[str, Any] | str) -> SandboxHandle:
    parsed = SandboxHandle.parse(handle)
    if parsed.cluster_id == LOCAL_CLUSTER:
        raise HandleError(
            f"the handle of {parsed.sandbox_id!r} is of a local session, which only the process that "
            f"opened it can use. Use create or named for one that others can reach."
        )
    return parsed


def _check_cluster(handle: SandboxHandle, client: ControlPlaneClient) -> None:
    if handle.cluster_id != client.cluster_id:
        raise HandleError(
            f"the handle of {handle.sandbox_id!r} is of cluster {handle.cluster_id!r}, this process is "
            f"connected to {client.cluster_id!r}. Connect to the other one with base_url."
        )


def _arguments_digest(cwd: bytes, env: Mapping[bytes, bytes | None]) -> str:
    pairs = sorted(
        (name.hex(), None if value is None else value.hex()) for name, value in env.items()
    )
    return digest_of([cwd.hex(), pairs])


def _place(cwd: str) -> bytes:
    if not isinstance(cwd, str) or not cwd or "\0" in cwd:
        raise InvalidOptionError(
            f"cwd={cwd!r} is not valid: it takes a path without NUL characters, '/' by default."
        )
    return b"/" + cwd.encode("utf-8", "surrogateescape").lstrip(b"/")
