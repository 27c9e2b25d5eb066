"""`Secret`: environment variables that live on the cluster and are resolved in the worker only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from apothic.errors import ConflictError, InvalidOptionError, SecretNotFoundError
from apothic.names import check_env_name, check_name
from apothic.twins import Twin, Twins, class_twin, twin

if TYPE_CHECKING:
    from apothic.backend import ControlPlaneClient

__all__ = ["Secret", "SecretAio", "SecretClassAio"]


class Secret:
    """The name of a secret. Its value never stands in this object, a handle, a log or a repr.

    A secret stored as a string sets the environment variable of its own name; one stored as a
    mapping sets each of its keys.
    """

    __slots__ = ("name",)

    name: str
    aio: ClassVar[Twins[Secret, SecretClassAio, SecretAio]] = Twins(
        lambda: SecretClassAio(), lambda secret: SecretAio(secret)
    )

    def __init__(self, name: str) -> None:
        """Refer to a stored secret; `from_name` says the same.

        Raises:
            InvalidOptionError: when the name is not valid.
        """
        self.name = check_name("secret", name)

    @classmethod
    def from_name(cls, name: str) -> Secret:
        """Refer to a stored secret; it is looked up when an instance starts.

        Raises:
            InvalidOptionError: when the name is not valid.
        """
        return cls(name)

    @classmethod
    def create(
        cls,
        name: str,
        value: str | Mapping[str, str],
        *,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> Secret:
        """Store a new secret on the cluster.

        Args:
            name: its name; for a string value also the environment variable, so it must be one.
            value: the value, or several variables with theirs.
            client: the connection to use.
            base_url: the cluster to connect to when no client is given.

        Raises:
            ConflictError: when it exists; `set` replaces it.
            InvalidOptionError: when a name or value is not valid; the text holds no value.
        """
        secret = cls(name)
        variables = _variables(name, value)
        if not _connect(client, base_url).put_secret(name, variables, overwrite=False):
            raise ConflictError(
                f"secret {name!r} exists already. Use Secret.set to replace its value."
            )
        return secret

    @classmethod
    def set(
        cls,
        name: str,
        value: str | Mapping[str, str],
        *,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> Secret:
        """Store a secret, replacing one of the same name; running instances keep what they have.

        Raises:
            InvalidOptionError: when a name or value is not valid; the text holds no value.
        """
        secret = cls(name)
        _connect(client, base_url).put_secret(name, _variables(name, value), overwrite=True)
        return secret

    @classmethod
    def list(
        cls, *, client: ControlPlaneClient | None = None, base_url: str | None = None
    ) -> list[Secret]:
        """List the stored secrets by name."""
        return [cls(name) for name in _connect(client, base_url).list_secrets()]

    def delete(
        self, *, client: ControlPlaneClient | None = None, base_url: str | None = None
    ) -> None:
        """Remove the secret from the cluster; running instances keep what they have.

        Raises:
            SecretNotFoundError: when there is none of this name.
        """
        if not _connect(client, base_url).delete_secret(self.name):
            raise SecretNotFoundError(
                f"secret {self.name!r} is not stored on this cluster. Secret.list() names those "
                f"that are."
            )

    def __repr__(self) -> str:
        """Show the name; there is nothing else to show."""
        return f"Secret({self.name!r})"

    def __eq__(self, other: object) -> bool:
        """Compare by name."""
        return isinstance(other, Secret) and other.name == self.name

    def __hash__(self) -> int:
        """Hash by name."""
        return hash(("apothic.Secret", self.name))

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        """Travel as the name alone."""
        return Secret, (self.name,)


class SecretClassAio:
    """Async twins of what `Secret` itself can be asked."""

    __slots__ = ()

    from_name: Final = class_twin(Secret.from_name)
    create: Final = class_twin(Secret.create)
    set: Final = class_twin(Secret.set)
    list: Final = class_twin(Secret.list)


class SecretAio(Twin[Secret], SecretClassAio):
    """Async twins of `Secret`."""

    __slots__ = ()

    delete: Final = twin(Secret.delete)


def _connect(client: ControlPlaneClient | None, base_url: str | None) -> ControlPlaneClient:
    from apothic.backend import connect

    return connect(client, base_url)


def _variables(name: str, value: str | Mapping[str, str]) -> dict[str, str]:
    # Error texts name variables and types, never values.
    if isinstance(value, str):
        variables = {check_env_name(name): value}
    elif isinstance(value, Mapping) and value:
        variables = {check_env_name(key): text for key, text in value.items()}
    else:
        raise InvalidOptionError(
            f"the value of secret {name!r} is a {type(value).__name__}: it takes a string, or a "
            f"non-empty mapping of environment variables to strings. Convert it first."
        )
    for key, text in variables.items():
        if not isinstance(text, str) or "\0" in text:
            raise InvalidOptionError(
                f"variable {key} of secret {name!r} is no string without NUL characters, which is "
                f"all an environment can carry. Encode it, for instance as base64."
            )
    return variables
