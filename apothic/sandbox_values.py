"""Values of sandboxes: handles, what `inspect` tells, and what an exec gives. See `apothic.values`."""

from __future__ import annotations

import shlex
import signal as signals
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from apothic.errors import SandboxExecError
from apothic.values import Handle, Network, SandboxSpec, Value

__all__ = [
    "LOCAL_CLUSTER",
    "SandboxExecResult",
    "SandboxHandle",
    "SandboxInfo",
    "SandboxSessionInfo",
    "SandboxSpec",
    "SandboxStreamEvent",
    "SessionState",
]

_SHOWN_CHARS = 2000
_SHOWN_COMMAND_CHARS = 200

LOCAL_CLUSTER = "local"
"""Stands for a cluster in the handles of local sessions, which name nothing for others."""

SessionState = Literal["starting", "ready", "closing", "closed", "lost"]


class SandboxHandle(Handle):
    """Where a live session is: what `Sandbox.attach` takes, as an object, a dict or a JSON string.

    Attributes:
        cluster_id: the cluster that runs it.
        app: the app's name.
        sandbox: the definition's name.
        sandbox_id: the session's id within the definition.
        spec_digest: the version of the definition that it runs.
        named: whether it lives until closed, or while someone leases it.
    """

    schema_version: Literal[1] = 1
    cluster_id: str
    app: str
    sandbox: str
    sandbox_id: str
    spec_digest: str
    named: bool


class SandboxInfo(Value):
    """What `Sandbox.inspect` tells of a definition.

    Attributes:
        options: the checked options.
        remote_only: whether it was looked up by name.
        deployment_id: of the app, or None while it is only defined.
        spec_digest: the version, or None while it is only defined.
        sessions: ids of its live sessions on the connected cluster; empty when not deployed.
    """

    name: str
    app_name: str | None
    method_names: tuple[str, ...]
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    options: dict[str, Any]
    network: Network
    remote_only: bool
    deployment_id: str | None = None
    spec_digest: str | None = None
    sessions: tuple[str, ...] = ()


class SandboxSessionInfo(Value):
    """What `SandboxSession.inspect` tells of a session.

    Attributes:
        app: the app's name, empty where there is none.
        sandbox: the definition's name.
        sandbox_id: the session's id.
        local: whether it is a `Sandbox.local` one.
        state: where it is in its life.
        spec_digest: the version of the definition that it runs, empty for a local one.
        cwd: its working directory, or None where it was not asked.
        running_calls: verbs that run at this moment, execs and streams included.
        finished_calls: since it was opened, or since its process was last replaced.
        restarts: how often its process was replaced after a crash.
        started_unix_s: when it was opened, as a Unix time in seconds.
        node_id: the node it runs on.
        container_id: its container.
        arguments_digest: equal for equal ``cwd`` and ``env`` at creation.
        notes: what else is to be known, for instance a limit that the node cannot enforce.
    """

    app: str
    sandbox: str
    sandbox_id: str
    named: bool
    local: bool
    state: SessionState
    spec_digest: str = ""
    cwd: str | None = None
    network: Network | None = None
    running_calls: int = 0
    finished_calls: int = 0
    restarts: int = 0
    started_unix_s: float | None = None
    node_id: str | None = None
    container_id: str | None = None
    arguments_digest: str | None = None
    notes: tuple[str, ...] = ()


class SandboxExecResult(Value):
    """How an exec ended and what it wrote. As JSON, bytes are base64.

    Attributes:
        command: what ran, as an argument vector.
        returncode: the exit status; 128+n when it died of signal n, 127 when the program is missing,
            126 when it cannot be executed.
        stdout_bytes: what came on standard output, up to the limit of the exec.
        stderr_bytes: what came on standard error, likewise; for 127 and 126 it names the program.
        duration_s: from its start to its end, in seconds.
        signal: the signal that it died of, or None.
        stdout_truncated: more came on standard output than was kept.
        stderr_truncated: more came on standard error than was kept.
        oom_killed: the sandbox's memory ran out while it ran, and a process was killed for it.
        memory_mb: the sandbox's memory limit in MB, where one is in force.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )

    schema_version: Literal[1] = 1
    command: tuple[str, ...]
    returncode: int
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    duration_s: float = 0.0
    signal: int | None = None
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    oom_killed: bool = False
    memory_mb: int | None = None

    @property
    def stdout(self) -> str:
        """Standard output as text: UTF-8, undecodable bytes replaced."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text: UTF-8, undecodable bytes replaced."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.returncode == 0

    @property
    def truncated(self) -> bool:
        """Whether more came than was kept, on either stream."""
        return self.stdout_truncated or self.stderr_truncated

    def check(self) -> SandboxExecResult:
        """Give this result if the program ended with 0.

        Raises:
            SandboxExecError: otherwise; it says how it ended and shows the end of its output.
        """
        if self.ok:
            return self
        text = self.stderr.strip() or self.stdout.strip()
        shown = text if len(text) <= _SHOWN_CHARS else "…" + text[-_SHOWN_CHARS:]
        raise SandboxExecError(
            f"{self.command_text} {self.ending}" + (f":\n{shown}" if shown else "."), self
        )

    @property
    def command_text(self) -> str:
        """The command as a shell would take it, shortened."""
        text = shlex.join(self.command)
        return text if len(text) <= _SHOWN_COMMAND_CHARS else text[:_SHOWN_COMMAND_CHARS] + "…"

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        words = f"ended with {self.returncode}"
        if self.signal is not None:
            try:
                name = signals.Signals(self.signal).name
            except ValueError:
                name = f"signal {self.signal}"
            words = f"was killed by {name}"
        if self.oom_killed:
            limit = "" if self.memory_mb is None else f", memory_mb={self.memory_mb}"
            words += f" (out of memory{limit})"
        return words

    def __repr__(self) -> str:
        """Show how it ended; of what it wrote, only the sizes."""
        return (
            f"<apothic.SandboxExecResult {self.command_text!r} {self.ending}, "
            f"{len(self.stdout_bytes)} B out, {len(self.stderr_bytes)} B err, "
            f"{self.duration_s:.3f} s{', truncated' if self.truncated else ''}>"
        )

    __str__ = __repr__


class SandboxStreamEvent(Value):
    """One piece of what `SandboxSession.exec_stream` gives.

    Attributes:
        kind: ``stdout`` or ``stderr`` for output as it is written; ``exit`` once, at the end.
        text: the output as text. A character that is split between pieces comes with the later
            one, so that the texts of a stream joined are its whole text.
        data: the output as bytes; empty for ``exit``.
        returncode: for ``exit``, as in `SandboxExecResult`.
        result: for ``exit``, the result with what was written, up to the limit of the exec.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )

    schema_version: Literal[1] = 1
    kind: Literal["stdout", "stderr", "exit"]
    text: str = ""
    data: bytes = b""
    returncode: int | None = None
    result: SandboxExecResult | None = None
