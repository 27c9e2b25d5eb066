"""Ray's exceptions become ours at this one place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ray import exceptions as rays

from apothic.errors import (
    ApothicError,
    AuthenticationError,
    BackendError,
    EnvironmentSetupError,
    FunctionTimeoutError,
    InstanceClosedError,
    InstanceLostError,
    InstanceStartError,
    JobCancelledError,
    PlacementError,
    SerializationError,
    WaitTimeoutError,
)
from apothic.tracebacks import text_of
from ray_backend.actors.failure import RemoteFailure, decode_user_error

__all__ = [
    "NEVER_SENT",
    "decode_failure",
    "failure_inside",
    "missing_package",
    "translate",
    "was_never_sent",
]

NEVER_SENT = ("failed to connect to all addresses", "the actor is restarting")
"""Words of Ray, in lower case, for a call that did not reach the actor and can be sent again; one that
was under way when the process died gets others ("the actor was restarted", "connection reset")."""

_KILLED = re.compile(r"killed by [`']?ray\.kill|ray\.kill|intended|exit_actor", re.IGNORECASE)


def decode_failure(failure: RemoteFailure) -> Exception:
    """Give the error that a failure from the worker stands for."""
    if failure.kind == "user":
        return decode_user_error(failure)
    if failure.kind == "start":
        if not failure.type_name:
            return InstanceStartError(failure.text)
        error = InstanceStartError(
            f"{failure.where} did not start: its constructor or an enter hook raised {failure.text}. "
            f"The remote traceback follows as the cause; nothing was left behind."
        )
        error.__cause__ = decode_user_error(failure)
        return error
    if failure.kind == "timeout":
        timeout = FunctionTimeoutError(failure.text)
        timeout.state_lost = failure.state_lost
        return timeout
    if failure.kind == "refused":
        refusal = InstanceClosedError(failure.text)
        refusal.refused = True
        return refusal
    simple: dict[str, type[ApothicError]] = {
        "cancelled": JobCancelledError,
        "closed": InstanceClosedError,
        "lost": InstanceLostError,
        "unpicklable": SerializationError,
    }
    return simple.get(failure.kind, BackendError)(failure.text)


def failure_inside(error: BaseException) -> RemoteFailure | None:
    """Find our failure in what Ray raised for it."""
    if isinstance(error, RemoteFailure) and not isinstance(error, rays.RayError):
        return error
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RemoteFailure) else None


def was_never_sent(error: BaseException) -> bool:
    """Tell whether a call failed before it reached the actor: sending it again is no second run."""
    return isinstance(error, rays.ActorUnavailableError) and any(
        words in str(error).lower() for words in NEVER_SENT
    )


def translate(
    error: BaseException,
    label: str,
    take_timeout: Callable[[], str | None] = lambda: None,
    timeout_s: float | None = None,
) -> BaseException:
    """Give our error for one of Ray's; anything else is given back as it is.

    Args:
        error: what Ray raised.
        label: names the instance.
        take_timeout: reads what a replaced process left for this call, if anything.
        timeout_s: how long the caller waited, for the text of a wait that ended.
    """
    failure = failure_inside(error)
    if failure is not None:
        return decode_failure(failure)
    if not isinstance(error, rays.RayError):
        return error
    if isinstance(error, rays.GetTimeoutError):
        return WaitTimeoutError(
            f"{label}: the call has not ended after {timeout_s} s; it goes on. Wait longer, or "
            f"cancel it."
        )
    if isinstance(error, rays.TaskCancelledError):
        return JobCancelledError(f"{label}: the call was cancelled.")
    if isinstance(error, (rays.RayActorError, rays.WorkerCrashedError)):
        return _translate_loss(error, label, take_timeout)
    if isinstance(error, (rays.ObjectLostError, rays.NodeDiedError, rays.LocalRayletDiedError)):
        return InstanceLostError(f"{label}: the value was lost with its node. {_first_line(error)}")
    if isinstance(error, rays.RuntimeEnvSetupError):
        return EnvironmentSetupError(
            f"{label}: a node could not make its runtime environment. Correct the image, or install "
            f"what it needs on the nodes. Ray says: {_tail(error)}"
        )
    if isinstance(error, (rays.ActorUnschedulableError, rays.TaskUnschedulableError)):
        return PlacementError(f"{label} cannot be placed. Ray says: {_first_line(error)}")
    if isinstance(error, getattr(rays, "AuthenticationError", ())):
        return AuthenticationError(
            f"{label}: the cluster refused this process. {_first_line(error)}"
        )
    if isinstance(error, rays.RayTaskError):
        return _translate_task_error(error, label)
    reason = _why_unreadable(error)
    if reason is not None:
        return SerializationError(
            f"{label}: the result cannot travel to the caller: it cannot be unpickled there: {reason}. "
            f"Return plain data, or make the object picklable."
        )
    return BackendError(f"{label}: Ray failed: {type(error).__name__}: {_first_line(error)}")


def missing_package(error: BaseException) -> EnvironmentSetupError | None:
    """Give the error for actors that did not start since their nodes lack this package, or None."""
    text = str(error)
    found = re.search(r"No module named '([^']+)'", text)
    # Ray puts this class in the place of one that it could not load.
    if found is None and "_create_fake_actor_class" not in text:
        return None
    return EnvironmentSetupError(
        f"the nodes of this cluster lack {found[1] if found else 'this package'!r}, without which no "
        f"instance starts there. Install it on them (pip install apothic-ray), or bring it with the "
        f'job: runtime_env={{"py_modules": ["apothic", "ray_backend"]}} of `ray job submit` or ray.init.'
    )


def _translate_loss(
    error: rays.RayError, label: str, take_timeout: Callable[[], str | None]
) -> ApothicError:
    timeout_text = take_timeout()
    if timeout_text is not None:
        timeout = FunctionTimeoutError(timeout_text)
        timeout.state_lost = True
        return timeout
    lacking = missing_package(error)
    if lacking is not None:
        return lacking
    text = str(error)
    if isinstance(error, rays.RuntimeEnvSetupError) or "runtime env" in text.lower():
        return EnvironmentSetupError(
            f"{label}: a node could not make its runtime environment. Correct the image, or install "
            f"what it needs on the nodes. Ray says: {_tail(error)}"
        )
    if isinstance(error, rays.ActorDiedError) and _KILLED.search(text) and "lost" not in text:
        return InstanceClosedError(
            f"{label} is closed: it was closed or removed while this process held it. Make or name "
            f"a new instance."
        )
    return InstanceLostError(
        f"{label} lost its process or node; calls in flight may or may not have had effects. A named "
        f"instance comes back by itself, retries= tries again. Ray says: {_first_line(error)}"
    )


def _translate_task_error(error: rays.RayTaskError, label: str) -> ApothicError:
    cause: Any = getattr(error, "cause", None)
    reason = _why_unreadable(cause)
    if reason is not None:
        return SerializationError(
            f"{label}: an argument cannot be unpickled where it is used: {reason}. Pass plain data."
        )
    text = _tail(error)
    if "serializ" in text.lower() or "pickle" in text.lower():
        return SerializationError(
            f"{label}: an argument or the result could not travel: {text}. Return plain data, or "
            f"make the object picklable."
        )
    return BackendError(f"{label}: Ray failed to run the call: {type(cause).__name__}: {text}")


def _why_unreadable(error: object) -> str | None:
    """Tell why Ray could not unpickle something, where that is what it says."""
    if not isinstance(error, rays.RaySystemError):
        return None
    if "deserialize" not in (getattr(error, "traceback_str", None) or ""):
        return None
    reason = error.client_exc
    if not isinstance(reason, Exception):
        return str(reason)
    return f"{type(reason).__name__}: {text_of(reason)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _tail(error: BaseException, limit: int = 600) -> str:
    text = text_of(error).strip()
    return text if len(text) <= limit else "…" + text[-limit:]
