"""`ClassOptions`: what `@app.cls` and `app.sandbox` take, checked once, where it is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from apothic.constraints import PlacementConstraints
from apothic.errors import InvalidOptionError
from apothic.image import Image
from apothic.names import check_env_name
from apothic.retries import Retries
from apothic.secret import Secret
from apothic.values import Network
from apothic.volume import StorageMount, mounts_from

__all__ = ["ClassOptions", "MountSpec", "check_count", "check_network", "check_seconds"]


class MountSpec(BaseModel):
    """One volume at its mount path, as the engine reads it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    path: str
    volume: str
    backend: str
    size_gb: float | None = None
    create_if_missing: bool = False


class ClassOptions(BaseModel):
    """Checked options of a class or sandbox, JSON-able; secrets are names here, never values.

    Attributes:
        cpu: CPU cores per container.
        memory_mb: memory per container, in MB.
        timeout_s: limit on the execution of one call, in seconds.
        max_retries: further attempts of a failed call.
        backoff_coefficient: factor between retry delays.
        initial_delay: seconds before the first retry.
        max_delay: longest delay, in seconds.
        concurrent_requests: calls that run at once in one container.
        max_pending_tasks: submitted and unfinished calls of one process beyond which its next is
            refused; below ``concurrent_requests`` it takes several processes to fill a container.
        max_containers: upper limit of containers behind one bound instance.
        tasks_per_container: calls in flight that one container takes before another starts.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    constraints: PlacementConstraints = Field(default_factory=PlacementConstraints)
    cpu: int = 1
    memory_mb: int = 1024
    timeout_s: float = 600
    max_retries: int = 0
    backoff_coefficient: float = 2.0
    initial_delay: float = 1.0
    max_delay: float = 60.0
    concurrent_requests: int = 1
    max_pending_tasks: int = 100
    max_containers: int = 1
    tasks_per_container: int = 1
    image: Image | None = None
    secrets: tuple[str, ...] = ()
    mounts: tuple[MountSpec, ...] = ()

    @property
    def retries(self) -> Retries:
        """The retry policy; with ``max_retries`` 0 it allows none."""
        return Retries(
            self.max_retries, self.backoff_coefficient, self.initial_delay, self.max_delay
        )

    @classmethod
    def of_arguments(cls, given: Mapping[str, Any]) -> ClassOptions:
        """Check the arguments of `App.cls` or `App.sandbox`; others among them are passed over.

        Raises:
            InvalidOptionError: naming the option, its value, the rule and the remedy.
        """
        constraints = {name: given[name] for name in PlacementConstraints.model_fields}
        return cls.check(constraints=constraints, **{name: given[name] for name in _ARGUMENTS})

    @classmethod
    def check(
        cls,
        *,
        constraints: Mapping[str, Any],
        cpu: int,
        memory_mb: int,
        timeout_s: float,
        retries: int | Retries | None,
        max_retries: int,
        concurrent_requests: int,
        max_pending_tasks: int,
        max_containers: int,
        tasks_per_container: int,
        image: Image | None,
        secrets: Sequence[Secret] | None,
        volumes: Mapping[str, StorageMount] | Sequence[StorageMount] | None,
    ) -> ClassOptions:
        """Check every option.

        Raises:
            InvalidOptionError: naming the option, its value, the rule and the remedy.
        """
        policy = _retry_policy(retries, max_retries)
        if image is not None and not isinstance(image, Image):
            raise InvalidOptionError(
                f"image={image!r} is not valid: it takes an apothic.Image. "
                f"Write Image.debian_slim() and what must be added to it."
            )
        return cls(
            constraints=PlacementConstraints.check(**constraints),
            cpu=check_count("cpu", cpu, 0, "Give whole CPU cores; 0 takes a share of none."),
            memory_mb=check_count("memory_mb", memory_mb, 1, "Give megabytes."),
            timeout_s=check_seconds("timeout_s", timeout_s),
            max_retries=policy.max_retries,
            backoff_coefficient=policy.backoff_coefficient,
            initial_delay=policy.initial_delay,
            max_delay=policy.max_delay,
            concurrent_requests=check_count("concurrent_requests", concurrent_requests, 1),
            max_pending_tasks=check_count("max_pending_tasks", max_pending_tasks, 1),
            max_containers=check_count("max_containers", max_containers, 1),
            tasks_per_container=check_count("tasks_per_container", tasks_per_container, 1),
            image=image,
            secrets=_secret_names(secrets),
            mounts=tuple(
                MountSpec(
                    path=path,
                    volume=mount.name,
                    backend=mount.backend,
                    size_gb=mount.size_gb,
                    create_if_missing=mount.create_if_missing,
                )
                for path, mount in mounts_from(volumes).items()
            ),
        )


_ARGUMENTS = tuple(
    name for name in inspect.signature(ClassOptions.check).parameters if name != "constraints"
)


def _retry_policy(retries: int | Retries | None, max_retries: int) -> Retries:
    plain = Retries(max_retries)
    if retries is None:
        return plain
    policy = retries if isinstance(retries, Retries) else Retries(retries)
    if max_retries not in (0, policy.max_retries):
        raise InvalidOptionError(
            f"retries={retries!r} and max_retries={max_retries!r} differ: retries is the policy, "
            f"max_retries the plain count used without one. Give one of them."
        )
    return policy


def _secret_names(secrets: Sequence[Secret] | None) -> tuple[str, ...]:
    if secrets is None:
        return ()
    if isinstance(secrets, (str, bytes)) or not isinstance(secrets, Sequence):
        raise InvalidOptionError(
            f"secrets takes a list of apothic.Secret, it was given a {type(secrets).__name__}. "
            f"Write secrets=[Secret.from_name('NAME')]."
        )
    for secret in secrets:
        if not isinstance(secret, Secret):
            # No repr here: what was given by mistake may well be the value of a secret.
            raise InvalidOptionError(
                f"secrets holds a {type(secret).__name__} where it takes apothic.Secret: values "
                f"never stand in code. Store it once with Secret.create and name it here."
            )
    return tuple(dict.fromkeys(secret.name for secret in secrets))


def check_count(name: str, value: object, low: int, remedy: str = "") -> int:
    """Return a whole number of at least ``low``.

    Raises:
        InvalidOptionError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidOptionError(
            f"{name}={value!r} is not valid: it takes a whole number of at least {low}. "
            f"{remedy or f'Use {low} for the least.'}"
        )
    return value


def check_network(value: object) -> Network:
    """Return a sandbox's ``network``.

    Raises:
        InvalidOptionError: when it is neither ``none`` nor ``internet``.
    """
    if value == "none":
        return "none"
    if value == "internet":
        return "internet"
    raise InvalidOptionError(
        f"network={value!r} is not valid: it is 'none', which reaches nothing, or 'internet', which "
        f"reaches the public internet and no private network. Choose one."
    )


def check_seconds(name: str, value: object) -> float:
    """Return a finite number of seconds above 0.

    Raises:
        InvalidOptionError: otherwise.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value <= 0
    ):
        raise InvalidOptionError(
            f"{name}={value!r} is not valid: it takes a finite number of seconds above 0. "
            f"Give seconds as a number, a large one for work that takes long."
        )
    return value


def check_env(values: Mapping[str, object]) -> dict[str, str]:
    """Return environment variables as strings.

    Raises:
        InvalidOptionError: when a name is no variable name or a value holds a NUL.
    """
    result: dict[str, str] = {}
    for name, value in values.items():
        check_env_name(name)
        text = str(value)
        if "\0" in text:
            raise InvalidOptionError(
                f"the value of environment variable {name} holds a NUL character, which no process "
                f"environment can carry. Encode it, for instance as base64."
            )
        result[name] = text
    return result
