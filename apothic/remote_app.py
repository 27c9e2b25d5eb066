"""`RemoteApp`: a deployed app, with the look-ups that it shares with `App`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from apothic.backend import ControlPlaneClient
from apothic.cls import Cls
from apothic.errors import (
    ClassNotFoundError,
    SandboxNotFoundError,
)
from apothic.names import check_name
from apothic.sandbox import Sandbox
from apothic.values import AppManifest

if TYPE_CHECKING:
    from apothic.function import Function, RemoteFunction

__all__ = ["RemoteApp", "class_of", "member_of", "methods_of", "sandbox_of"]


class RemoteApp:
    """A deployed app, found by name: its classes as they were when it was looked up."""

    def __init__(self, name: str, client: ControlPlaneClient) -> None:
        """Read the app's manifest.

        Raises:
            AppNotFoundError: when no such app is deployed.
        """
        self._name = check_name("app", name)
        self._client = client
        manifest = client.find_app(name)
        self._manifest = manifest
        self._classes = {
            cls_name: Cls(spec, client=lambda: client, deployment_id=lambda: manifest.deployment_id)
            for cls_name, spec in manifest.classes.items()
        }
        self._sandboxes = {
            sandbox_name: Sandbox(
                spec, client=lambda: client, deployment_id=lambda: manifest.deployment_id
            )
            for sandbox_name, spec in manifest.sandboxes.items()
        }

    @property
    def name(self) -> str:
        """The app's name."""
        return self._name

    @property
    def client(self) -> ControlPlaneClient:
        """The connection."""
        return self._client

    @property
    def deployment_id(self) -> str:
        """The deployment that was found."""
        return self._manifest.deployment_id

    @property
    def functions(self) -> dict[str, Function[Any] | RemoteFunction[Any]]:
        """The methods of its classes, as ``Class.method``."""
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
        return tuple(self._sandboxes)

    def manifest(self) -> AppManifest:
        """Give the manifest that was found."""
        return self._manifest

    def get_class(self, name: str) -> Cls:
        """Give a class.

        Raises:
            ClassNotFoundError: when there is none of this name.
        """
        return class_of(self._name, self._classes, name)

    def get_sandbox(self, name: str) -> Sandbox:
        """Give a sandbox definition.

        Raises:
            SandboxNotFoundError: when there is none of this name.
        """
        return sandbox_of(self._name, self._sandboxes, name)

    def __getattr__(self, name: str) -> Any:
        """Give a class or sandbox as an attribute."""
        if name.startswith("_") or hasattr(type(self), name):
            # A property that raised AttributeError inside: its own message counts.
            return object.__getattribute__(self, name)
        return member_of(self._name, self._classes, self._sandboxes, name)

    def __iter__(self) -> Iterator[Cls]:
        """Iterate over the classes."""
        return iter(self._classes.values())

    def __repr__(self) -> str:
        """Name the app and its deployment."""
        return f"<apothic.RemoteApp {self._name!r} ({self.deployment_id})>"


def class_of(app: str, classes: Mapping[str, Cls], name: str) -> Cls:
    """Give a class of an app, or say which there are."""
    if name not in classes:
        raise ClassNotFoundError(
            f"app {app!r} has no class {name!r}: it has {', '.join(classes) or 'none'}. "
            f"Check the spelling."
        )
    return classes[name]


def sandbox_of(app: str, sandboxes: Mapping[str, Sandbox], name: str) -> Sandbox:
    """Give a sandbox definition of an app, or say which there are."""
    if name not in sandboxes:
        raise SandboxNotFoundError(
            f"app {app!r} has no sandbox {name!r}: it has {', '.join(sandboxes) or 'none'}. "
            f"Check the spelling."
        )
    return sandboxes[name]


def member_of(
    app: str, classes: Mapping[str, Cls], sandboxes: Mapping[str, Sandbox], name: str
) -> Cls | Sandbox:
    """Give a class or sandbox of an app by its name."""
    found = classes.get(name) or sandboxes.get(name)
    if found is None:
        raise AttributeError(
            f"app {app!r} has no class or sandbox {name!r}: it has "
            f"{', '.join([*classes, *sandboxes]) or 'none'}."
        )
    return found


def methods_of(classes: Mapping[str, Cls]) -> dict[str, Function[Any] | RemoteFunction[Any]]:
    """Give the methods of all classes, as ``Class.method``."""
    return {
        f"{cls.name}.{name}": function
        for cls in classes.values()
        for name, function in cls.methods.items()
    }
