"""Stateful classes and sandboxes on machines of your own.

The layers, top to bottom:

- `App`, `@app.cls`, `@method`, `@enter`, `@exit`: what a program defines (`apothic.app`,
  `apothic.decorators`, `apothic.definition`, `apothic.options`).
- `Cls`, `BoundCls`, `ClassInstance`, `Function`, `Job`: what it holds and calls (`apothic.cls`,
  `apothic.instance`, `apothic.function`), over `apothic.targets` and `apothic.calls`, which count,
  scale and retry.
- `Sandbox`, `SandboxSession`: workspaces (`apothic.sandbox`, `apothic.session`). What a session's verbs
  do is in `apothic.session_core`, over an `apothic.workspace`: a container, or with `Sandbox.local` this
  machine (`apothic.local_session`).
- `ControlPlaneClient`: the seam (`apothic.backend`). Engines stand behind it; the one on Ray is found
  when it is first needed.
- Values that travel (`apothic.values`, `apothic.sandbox_values`), the pickling of classes
  (`apothic.packing`) and every error (`apothic.errors`).

Importing this package loads no engine and connects to nothing; names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apothic._version import __version__

if TYPE_CHECKING:
    from apothic.app import App
    from apothic.backend import ControlPlaneClient
    from apothic.bound import BoundCls
    from apothic.cls import Cls
    from apothic.decorators import enter, exit, method
    from apothic.errors import ApothicError
    from apothic.exec_stream import SandboxExecStream
    from apothic.function import Function, Job, RemoteFunction
    from apothic.image import Image
    from apothic.instance import ClassInstance, LocalClassInstance
    from apothic.offers import OfferFiltersModel
    from apothic.remote_app import RemoteApp
    from apothic.retries import Retries
    from apothic.sandbox import Sandbox
    from apothic.sandbox_values import (
        SandboxExecResult,
        SandboxHandle,
        SandboxInfo,
        SandboxSessionInfo,
        SandboxSpec,
        SandboxStreamEvent,
    )
    from apothic.secret import Secret
    from apothic.session import SandboxSession
    from apothic.values import (
        AppManifest,
        ClassInfo,
        ClassInstanceHandle,
        CloseReport,
        InstanceInfo,
        MethodInfo,
    )
    from apothic.volume import StorageMount, Volume

__all__ = [
    "ApothicError",
    "App",
    "AppManifest",
    "BoundCls",
    "ClassInfo",
    "ClassInstance",
    "ClassInstanceHandle",
    "CloseReport",
    "Cls",
    "ControlPlaneClient",
    "Function",
    "Image",
    "InstanceInfo",
    "Job",
    "LocalClassInstance",
    "MethodInfo",
    "OfferFiltersModel",
    "RemoteApp",
    "RemoteFunction",
    "Retries",
    "Sandbox",
    "SandboxExecResult",
    "SandboxExecStream",
    "SandboxHandle",
    "SandboxInfo",
    "SandboxSession",
    "SandboxSessionInfo",
    "SandboxSpec",
    "SandboxStreamEvent",
    "Secret",
    "StorageMount",
    "Volume",
    "__version__",
    "enter",
    "exit",
    "method",
]

_HOMES = {
    "apothic.app": ("App",),
    "apothic.remote_app": ("RemoteApp",),
    "apothic.backend": ("ControlPlaneClient",),
    "apothic.bound": ("BoundCls",),
    "apothic.cls": ("Cls",),
    "apothic.decorators": ("enter", "exit", "method"),
    "apothic.errors": ("ApothicError",),
    "apothic.exec_stream": ("SandboxExecStream",),
    "apothic.function": ("Function", "Job", "RemoteFunction"),
    "apothic.image": ("Image",),
    "apothic.instance": ("ClassInstance", "LocalClassInstance"),
    "apothic.offers": ("OfferFiltersModel",),
    "apothic.retries": ("Retries",),
    "apothic.sandbox": ("Sandbox",),
    "apothic.sandbox_values": (
        "SandboxExecResult",
        "SandboxHandle",
        "SandboxInfo",
        "SandboxSessionInfo",
        "SandboxSpec",
        "SandboxStreamEvent",
    ),
    "apothic.secret": ("Secret",),
    "apothic.session": ("SandboxSession",),
    "apothic.values": (
        "AppManifest",
        "ClassInfo",
        "ClassInstanceHandle",
        "CloseReport",
        "InstanceInfo",
        "MethodInfo",
    ),
    "apothic.volume": ("StorageMount", "Volume"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its module at first use."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'apothic' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
