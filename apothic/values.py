"""Values that travel between processes: frozen, JSON-able, versioned by ``schema_version``.

None of them holds a secret or a pickle. A handle from an untrusted source can at worst name
something that does not exist.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from apothic.digests import digest_of
from apothic.errors import HandleError

__all__ = [
    "AppManifest",
    "ClassInfo",
    "ClassInstanceHandle",
    "ClassSpec",
    "CloseReport",
    "Handle",
    "HookResult",
    "InstanceInfo",
    "InstanceState",
    "MethodInfo",
    "MethodKind",
    "Network",
    "ParameterInfo",
    "SandboxSpec",
    "Value",
    "digest_of",
]

MethodKind = Literal["sync", "async", "generator", "async_generator"]
"""How a method runs: a plain function, a coroutine function, or one that yields either way."""

Network = Literal["none", "internet"]
"""What a sandbox reaches: nothing, or the public internet but no private network."""


class Value(BaseModel):
    """A frozen value; what it does not know is refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")


class ParameterInfo(Value):
    """One parameter of a constructor or method, as text, so that it needs none of its types.

    Attributes:
        name: the parameter's name.
        kind: the name of its `inspect.Parameter` kind, for instance ``KEYWORD_ONLY``.
        default: ``repr`` of the default, or None where it has none.
        annotation: the annotation as written, or None.
    """

    name: str
    kind: str
    default: str | None = None
    annotation: str | None = None

    @property
    def required(self) -> bool:
        """Whether a caller has to give it."""
        return self.default is None and not self.kind.startswith("VAR_")


class MethodInfo(Value):
    """One remote method of a class.

    Attributes:
        name: the method's name.
        kind: whether it is sync, async, a generator or an async generator.
        parameters: without ``self``.
        tags: as given to `@method`.
        metadata: as given to `@method`.
        doc: the docstring, or None.
    """

    name: str
    kind: MethodKind
    parameters: tuple[ParameterInfo, ...] = ()
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)
    doc: str | None = None

    @property
    def is_generator(self) -> bool:
        """Whether it yields items instead of returning one value."""
        return self.kind in ("generator", "async_generator")


class ClassSpec(Value):
    """A class as the cluster knows it: everything but the code, which ``blob_digest`` names.

    Attributes:
        options: `ClassOptions` as JSON; the engine reads it, this module need not import it.
    """

    schema_version: Literal[1] = 1
    app: str
    name: str
    methods: tuple[MethodInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    enter_hooks: tuple[str, ...] = ()
    exit_hooks: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    blob_digest: str
    doc: str | None = None

    @property
    def digest(self) -> str:
        """Name this exact version of the class; equal content has an equal digest."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def is_async(self) -> bool:
        """Whether any method is async, so that the instance runs an event loop."""
        return any(m.kind in ("async", "async_generator") for m in self.methods)


class SandboxSpec(Value):
    """A sandbox definition as the cluster knows it.

    Attributes:
        options: `ClassOptions` as JSON; the engine reads it, this module need not import it.
        network: what a session reaches: nothing, or the public internet.
    """

    schema_version: Literal[1] = 1
    app: str
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    network: Network = "none"
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Name this exact version of the definition; equal content has an equal digest."""
        return digest_of(self.model_dump(mode="json"))


class AppManifest(Value):
    """What a deployed app holds.

    Attributes:
        deployment_id: names this content; deploying the same content again gives the same id.
    """

    schema_version: Literal[1] = 1
    name: str
    classes: dict[str, ClassSpec] = Field(default_factory=dict)
    sandboxes: dict[str, SandboxSpec] = Field(default_factory=dict)

    @property
    def deployment_id(self) -> str:
        """Name this content; equal content has an equal id."""
        return "dep-" + digest_of(self.model_dump(mode="json"))[:16]


class Handle(Value):
    """What names something that lives, as an object, a dict or a JSON string."""

    @classmethod
    def parse(cls, handle: Self | dict[str, Any] | str) -> Self:
        """Read a handle in any of its three forms.

        Raises:
            HandleError: when it is malformed; nothing is looked up before.
        """
        if isinstance(handle, cls):
            return handle
        try:
            if isinstance(handle, str):
                return cls.model_validate_json(handle, strict=False)
            if isinstance(handle, dict):
                return cls.model_validate(handle)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise HandleError(
                f"handle {_shorten(handle)} is malformed: {where}: {first['msg']}. Pass what "
                f"`.handle` or `.handle_json` of a live instance gave, unaltered."
            ) from None
        raise HandleError(
            f"handle {_shorten(handle)} is a {type(handle).__name__}: it takes a "
            f"{cls.__name__}, a dict or a JSON string. Pass `.handle` or `.handle_json`."
        )


class ClassInstanceHandle(Handle):
    """Where a live instance is: what `Cls.attach` takes, as an object, a dict or a JSON string.

    Attributes:
        cluster_id: the cluster that runs it.
        app: the app's name.
        cls: the class's name.
        instance_id: its id within the class.
        spec_digest: the version of the class that it runs.
        named: whether it lives until closed, or while someone leases it.
    """

    schema_version: Literal[1] = 1
    cluster_id: str
    app: str
    cls: str
    instance_id: str
    spec_digest: str
    named: bool


class ClassInfo(Value):
    """What `Cls.inspect` tells of a class.

    Attributes:
        deployment_id: of the app, or None while it is only defined.
        instances: ids of its live instances on the connected cluster; empty when not connected.
    """

    name: str
    app_name: str | None
    methods: tuple[MethodInfo, ...]
    parameters: tuple[ParameterInfo, ...]
    enter_hook_names: tuple[str, ...]
    exit_hook_names: tuple[str, ...]
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    options: dict[str, Any]
    remote_only: bool
    deployment_id: str | None = None
    spec_digest: str | None = None
    instances: tuple[str, ...] = ()


InstanceState = Literal["new", "starting", "ready", "failed", "closing", "closed", "lost"]


class InstanceInfo(Value):
    """What `ClassInstance.inspect` tells of a live instance.

    Attributes:
        state: where it is in its life.
        pid: process id of the worker, or None before it has one.
        node_id: the Ray node it runs on.
        running_calls: calls in user code at this moment.
        finished_calls: since the last start.
        restarts: how often its process was replaced after a crash.
        started_unix_s: when ``enter`` had finished, as a Unix time in seconds.
        arguments_digest: equal for equal constructor arguments.
    """

    app: str
    cls: str
    instance_id: str
    named: bool
    state: InstanceState
    spec_digest: str
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)
    pid: int | None = None
    node_id: str | None = None
    running_calls: int = 0
    finished_calls: int = 0
    restarts: int = 0
    started_unix_s: float | None = None
    arguments_digest: str | None = None


class HookResult(Value):
    """One exit hook that ran: its name, how long it took and, if it failed, how.

    Attributes:
        error: ``Type: message`` of the exception, or None.
        traceback: the remote traceback, or None.
    """

    name: str
    duration_s: float
    error: str | None = None
    traceback: str | None = None


class CloseReport(Value):
    """What closing an instance did.

    Attributes:
        closed: False when there was nothing to close any more.
        hooks: the exit hooks that ran, in the order in which they ran.
        interrupted_calls: calls that outlasted the grace period and were interrupted.
        note: what else the caller should know, or None.
    """

    closed: bool
    hooks: tuple[HookResult, ...] = ()
    interrupted_calls: int = 0
    note: str | None = None

    @property
    def failed_hooks(self) -> tuple[HookResult, ...]:
        """The hooks that raised or ran out of time."""
        return tuple(hook for hook in self.hooks if hook.error is not None)


def _shorten(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
