"""Rules for the names that reach the cluster, checked where the user writes them."""

from __future__ import annotations

import re
from urllib.parse import quote

from apothic.errors import InvalidOptionError

__all__ = ["actor_name", "check_env_name", "check_instance_id", "check_name"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_MAX_ID_CHARS = 128


def check_name(kind: str, name: object) -> str:
    """Return ``name`` if it can name an app, class, sandbox, secret or volume.

    Raises:
        InvalidOptionError: when it is no string of 1 to 63 letters, digits, ``_``, ``.`` or ``-``
            that starts with a letter or ``_``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidOptionError(
            f"{kind} name {name!r} is not valid: it takes a string of 1 to 63 letters, digits, "
            f"'_', '.' or '-' that starts with a letter or '_'. Choose such a name."
        )
    return name


def check_instance_id(instance_id: object) -> str:
    """Return ``instance_id`` if it can name an instance or session.

    Raises:
        InvalidOptionError: when it is no printable string of 1 to 128 characters without white
            space at its ends.
    """
    if (
        not isinstance(instance_id, str)
        or not 1 <= len(instance_id) <= _MAX_ID_CHARS
        or not instance_id.isprintable()
        or instance_id != instance_id.strip()
    ):
        raise InvalidOptionError(
            f"instance id {instance_id!r} is not valid: it takes a printable string of 1 to "
            f"{_MAX_ID_CHARS} characters without white space at its ends. Shorten or hash the id."
        )
    return instance_id


def check_env_name(name: object) -> str:
    """Return ``name`` if it can name an environment variable.

    Raises:
        InvalidOptionError: otherwise.
    """
    if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
        raise InvalidOptionError(
            f"environment variable name {name!r} is not valid: it takes letters, digits and '_', "
            f"and does not start with a digit. Rename it."
        )
    return name


def actor_name(app: str, cls: str, instance_id: str) -> str:
    """Give the Ray actor name of an instance; different instances never share one.

    ``:`` separates the parts, so it is escaped inside the id (names cannot hold one).
    """
    return f"{app}:{cls}:{quote(instance_id, safe='')}"
