"""docker-py's exceptions become ours, by one table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import docker.errors
import requests.exceptions
import urllib3.exceptions

from apothic.errors import ImageNotFoundError, SandboxEngineError, SandboxError

__all__ = ["KNOWN_ERRORS", "START_COMMAND", "is_conflict", "to_sandbox_error", "translated"]

START_COMMAND = "sudo systemctl start docker (in a checkout of this package: make docker-engine)"

# What an engine says, and what helps. The first text found counts.
_REMEDIES = (
    (
        "could not select device driver",
        "The engine has no driver for GPUs: install nvidia-container-toolkit on the node, then run "
        "'sudo nvidia-ctk runtime configure --runtime=docker' and restart Docker.",
    ),
    (
        "unknown or invalid runtime name",
        "Register the runtime in /etc/docker/daemon.json on the node and restart Docker, or unset "
        "APOTHIC_SANDBOX_RUNTIME.",
    ),
    ("no space left on device", "Free space on the node: 'docker system df' says what takes it."),
    ("exec format error", "The image is for another processor architecture than the node's."),
    ("bind source path does not exist", "The directory must exist where the engine runs."),
    ("cannot allocate memory", "The node is out of memory."),
    ("memory limit allowed", "Give memory_mb a higher value."),
)

_IN_THE_LIBRARY = "docker-py gave up while the engine was to {doing}: {text}"
_LOST = (
    "the connection to the Docker engine broke while it was to {doing}: {text}. Check that it runs: "
    + START_COMMAND
)
_SLOW = (
    "the Docker engine did not answer in time while it was to {doing}: {text}. The node may be "
    "overloaded, or the engine stuck: 'docker info' on the node says."
)
_REFUSED = "the Docker engine could not {doing}: {text}"

# The most special class first: the first that fits counts.
_TABLE: tuple[tuple[type[Exception], type[SandboxError], str], ...] = (
    (docker.errors.ImageNotFound, ImageNotFoundError, _REFUSED),
    (docker.errors.NotFound, SandboxEngineError, _REFUSED),
    (docker.errors.APIError, SandboxEngineError, _REFUSED),
    (docker.errors.DockerException, SandboxEngineError, _IN_THE_LIBRARY),
    (docker.errors.StreamParseError, SandboxEngineError, _IN_THE_LIBRARY),
    (requests.exceptions.Timeout, SandboxEngineError, _SLOW),
    (requests.exceptions.RequestException, SandboxEngineError, _LOST),
    # docker-py lets these through where it reads a stream.
    (urllib3.exceptions.TimeoutError, SandboxEngineError, _SLOW),
    (urllib3.exceptions.HTTPError, SandboxEngineError, _LOST),
)

KNOWN_ERRORS = frozenset(
    {
        docker.errors.APIError,
        docker.errors.BuildError,
        docker.errors.ContainerError,
        docker.errors.ContextAlreadyExists,
        docker.errors.ContextException,
        docker.errors.ContextNotFound,
        docker.errors.DeprecatedMethod,
        docker.errors.DockerException,
        docker.errors.ImageLoadError,
        docker.errors.ImageNotFound,
        docker.errors.InvalidArgument,
        docker.errors.InvalidConfigFile,
        docker.errors.InvalidRepository,
        docker.errors.InvalidVersion,
        docker.errors.MissingContextParameter,
        docker.errors.NotFound,
        docker.errors.NullResource,
        docker.errors.StreamParseError,
        docker.errors.TLSParameterError,
    }
)
"""All that docker-py had when the table was made; a test compares."""


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise our errors in place of docker-py's; ``doing`` completes "the engine could not …"."""
    try:
        yield
    except tuple(kind for kind, _, _ in _TABLE) as error:
        raise to_sandbox_error(error, doing) from error


def to_sandbox_error(error: Exception, doing: str) -> SandboxError:
    """Give our error for one of docker-py's."""
    text = str(getattr(error, "explanation", None) or error).strip().rstrip(".")
    remedy = next((hint for said, hint in _REMEDIES if said in text.lower()), None)
    for kind, ours, sentence in _TABLE:
        if isinstance(error, kind):
            message = sentence.format(doing=doing, text=text)
            return ours(f"{message}. {remedy}" if remedy else f"{message}.")
    raise TypeError(f"{type(error).__name__} is no error of docker-py") from error


def is_conflict(error: docker.errors.APIError) -> bool:
    """Tell whether the engine refused because of something else that is there or going on."""
    return bool(error.status_code == 409)
