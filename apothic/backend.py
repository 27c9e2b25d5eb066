"""The seam between the API and an engine: specs go in, handles and values come out.

An engine implements `ControlPlaneClient`, `InstanceRef`, `CallRef` and `ItemStream`, for sandboxes also
`SandboxRef`, and registers a ``connect(base_url) -> ControlPlaneClient`` under the entry-point group
``apothic.backends``. It is imported at first use, so that importing the API loads no engine. Its module
may also have an ``is_connected() -> bool``, true where the process has its connection already.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from apothic.errors import (
    BackendNotFoundError,
    InvalidOptionError,
    MethodNotFoundError,
    UsageError,
)

if TYPE_CHECKING:
    from apothic.node_types import NodeType
    from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
    from apothic.values import (
        AppManifest,
        ClassInstanceHandle,
        ClassSpec,
        CloseReport,
        InstanceInfo,
        MethodInfo,
        SandboxSpec,
    )
    from apothic.volume import StorageMount

__all__ = [
    "CallRef",
    "ControlPlaneClient",
    "ExecOutcome",
    "ExecRequest",
    "InstanceRef",
    "ItemStream",
    "SandboxRef",
    "SandboxRequest",
    "StartRequest",
    "connect",
    "connected",
    "use_client",
    "version_lacks",
]

_GROUP = "apothic.backends"
_OWN_ENGINE = EntryPoint("ray", "ray_backend.client:connect", _GROUP)
"""Of this distribution, for where its modules are without its metadata, as in a ``py_modules``."""


class CallRef(ABC):
    """One submitted call."""

    __slots__ = ("__weakref__",)

    @abstractmethod
    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value, or raise what the call raised; `WaitTimeoutError` after the time."""

    @abstractmethod
    def future(self) -> Future[Any]:
        """Give a future of the value, for awaiting and for callbacks."""

    @abstractmethod
    def done(self) -> bool:
        """Tell whether the call has ended, with a value or an error; never blocks."""

    @classmethod
    def finished(cls, calls: Sequence[CallRef]) -> list[bool]:
        """Tell of several calls at once whether they have ended; engines may do better."""
        return [call.done() for call in calls]

    @abstractmethod
    def cancel(self) -> None:
        """Stop the call wherever it is; its result is then `JobCancelledError`."""

    def withdraw(self) -> None:
        """Cancel the call if it has not begun; leave one that runs alone. Engines may do neither."""
        return

    @property
    @abstractmethod
    def native(self) -> Any:
        """The engine's own reference, for instance a ``ray.ObjectRef``."""


class ItemStream(ABC):
    """The items of one generator call."""

    @abstractmethod
    def next_item(self) -> Any:
        """Wait for the next item; raise StopIteration after the last one."""

    @abstractmethod
    async def anext_item(self) -> Any:
        """Await the next item; raise StopAsyncIteration after the last one."""

    @abstractmethod
    def close(self) -> None:
        """Stop the producer, so that its ``finally`` blocks run; idempotent."""

    def abandon(self) -> None:
        """Stop the producer as `close` does, but never wait for it."""
        self.close()


class InstanceRef(ABC):
    """One live instance as an engine reaches it."""

    @property
    @abstractmethod
    def handle(self) -> ClassInstanceHandle:
        """Where it is, as a value."""

    @property
    @abstractmethod
    def native(self) -> Any:
        """The engine's own handle, for instance a Ray actor handle."""

    @abstractmethod
    def submit(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> CallRef:
        """Submit a call; ``timeout_s`` replaces the class's own limit."""

    @abstractmethod
    def stream(
        self,
        method: MethodInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> ItemStream:
        """Start a generator call."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Wait until ``enter`` has finished; raise `InstanceStartError` if it failed."""

    def is_same(self, other: InstanceRef) -> bool:
        """Tell whether another reference is to this very instance, not only one of the same name."""
        return other is self

    @abstractmethod
    def inspect(self) -> InstanceInfo:
        """Ask how it is, also while calls are running."""

    @abstractmethod
    def close(self) -> CloseReport:
        """Stop it: drain, interrupt, exit hooks, free the name; idempotent."""

    @abstractmethod
    def release(self) -> None:
        """Give up this process's lease; the last one to do so stops the instance."""


def version_lacks(label: str, method: str, spec_digest: str) -> MethodNotFoundError:
    """Give the error for a method that the caller knows and a running instance does not."""
    return MethodNotFoundError(
        f"{label} has no remote method {method!r}: it runs version {spec_digest[:12]} of its class, "
        f"which is another than this process has. Close the instance and start it again, or deploy "
        f"with app.deploy(close_outdated=True)."
    )


def _no_blobs() -> Mapping[str, bytes]:
    return {}


@dataclass(frozen=True)
class StartRequest:
    """A wanted instance.

    Attributes:
        spec: the class.
        instance_id: its id within the class.
        named: it lives until closed, not while leased.
        reuse: an instance of this id that lives already is the wanted one.
        arguments: the constructor's ``(args, kwargs)``, pickled by `apothic.packing`.
        arguments_digest: equal for equal arguments.
        match_arguments: refuse an existing instance that was made with other arguments.
        blobs: gives the contents that the spec names by digest; called when they are not stored.
    """

    spec: ClassSpec
    instance_id: str
    named: bool
    reuse: bool
    arguments: bytes
    arguments_digest: str
    match_arguments: bool = True
    blobs: Callable[[], Mapping[str, bytes]] = field(default=_no_blobs, repr=False)


class ExecRequest(NamedTuple):
    """One exec, as the kernel takes it; its input goes beside it.

    Attributes:
        argv: the program and its arguments.
        timeout_s: seconds until all that it started is killed.
        max_output_bytes: how much of each stream is kept.
        cwd: where it starts, relative to the session's directory; None is that directory itself.
        env: variables over the session's; None removes one.
        user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; empty for the session's own.
    """

    argv: tuple[bytes, ...]
    timeout_s: float
    max_output_bytes: int
    cwd: bytes | None = None
    env: Mapping[bytes, bytes | None] | None = None
    user: bytes = b""


class ExecOutcome(NamedTuple):
    """How an exec ended; at the end of a stream without the output, which came before.

    Attributes:
        returncode: 128+n for death by signal n, 127 for a missing program, 126 for one that cannot
            be executed.
        timed_out: it was killed after ``timeout_s``.
        oom_killed: a process was killed while it ran, since the sandbox's memory was used up.
    """

    returncode: int
    signal: int | None = None
    duration_s: float = 0.0
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    timed_out: bool = False
    oom_killed: bool = False


class SandboxRef(ABC):
    """One live session as an engine reaches it.

    Its verbs are the methods of `apothic.session_core.SessionCore` that ``VERBS`` and ``STREAMS`` name,
    with their arguments by position. Text is bytes there: names of files need not be text. Errors of
    the package arrive as themselves. A verb that is cancelled ends what it started.
    """

    @property
    @abstractmethod
    def handle(self) -> SandboxHandle:
        """Where it is, as a value."""

    @property
    def identity(self) -> Hashable:
        """Equal for references to this very session only: not for a later one of its name.

        Asked for once it is ready. The default suits where a session has one reference in a process.
        """
        return self

    @property
    @abstractmethod
    def native(self) -> Any:
        """The engine's own handle, for instance a Ray actor handle."""

    @abstractmethod
    def call(self, verb: str, *args: Any) -> CallRef:
        """Submit a verb that gives one value."""

    @abstractmethod
    def stream(self, verb: str, *args: Any) -> ItemStream:
        """Start a verb that gives several, at once; it is held up when its items are not taken."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Wait until it takes verbs; raise `SandboxStartError` if it cannot, with nothing left."""

    @abstractmethod
    def inspect(self) -> SandboxSessionInfo:
        """Ask how it is, also while verbs are running."""

    @abstractmethod
    def close(self) -> CloseReport:
        """End its programs and remove what it worked in; idempotent."""

    @abstractmethod
    def release(self) -> None:
        """Give up this process's lease; the last one to do so closes the session."""


@dataclass(frozen=True)
class SandboxRequest:
    """A wanted session.

    Attributes:
        spec: the definition.
        sandbox_id: the session's id within it.
        named: it lives until closed, not while leased, and is the wanted one if it lives already.
        cwd: its first working directory, absolute; made if it is missing.
        env: its own variables; None removes one that the image or a secret sets.
        arguments_digest: equal for equal ``cwd`` and ``env``; `SandboxSessionInfo` shows it.
        max_sessions: as many sessions of this definition may live on the cluster.
        blobs: gives the contents that the spec names by digest; called when they are not stored.
    """

    spec: SandboxSpec
    sandbox_id: str
    named: bool
    cwd: bytes
    env: Mapping[bytes, bytes | None] = field(repr=False)
    arguments_digest: str
    max_sessions: int
    blobs: Callable[[], Mapping[str, bytes]] = field(default=_no_blobs, repr=False)


class ControlPlaneClient(ABC):
    """A connection to a cluster."""

    @property
    @abstractmethod
    def cluster_id(self) -> str:
        """Name the cluster; handles of other clusters are refused by it."""

    @property
    @abstractmethod
    def job_id(self) -> str:
        """Name this process's job on the cluster."""

    @abstractmethod
    def deploy(
        self, manifest: AppManifest, blobs: Mapping[str, bytes], *, close_outdated: bool
    ) -> None:
        """Store an app; instances of older versions of its classes are closed if asked."""

    @abstractmethod
    def find_app(self, name: str) -> AppManifest:
        """Give a deployed app; raise `AppNotFoundError` naming those that exist."""

    @abstractmethod
    def list_apps(self) -> list[str]:
        """Name the deployed apps."""

    @abstractmethod
    def find_spec(self, digest: str) -> ClassSpec | None:
        """Give the version of a class that an instance runs, or None."""

    @abstractmethod
    def start(self, request: StartRequest) -> InstanceRef:
        """Start or find an instance under this process's lease, without waiting for ``enter``."""

    @abstractmethod
    def attach(self, handle: ClassInstanceHandle) -> InstanceRef:
        """Reach a live instance, under a lease unless it is named."""

    @abstractmethod
    def list_instances(self, app: str | None = None, cls: str | None = None) -> list[InstanceInfo]:
        """List live instances."""

    @abstractmethod
    def put_secret(self, name: str, variables: Mapping[str, str], *, overwrite: bool) -> bool:
        """Store a secret; False when it exists and is not to be replaced."""

    @abstractmethod
    def list_secrets(self) -> list[str]:
        """Name the stored secrets."""

    @abstractmethod
    def delete_secret(self, name: str) -> bool:
        """Remove a secret; False when there is none."""

    @abstractmethod
    def ensure_volume(self, volume: StorageMount) -> None:
        """Record a volume, or check that the recorded one is the same."""

    @abstractmethod
    def list_volumes(self) -> list[StorageMount]:
        """List recorded volumes."""

    @abstractmethod
    def delete_volume(self, name: str) -> bool:
        """Remove a volume and its files; False when there is none."""

    @abstractmethod
    def explain(self, spec: ClassSpec | SandboxSpec) -> str:
        """Tell where it could run and why not elsewhere, starting nothing."""

    # An engine without sandboxes leaves these as they are.

    def start_sandbox(self, request: SandboxRequest) -> SandboxRef:
        """Start or find a session under this process's lease, without waiting until it is ready.

        Raises:
            SandboxLimitError: when ``max_sessions`` live already.
            NoMatchingOfferError: when no node can ever run it.
        """
        raise self._no_sandboxes()

    def attach_sandbox(self, handle: SandboxHandle) -> SandboxRef:
        """Reach a live session, under a lease unless it is named; ``spec_digest`` may be empty.

        Raises:
            SandboxSessionNotFoundError: when it does not live.
        """
        raise self._no_sandboxes()

    def find_sandbox_spec(self, digest: str) -> SandboxSpec | None:
        """Give the version of a definition that a session runs, or None."""
        raise self._no_sandboxes()

    def list_sandboxes(
        self, app: str | None = None, sandbox: str | None = None
    ) -> list[SandboxSessionInfo]:
        """List live sessions."""
        raise self._no_sandboxes()

    def _no_sandboxes(self) -> UsageError:
        return UsageError(
            f"{type(self).__name__} runs no sandboxes. Use Sandbox.local() for a session on this "
            f"machine, or an engine that has them."
        )

    def offers_table(self) -> str:
        """List the kinds of nodes that there are or could be started, as a table for people."""
        return self._no_offers()

    def register_node_types(self, node_types: Sequence[NodeType]) -> None:
        """Make node types known that could be started; one of the same name is replaced."""
        self._no_offers()

    def list_node_types(self) -> list[NodeType]:
        """List the registered node types."""
        return self._no_offers()

    def unregister_node_type(self, name: str) -> bool:
        """Forget a registered node type; False when there is none of this name."""
        return self._no_offers()

    def _no_offers(self) -> NoReturn:
        raise UsageError(
            f"{type(self).__name__} has no nodes to choose from, so that it knows no offers. Connect to "
            f"a Ray cluster with base_url."
        )

    @abstractmethod
    def disconnect(self) -> None:
        """Close what this process leased, and end the connection if this process made it."""


_lock = threading.RLock()
_default: ControlPlaneClient | None = None


def connect(
    client: ControlPlaneClient | None = None, base_url: str | None = None
) -> ControlPlaneClient:
    """Give a connection: ``client`` itself, or the engine's to ``base_url``.

    Raises:
        InvalidOptionError: when both are given, or either is of another type.
        BackendNotFoundError: when no engine is installed.
        ConnectionFailedError: when the cluster cannot be reached; the text says what to do.
    """
    if client is not None and not isinstance(client, ControlPlaneClient):
        raise InvalidOptionError(
            f"client={client!r} is not valid: it takes an apothic.ControlPlaneClient. "
            f"Leave it out to connect by base_url or RAY_ADDRESS."
        )
    if client is not None and base_url is not None:
        raise InvalidOptionError(
            f"client and base_url={base_url!r} are both given: a client is connected already. "
            f"Give one of them."
        )
    if client is not None:
        return client
    if base_url is not None and (not isinstance(base_url, str) or not base_url.strip()):
        raise InvalidOptionError(
            f"base_url={base_url!r} is not valid: it takes 'ray://host:10001', 'host:6379', 'auto' "
            f"or 'local'. Leave it out for RAY_ADDRESS, or a cluster of this process's own."
        )
    if base_url is None and _default is not None:
        return _default
    return _engine()(base_url)


def connected() -> ControlPlaneClient | None:
    """Give the connection that this process has; None where it would have to make one."""
    if _default is not None:
        return _default
    try:
        engine = _engine()
    except BackendNotFoundError:
        return None
    is_connected = getattr(sys.modules.get(_entry().module), "is_connected", None)
    return engine(None) if is_connected is not None and is_connected() else None


def use_client(client: ControlPlaneClient | None) -> ControlPlaneClient | None:
    """Make ``client`` what everything connects to by default; give the previous one.

    A program's tests can put an engine of their own in place with it. None restores the engine.
    """
    global _default
    with _lock:
        previous, _default = _default, client
    return previous


def _entry() -> EntryPoint:
    return next(iter(entry_points(group=_GROUP)), _OWN_ENGINE)


def _engine() -> Callable[[str | None], ControlPlaneClient]:
    found = _entry()
    try:
        engine: Callable[[str | None], ControlPlaneClient] = found.load()
    except ModuleNotFoundError as error:
        if error.name is None or not found.module.startswith(error.name):
            raise
        raise BackendNotFoundError(
            f"the engine {found.value!r} is not installed here, and no other package provides the "
            f"entry-point group {_GROUP!r}. Install the distribution: pip install apothic-ray."
        ) from None
    return engine
