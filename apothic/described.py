"""`DescribedClass`: what is known of a class, read from its code or from its spec."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from inspect import Signature
from typing import Any

from apothic.backend import ControlPlaneClient, connect
from apothic.definition import (
    ClassDefinition,
    describe_class,
    parameter_infos,
    signature_from,
)
from apothic.digests import digest_of
from apothic.function import Function, RemoteFunction
from apothic.instance import missing_method
from apothic.options import ClassOptions
from apothic.packing import pack_class
from apothic.retries import Retries
from apothic.targets import Target
from apothic.values import ClassSpec, MethodInfo, ParameterInfo

__all__ = ["DescribedClass"]


class DescribedClass:
    """Names, methods, signature, options and spec of a class; `apothic.Cls` adds the verbs."""

    def __init__(
        self,
        spec: ClassSpec | None = None,
        *,
        app_name: str | None = None,
        name: str = "",
        local_cls: type[Any] | None = None,
        definition: ClassDefinition | None = None,
        options: ClassOptions | None = None,
        tags: tuple[str, ...] = (),
        metadata: dict[str, Any] | None = None,
        client: Callable[[], ControlPlaneClient] = connect,
        deployment_id: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Describe a class, from a spec or from code; made by `App.cls` and by look-ups."""
        self._spec = spec
        self._app_name = spec.app if spec is not None else app_name
        self._name = spec.name if spec is not None else name
        self._local_cls = local_cls
        self._definition = definition
        self._options = (
            ClassOptions.model_validate(spec.options) if spec is not None else options
        ) or ClassOptions()
        self._tags = spec.tags if spec is not None else tags
        self._metadata = dict((spec.metadata if spec is not None else metadata) or {})
        self._client = client
        self._deployment_id = deployment_id
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self.__doc__ = spec.doc if spec is not None else getattr(local_cls, "__doc__", None)

    @cached_property
    def _described(self) -> ClassDefinition:
        """Read the definition from code or spec; late, since unpickling completes classes late."""
        if self._definition is not None:
            return self._definition
        if self._local_cls is not None:
            return describe_class(self._local_cls)
        assert self._spec is not None
        return ClassDefinition(
            methods={info.name: info for info in self._spec.methods},
            method_signatures={
                info.name: signature_from(info.parameters) for info in self._spec.methods
            },
            enter_hooks=self._spec.enter_hooks,
            exit_hooks=self._spec.exit_hooks,
            signature=signature_from(self._spec.parameters),
            doc=self._spec.doc,
        )

    # -- properties ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The class's name in its app."""
        return self._name

    @property
    def app_name(self) -> str | None:
        """The app's name."""
        return self._app_name

    @property
    def methods(self) -> dict[str, Function[Any] | RemoteFunction[Any]]:
        """The remote methods by name, to read; calling one needs an instance."""
        return {name: self._class_function(name) for name in self._described.methods}

    @property
    def method_names(self) -> tuple[str, ...]:
        """Names of the remote methods, in the order of their definition."""
        return tuple(self._described.methods)

    @property
    def method_infos(self) -> dict[str, MethodInfo]:
        """What is known of each remote method."""
        return dict(self._described.methods)

    @property
    def signature(self) -> inspect.Signature | None:
        """The constructor's signature; of a looked-up class, annotations and defaults are texts."""
        return self._described.signature

    @property
    def parameters(self) -> tuple[ParameterInfo, ...]:
        """The constructor's parameters."""
        if self._spec is not None:
            return self._spec.parameters
        return parameter_infos(self._described.signature)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the constructor's parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def tags(self) -> tuple[str, ...]:
        """As given to `@app.cls`."""
        return self._tags

    @property
    def metadata(self) -> dict[str, Any]:
        """As given to `@app.cls`."""
        return dict(self._metadata)

    @property
    def enter_hook_names(self) -> tuple[str, ...]:
        """Names of the enter hooks, in the order in which they run."""
        return self._described.enter_hooks

    @property
    def exit_hook_names(self) -> tuple[str, ...]:
        """Names of the exit hooks, in the order of definition; they run in reverse."""
        return self._described.exit_hooks

    @property
    def remote_only(self) -> bool:
        """Whether its code is not in this process."""
        return self._local_cls is None

    @property
    def local_cls(self) -> type[Any] | None:
        """The user's class, where its code is in this process."""
        return self._local_cls

    @property
    def options(self) -> ClassOptions:
        """The checked options."""
        return self._options

    def has_method(self, name: str) -> bool:
        """Tell whether the class has a remote method of this name."""
        return name in self._described.methods

    def method_info(self, name: str) -> MethodInfo:
        """Tell what is known of a remote method.

        Raises:
            MethodNotFoundError: when there is none of this name.
        """
        info = self._described.methods.get(name)
        if info is None:
            raise missing_method(self._name, name, self.method_names, self._local_cls)
        return info

    @property
    def spec(self) -> ClassSpec:
        """The class as the cluster knows it; packs the code at first use.

        Raises:
            SerializationError: when the class cannot be pickled; the message names what stands
                in the way.
        """
        with self._lock:
            if self._spec is None:
                assert self._local_cls is not None
                blob = pack_class(self._local_cls)
                digest = digest_of(blob)
                blobs = {digest: blob}
                options = self._options
                if options.image is not None:
                    image, files = options.image.pack()
                    options = options.model_copy(update={"image": image})
                    blobs.update(files)
                self._spec = ClassSpec(
                    app=self._app_name or "",
                    name=self._name,
                    methods=tuple(self._described.methods.values()),
                    parameters=parameter_infos(self._described.signature),
                    enter_hooks=self._described.enter_hooks,
                    exit_hooks=self._described.exit_hooks,
                    tags=self._tags,
                    metadata=self._metadata,
                    options=options.model_dump(mode="json"),
                    blob_digest=digest,
                    doc=self._described.doc,
                )
                self._blobs = blobs
            return self._spec

    def blobs(self) -> Mapping[str, bytes]:
        """Give the contents that the spec names by digest; empty for a looked-up class."""
        _ = self.spec
        return self._blobs

    @property
    def _label(self) -> str:
        return f"{self._app_name}.{self._name}" if self._app_name else self._name

    @cached_property
    def _plain_options(self) -> dict[str, Any]:
        return self._options.model_dump(mode="json")

    def _function(
        self,
        info: MethodInfo,
        signature: Signature | None,
        target: Target | None,
        kind: type[Function[Any]],
        *,
        retries: Retries | None = None,
    ) -> Any:
        return kind(
            info,
            signature,
            target,
            owner=self._name,
            app_name=self._app_name,
            options=self._plain_options,
            timeout_s=self._options.timeout_s,
            retries=retries or Retries(0),
        )

    def _class_function(self, name: str) -> Function[Any] | RemoteFunction[Any]:
        kind = RemoteFunction if self.remote_only else Function
        function: Function[Any] = self._function(
            self.method_info(name),
            self._described.method_signatures.get(name),
            None,
            kind,
            retries=self._options.retries,
        )
        return function

    def _instance_function(self, name: str, target: Target) -> RemoteFunction[Any]:
        info = self.method_info(name)
        retries = self._options.retries
        function: RemoteFunction[Any] = self._function(
            info,
            self._described.method_signatures.get(name),
            target,
            RemoteFunction,
            retries=retries,
        )
        return function

    def _local_function(self, name: str, target: Target) -> Function[Any]:
        function: Function[Any] = self._function(
            self.method_info(name), self._described.method_signatures.get(name), target, Function
        )
        return function
