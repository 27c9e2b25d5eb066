"""How a failure travels: raised in the worker as `RemoteFailure`, read by the caller.

It is an exception, not a value, so that a raw ``ray.get`` or a task that was given the reference fails
as it should. Its fields are plain, so that it unpickles wherever this package is installed, whatever
the user's exception was made of.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Literal

from apothic import tracebacks
from apothic.tracebacks import text_of

__all__ = ["Kind", "RemoteFailure", "capture", "decode_user_error", "format_error", "log"]

Kind = Literal["user", "start", "timeout", "cancelled", "refused", "closed", "lost", "unpicklable"]

# Raised again in the caller these would end its process or its loop, so they arrive as RemoteError.
_CONTROL_FLOW = (
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    StopIteration,
    StopAsyncIteration,
)
_OWN_DIRECTORIES = ("/ray_backend/actors/", "/ray/_private/", "/ray/util/tracing/", "_raylet.pyx")


class RemoteFailure(Exception):  # noqa: N818 - it is the carrier, not the error
    """A failed call on its way to the caller."""

    def __init__(
        self,
        kind: Kind,
        text: str,
        *,
        type_name: str = "",
        message: str = "",
        trace: str = "",
        pickled: bytes | None = None,
        where: str = "",
        state_lost: bool = False,
    ) -> None:
        """Keep what the caller needs to build the error."""
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.type_name = type_name
        self.message = message
        self.trace = trace
        self.pickled = pickled
        self.where = where
        self.state_lost = state_lost

    @property
    def short(self) -> str:
        """The type's own name and the message."""
        name = self.type_name.rpartition(".")[2]
        return f"{name}: {self.message}" if self.message else name or self.text

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel without the constructor."""
        return _rebuild, (dict(self.__dict__),)

    def __str__(self) -> str:
        """Read well in a raw ``ray.get`` and in Ray's logs."""
        return f"{self.text}\n{self.trace}" if self.trace else self.text


def _rebuild(state: dict[str, Any]) -> RemoteFailure:
    failure = RemoteFailure.__new__(RemoteFailure, state["text"])
    failure.args = (state["text"],)
    failure.__dict__.update(state)
    return failure


def capture(error: BaseException, kind: Kind = "user", where: str = "") -> RemoteFailure:
    """Turn what user code raised into a failure that travels; never raises."""
    type_name = f"{type(error).__module__}.{type(error).__qualname__}"
    message = text_of(error)
    return RemoteFailure(
        kind,
        f"{type_name}: {message}" if message else type_name,
        type_name=type_name,
        message=message,
        trace=format_error(error),
        pickled=_pickle(error),
        where=where,
    )


def log(text: str) -> None:
    """Tell the worker's log; one that user code has replaced or closed hinders nothing else."""
    with contextlib.suppress(Exception):
        print(f"apothic: {text}", file=sys.stderr)


def format_error(error: BaseException) -> str:
    """Format an exception with causes, groups and notes, without the frames of Ray and this host."""
    return tracebacks.format_error(
        error, lambda file: any(part in file for part in _OWN_DIRECTORIES)
    )


def _pickle(error: BaseException) -> bytes | None:
    """Pickle an exception if it comes back as it was; checked here, where its class is known."""
    if isinstance(error, _CONTROL_FLOW) or not isinstance(error, Exception):
        return None
    from apothic.packing import dumps, loads

    # The cause and context are in the text: pickles never hold them.
    try:
        data = dumps(error)
        back = loads(data)
        same = type(back) is type(error) and str(back) == str(error)
    except Exception:
        return None
    return data if same else None


def decode_user_error(failure: RemoteFailure) -> Exception:
    """Give the user's own exception, or a `RemoteError` that stands for it."""
    from apothic.errors import RemoteError, RemoteTraceback

    if failure.pickled is not None:
        from apothic.packing import loads

        try:
            error = loads(failure.pickled)
        except Exception:
            error = None
        if isinstance(error, Exception):
            _adopt_local_class(error)
            error.__cause__ = RemoteTraceback(failure.trace)
            return error
    return RemoteError(failure.type_name, failure.message, failure.trace)


def _adopt_local_class(error: Exception) -> None:
    """Let ``except models.MyError`` match where the caller has imported ``models`` itself."""
    cls = type(error)
    local = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
    if isinstance(local, type) and local is not cls and issubclass(local, Exception):
        with contextlib.suppress(TypeError):  # another layout: it stays the class that came along
            error.__class__ = local
