"""From the arguments of an exec to what travels, and from what comes back to its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apothic.backend import ExecOutcome, ExecRequest
from apothic.errors import ExecTimeoutError
from apothic.options import check_count, check_seconds
from apothic.sandbox_values import SandboxExecResult
from apothic.session_arguments import (
    argv_bytes,
    env_bytes,
    input_bytes,
    path_bytes,
    to_text,
    user_bytes,
)

__all__ = ["exec_request", "exec_result"]


def exec_request(
    command: str | Sequence[str],
    shell: bool,
    cwd: str | None,
    env: Mapping[str, Any] | None,
    timeout_s: float | None,
    stdin: bytes | str | None,
    user: str | None,
    max_output_bytes: int,
    *,
    default_timeout_s: float,
) -> tuple[ExecRequest, bytes | None]:
    """Check the arguments of `SandboxSession.exec`; give the request and the input.

    Raises:
        InvalidOptionError: an argument breaks its rule.
    """
    request = ExecRequest(
        argv=argv_bytes(command, shell),
        timeout_s=default_timeout_s if timeout_s is None else check_seconds("timeout_s", timeout_s),
        max_output_bytes=check_count("max_output_bytes", max_output_bytes, 0),
        cwd=None if cwd is None else path_bytes(cwd),
        env=None if env is None else env_bytes(env),
        user=b"" if user is None else user_bytes(user),
    )
    return request, input_bytes(stdin)


def exec_result(
    request: ExecRequest,
    outcome: ExecOutcome,
    stdout: bytes,
    stderr: bytes,
    memory_mb: int | None,
) -> SandboxExecResult:
    """Make the result; ``memory_mb`` is the limit that it names, None without one.

    Raises:
        ExecTimeoutError: the program was ended for its time; it holds the result.
    """
    result = SandboxExecResult(
        command=tuple(map(to_text, request.argv)),
        returncode=outcome.returncode,
        stdout_bytes=stdout,
        stderr_bytes=stderr,
        duration_s=outcome.duration_s,
        signal=outcome.signal,
        stdout_truncated=outcome.stdout_truncated,
        stderr_truncated=outcome.stderr_truncated,
        oom_killed=outcome.oom_killed,
        memory_mb=memory_mb,
    )
    if outcome.timed_out:
        raise ExecTimeoutError(
            f"{result.command_text} ran longer than timeout_s={request.timeout_s:g}: it and all "
            f"that it had started was killed; .result has its output so far. Raise timeout_s for "
            f"work that takes long.",
            result,
        )
    return result
