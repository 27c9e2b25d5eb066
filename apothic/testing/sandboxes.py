"""Sandboxes of an engine for tests: sessions that work on this machine, as `Sandbox.local` does.

Names, handles, leases, the cap on live sessions, secrets and variables are as on a cluster. What one
machine without containers cannot do: there is **no isolation**, a path is one of this machine, network,
processor and memory are not limited, and of an image only its variables take effect. A session with
``cwd`` at its default works in a temporary directory of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from typing_extensions import override

from apothic.backend import SandboxRef, SandboxRequest
from apothic.errors import (
    SandboxLimitError,
    SandboxSessionNotFoundError,
    SandboxStartError,
)
from apothic.inprocess import LoopThread
from apothic.local_session import CoreRef
from apothic.options import ClassOptions
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo, SandboxSpec
from apothic.testing.process import SetUpError
from apothic.values import CloseReport

__all__ = ["InProcessSandboxes"]

_Key = tuple[str, str, str]


class InProcessSandboxes:
    """The sandbox half of a `ControlPlaneClient`, which forwards to it the methods of the same names."""

    def __init__(
        self,
        cluster_id: str,
        prepare: Callable[[str, ClassOptions, ExitStack], Mapping[str, str]],
    ) -> None:
        """Start with no sessions.

        Args:
            cluster_id: of the control plane.
            prepare: is given a session's label and options; makes its volumes, to be undone by the
                stack when it is closed, and gives the variables of image and secrets. It raises
                `SetUpError` where it cannot.
        """
        self._cluster_id = cluster_id
        self._prepare = prepare
        self._sessions: dict[_Key, _Session] = {}
        self._specs: dict[str, SandboxSpec] = {}
        self._lock = threading.RLock()

    def store_spec(self, spec: SandboxSpec) -> str:
        """Keep a version of a definition; give its digest."""
        digest = spec.digest
        with self._lock:
            self._specs[digest] = spec
        return digest

    def start_sandbox(self, request: SandboxRequest) -> SandboxRef:
        """Open or find a session."""
        spec = request.spec
        key = (spec.app, spec.name, request.sandbox_id)
        with self._lock:
            found = self._sessions.get(key)
            if found is not None:
                return found
            alive = [other for other in self._sessions if other[:2] == key[:2]]
            if len(alive) >= request.max_sessions:
                raise SandboxLimitError(
                    f"{len(alive)} sessions of {spec.app}.{spec.name} live, which is max_containers × "
                    f"tasks_per_container. Close some, or raise one of them."
                )
            options = ClassOptions.model_validate(spec.options)
            handle = SandboxHandle(
                cluster_id=self._cluster_id,
                app=spec.app,
                sandbox=spec.name,
                sandbox_id=request.sandbox_id,
                spec_digest=self.store_spec(spec),
                named=request.named,
            )
            label = f"{spec.app}.{spec.name} {request.sandbox_id!r}"
            with ExitStack() as undo:
                try:
                    variables = self._prepare(label, options, undo)
                except SetUpError as error:
                    raise SandboxStartError(str(error)) from None
                session = _Session.open(
                    handle,
                    label=label,
                    cwd=None if request.cwd == b"/" else request.cwd,
                    env=request.env,
                    concurrent_requests=options.concurrent_requests,
                    secrets={
                        name.encode(): value.encode("utf-8", "surrogateescape")
                        for name, value in variables.items()
                    },
                )
                session.undo = undo.pop_all()
            session.network = spec.network
            session.arguments_digest = request.arguments_digest
            session.on_close = lambda: self._forget(key, session)
            self._sessions[key] = session
            return session

    def attach_sandbox(self, handle: SandboxHandle) -> SandboxRef:
        """Reach a live session."""
        with self._lock:
            found = self._sessions.get((handle.app, handle.sandbox, handle.sandbox_id))
        if found is None:
            raise SandboxSessionNotFoundError(
                f"{handle.app}.{handle.sandbox} {handle.sandbox_id!r} does not live: it was "
                f"closed. Open another."
            )
        return found

    def find_sandbox_spec(self, digest: str) -> SandboxSpec | None:
        """Give a version of a definition."""
        return self._specs.get(digest)

    def list_sandboxes(
        self, app: str | None = None, sandbox: str | None = None
    ) -> list[SandboxSessionInfo]:
        """List live sessions."""
        with self._lock:
            found = [
                session
                for (of_app, of_sandbox, _), session in sorted(self._sessions.items())
                if app in (None, of_app) and sandbox in (None, of_sandbox)
            ]
        return [session.inspect() for session in found]

    def close_outdated(self, app: str, current: Iterable[str]) -> None:
        """Close the sessions of an app whose version is none of these digests."""
        digests = set(current)
        with self._lock:
            outdated = [
                session
                for session in self._sessions.values()
                if session.handle.app == app and session.handle.spec_digest not in digests
            ]
        for session in outdated:
            session.close()

    def close_all(self) -> None:
        """Close every session, named ones too."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close()

    def _forget(self, key: _Key, session: _Session) -> None:
        with self._lock:
            if self._sessions.get(key) is session:
                del self._sessions[key]


class _Session(CoreRef):
    """A session that the engine knows by name."""

    def __init__(self, handle: SandboxHandle, loop: LoopThread) -> None:
        super().__init__(handle, loop)
        self.on_close: Callable[[], None] = lambda: None
        self.undo = ExitStack()

    @override
    def close(self) -> CloseReport:
        self.on_close()
        try:
            return super().close()
        finally:
            self.undo.close()

    @override
    def release(self) -> None:
        # This process is the only holder there can be; named sessions are held by nobody.
        if not self.handle.named:
            self.close()
