"""Every error this package raises on purpose, as one tree.

::

    ApothicError
    ├── InvalidOptionError (ValueError)         an option, name or policy that breaks its rule
    ├── DefinitionError (TypeError)             a class or hook that cannot become a service
    ├── ArgumentError (TypeError)               arguments that do not fit a signature
    ├── HandleError (ValueError)                a handle that is malformed, altered or foreign
    ├── UsageError (RuntimeError)               a verb used where it has no meaning
    ├── SerializationError (TypeError)          a value that cannot travel between processes
    ├── NotFoundError (LookupError)
    │   ├── AppNotFoundError
    │   ├── ClassNotFoundError
    │   ├── SandboxNotFoundError
    │   ├── MethodNotFoundError (AttributeError)
    │   ├── InstanceNotFoundError
    │   ├── SandboxSessionNotFoundError
    │   ├── SecretNotFoundError
    │   └── VolumeNotFoundError
    ├── ConflictError                           the name is taken by something different
    ├── BackendError
    │   ├── BackendNotFoundError                no engine is installed
    │   ├── ConnectionFailedError (ConnectionError)
    │   │   ├── AuthenticationError
    │   │   └── VersionMismatchError
    │   ├── EnvironmentSetupError               a node cannot make the image or runtime environment
    │   └── PlacementError
    │       ├── NoMatchingOfferError            no node can ever run it
    │       └── PlacementTimeoutError (TimeoutError)  nodes match, but none had room in time
    ├── InstanceError
    │   ├── InstanceStartError                  construction or an ``enter`` hook failed
    │   ├── InstanceLostError                   its process, node or cluster died
    │   └── InstanceClosedError                 it was closed
    ├── SandboxError
    │   ├── SandboxEngineError                  the Docker engine of a node could not do its part
    │   │   └── SandboxNetworkError             it cannot enforce what ``network`` promises
    │   ├── ImageNotFoundError (LookupError)    an image is neither on the node nor in a registry
    │   ├── ImageBuildError                     a step of an image failed
    │   ├── SandboxStartError                   a session could not be opened
    │   ├── SandboxLimitError                   as many sessions live as the definition allows
    │   ├── SandboxClosedError                  the session was closed
    │   ├── SandboxLostError                    its container, engine, process or node died
    │   ├── ExecTimeoutError (TimeoutError)     an exec ran longer than its ``timeout_s``
    │   ├── ExecStartError (OSError)            a program could not be started at all
    │   ├── SandboxExecError                    `SandboxExecResult.check`: the program failed
    │   └── SandboxFileError (OSError)          a path that cannot be used, with ``errno``
    │       ├── SandboxFileNotFoundError (FileNotFoundError)
    │       ├── SandboxFileExistsError (FileExistsError)
    │       ├── SandboxIsADirectoryError (IsADirectoryError)
    │       ├── SandboxNotADirectoryError (NotADirectoryError)
    │       ├── SandboxPermissionError (PermissionError)
    │       └── SandboxNoSpaceError             the disk or the quota is full
    └── CallError
        ├── RemoteError                         user code failed with an error that cannot travel
        ├── FunctionTimeoutError (TimeoutError) the call ran longer than its ``timeout_s``
        ├── WaitTimeoutError (TimeoutError)     the caller stopped waiting; the call goes on
        ├── JobCancelledError                   the call was cancelled
        └── PendingTasksExceededError           ``max_pending_tasks`` calls are unfinished already

Each message holds the value, the rule and the remedy. Every class survives pickling with all its
attributes, whatever its constructor takes. The user's own exceptions are no part of the tree: they
arrive as themselves, with a `RemoteTraceback` as their ``__cause__``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apothic.sandbox_values import SandboxExecResult

__all__ = [
    "ApothicError",
    "AppNotFoundError",
    "ArgumentError",
    "AuthenticationError",
    "BackendError",
    "BackendNotFoundError",
    "CallError",
    "ClassNotFoundError",
    "ConflictError",
    "ConnectionFailedError",
    "DefinitionError",
    "EnvironmentSetupError",
    "ExecStartError",
    "ExecTimeoutError",
    "FunctionTimeoutError",
    "HandleError",
    "ImageBuildError",
    "ImageNotFoundError",
    "InstanceClosedError",
    "InstanceError",
    "InstanceLostError",
    "InstanceNotFoundError",
    "InstanceStartError",
    "InvalidOptionError",
    "JobCancelledError",
    "MethodNotFoundError",
    "NoMatchingOfferError",
    "NotFoundError",
    "PendingTasksExceededError",
    "PlacementError",
    "PlacementTimeoutError",
    "RemoteError",
    "RemoteTraceback",
    "SandboxClosedError",
    "SandboxEngineError",
    "SandboxError",
    "SandboxExecError",
    "SandboxFileError",
    "SandboxFileExistsError",
    "SandboxFileNotFoundError",
    "SandboxIsADirectoryError",
    "SandboxLimitError",
    "SandboxLostError",
    "SandboxNetworkError",
    "SandboxNoSpaceError",
    "SandboxNotADirectoryError",
    "SandboxNotFoundError",
    "SandboxPermissionError",
    "SandboxSessionNotFoundError",
    "SandboxStartError",
    "SecretNotFoundError",
    "SerializationError",
    "UsageError",
    "VersionMismatchError",
    "VolumeNotFoundError",
    "WaitTimeoutError",
]


def _rebuild(
    cls: type[ApothicError], args: tuple[object, ...], state: dict[str, object]
) -> ApothicError:
    """Make the error again without its constructor, whose parameters may differ from ``args``."""
    error = cls.__new__(cls, *args)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


class ApothicError(Exception):
    """Root of the tree: catch it to catch everything this package raises on purpose."""

    def __reduce__(
        self,
    ) -> tuple[object, tuple[type[ApothicError], tuple[object, ...], dict[str, object]]]:
        """Keep every attribute through pickling; those of `OSError` are no part of the dict."""
        state = dict(self.__dict__)
        if isinstance(self, OSError):
            state |= {
                name: getattr(self, name)
                for name in ("errno", "strerror", "filename")
                if getattr(self, name) is not None
            }
        return _rebuild, (type(self), self.args, state)


class InvalidOptionError(ApothicError, ValueError):
    """An option, name or policy breaks its rule; raised where it was written."""


class DefinitionError(ApothicError, TypeError):
    """A class, method or hook cannot become a service as it is written."""


class ArgumentError(ApothicError, TypeError):
    """Arguments do not fit the signature of a constructor or method."""


class HandleError(ApothicError, ValueError):
    """A handle is malformed, was altered, or belongs to another cluster, app or class."""


class UsageError(ApothicError, RuntimeError):
    """A verb was used where it has no meaning; the message says what to write."""


class SerializationError(ApothicError, TypeError):
    """A class, argument or result cannot travel between processes; the message names it."""


class NotFoundError(ApothicError, LookupError):
    """Something named does not exist on the cluster or in the app."""


class AppNotFoundError(NotFoundError):
    """No app of this name is deployed on the cluster."""


class ClassNotFoundError(NotFoundError):
    """The app has no class of this name."""


class SandboxNotFoundError(NotFoundError):
    """The app has no sandbox definition of this name."""


class MethodNotFoundError(NotFoundError, AttributeError):
    """The class has no remote method of this name."""


class InstanceNotFoundError(NotFoundError):
    """No live instance answers to this handle or id."""


class SandboxSessionNotFoundError(NotFoundError):
    """No live session answers to this handle or id."""


class SecretNotFoundError(NotFoundError):
    """No secret of this name is stored on the cluster."""


class VolumeNotFoundError(NotFoundError):
    """No volume of this name exists and it was not to be created."""


class ConflictError(ApothicError):
    """The name exists already with other arguments, another backend or another size."""


class BackendError(ApothicError):
    """The engine behind the API could not do its part."""


class BackendNotFoundError(BackendError):
    """No installed package provides the entry-point group ``apothic.backends``."""


class ConnectionFailedError(BackendError, ConnectionError):
    """The cluster could not be reached, or the connection to it ended."""


class AuthenticationError(ConnectionFailedError):
    """The cluster refused this process's token, or wants one and got none."""


class VersionMismatchError(ConnectionFailedError):
    """The cluster runs a Ray or Python version that this process cannot talk to."""


class EnvironmentSetupError(BackendError):
    """A node could not make the image or the runtime environment of a class."""


class PlacementError(BackendError):
    """No node was found to run on."""


class NoMatchingOfferError(PlacementError):
    """No node of the cluster can ever satisfy the constraints; the message holds the table."""


class PlacementTimeoutError(PlacementError, TimeoutError):
    """Nodes satisfy the constraints, but none had room in time; the message names the holders."""


class InstanceError(ApothicError):
    """Something happened to an instance as a whole."""


class InstanceStartError(InstanceError):
    """Construction or an ``enter`` hook failed; the user's exception is the ``__cause__``."""


class InstanceLostError(InstanceError):
    """The instance's process, node or cluster died; what its methods had done may be lost."""


class InstanceClosedError(InstanceError):
    """The instance was closed, by this process or by another.

    Attributes:
        refused: True when the call is known not to have run: it came after the closing. One that was
            interrupted by the closing, or whose process was removed, has run or may have.
    """

    refused: bool = False


class SandboxError(ApothicError):
    """Something happened to a sandbox session or inside one."""


class SandboxEngineError(SandboxError):
    """The node's Docker engine is missing, refuses, does not answer, or could not do its part."""


class SandboxNetworkError(SandboxEngineError):
    """The node's engine cannot enforce what the sandbox's ``network`` promises; it was not started."""


class ImageNotFoundError(SandboxError, LookupError):
    """An image is not on the node and could not be pulled."""


class ImageBuildError(SandboxError):
    """A step of an image failed.

    Attributes:
        step: the Dockerfile instruction that failed, or an empty string when none had begun.
        log: the end of the build's output.
    """

    def __init__(self, message: str, step: str = "", log: str = "") -> None:
        """Keep the step and the log beside the message, which holds both."""
        super().__init__(message)
        self.step = step
        self.log = log


class SandboxStartError(SandboxError):
    """A session could not be opened; nothing of it is left."""


class SandboxLimitError(SandboxError):
    """As many sessions live as ``max_containers`` × ``tasks_per_container`` allows."""


class SandboxClosedError(SandboxError):
    """The session was closed, by this process or by another."""


class SandboxLostError(SandboxError):
    """The session's container, engine, process or node died, or its memory ran out."""


class ExecTimeoutError(SandboxError, TimeoutError):
    """An exec ran longer than its ``timeout_s``; all that it had started is dead.

    Attributes:
        result: the `apothic.SandboxExecResult` with the output up to then.
    """

    def __init__(self, message: str, result: SandboxExecResult | None = None) -> None:
        """Keep the partial result beside the message."""
        super().__init__(message)
        self.result = result

    def __str__(self) -> str:
        """Give the message."""
        return Exception.__str__(self)


class ExecStartError(SandboxError, OSError):
    """A program could not be started: its arguments are too long or its user unknown.

    A program that is missing or not executable is no error: its exec ends with 127 or 126.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        """Keep the error number beside the message."""
        super().__init__(message)
        self.errno = errno

    def __str__(self) -> str:
        """Give the message."""
        return Exception.__str__(self)


class SandboxExecError(SandboxError):
    """`apothic.SandboxExecResult.check` found a program that did not end with 0.

    Attributes:
        result: the `apothic.SandboxExecResult`.
    """

    def __init__(self, message: str, result: SandboxExecResult | None = None) -> None:
        """Keep the result beside the message."""
        super().__init__(message)
        self.result = result


class SandboxFileError(SandboxError, OSError):
    """A path in a sandbox cannot be used.

    Attributes:
        errno: the number, as in the module `errno`.
        filename: the absolute path.
    """

    def __init__(self, message: str, errno: int | None = None, path: str | None = None) -> None:
        """Keep number and path beside the message, which holds the path as well."""
        super().__init__(message)
        self.errno = errno
        self.filename = path

    def __str__(self) -> str:
        """Give the message."""
        return Exception.__str__(self)


class SandboxFileNotFoundError(SandboxFileError, FileNotFoundError):
    """There is no such file or directory."""


class SandboxFileExistsError(SandboxFileError, FileExistsError):
    """There is something of this name already."""


class SandboxIsADirectoryError(SandboxFileError, IsADirectoryError):
    """A file is wanted, this is a directory."""


class SandboxNotADirectoryError(SandboxFileError, NotADirectoryError):
    """A directory is wanted, this, or something on the way to it, is none."""


class SandboxPermissionError(SandboxFileError, PermissionError):
    """The session's user may not do this."""


class SandboxNoSpaceError(SandboxFileError):
    """The disk, or the quota on it, is full."""


class CallError(ApothicError):
    """A call did not give a value."""


class RemoteError(CallError):
    """User code raised something that does not survive the way back.

    Attributes:
        type_name: the qualified name of the exception's type, for instance ``builtins.SystemExit``.
        message: its text.
        traceback: the remote traceback as text, causes and notes included.
    """

    def __init__(self, type_name: str, message: str, traceback: str) -> None:
        """Keep the three texts that stand for the remote exception."""
        super().__init__(type_name, message, traceback)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        """Give ``type: message``, as a traceback's last line does, and the remote traceback."""
        head = f"{self.type_name}: {self.message}" if self.message else self.type_name
        return f"{head}\n\n{self.traceback.rstrip()}" if self.traceback else head


class FunctionTimeoutError(CallError, TimeoutError):
    """The call ran longer than its ``timeout_s`` and was stopped.

    Attributes:
        state_lost: True when the process had to be replaced, so that the instance's state is gone.
    """

    state_lost: bool = False


class WaitTimeoutError(CallError, TimeoutError):
    """``get(timeout_s=…)`` ended before the call did; the call goes on."""


class JobCancelledError(CallError):
    """The call was cancelled before it gave a value."""


class PendingTasksExceededError(CallError):
    """``max_pending_tasks`` calls are submitted and not finished; this one was not submitted."""


class RemoteTraceback(Exception):  # noqa: N818 - carries text, is never raised itself
    """The remote traceback as text: the ``__cause__`` of a user exception that came back."""

    def __init__(self, text: str) -> None:
        """Keep the text as it was formatted in the process that raised."""
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        """Give the text between line breaks, as a chained traceback prints it."""
        return f"\n{self.text.rstrip()}\n"
