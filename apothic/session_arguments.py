"""From Python's values to the kernel's and back: paths, arguments, variables, and their rules."""

from __future__ import annotations

import codecs
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apothic.errors import InvalidOptionError
from apothic.names import check_env_name

__all__ = [
    "argv_bytes",
    "env_bytes",
    "env_text",
    "find_codec",
    "input_bytes",
    "mode_for",
    "path_bytes",
    "to_bytes",
    "to_text",
    "user_bytes",
]


def env_bytes(values: Mapping[str, Any] | None) -> dict[bytes, bytes | None]:
    """Check variables and give them as the seam takes them; None removes one.

    Raises:
        InvalidOptionError: it is no mapping, a name is no variable's, or a value is bytes or holds
            a NUL.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidOptionError(
            f"environment variables were given as {type(values).__name__}: they come as a dict."
        )
    result: dict[bytes, bytes | None] = {}
    for name, value in values.items():
        key = check_env_name(name).encode()
        if value is None:
            result[key] = None
            continue
        if isinstance(value, (bytes, bytearray, memoryview)):
            raise InvalidOptionError(
                f"the value of environment variable {name} is {type(value).__name__}: str() would "
                f"give b'…' of it. Decode it first."
            )
        data = to_bytes(f"environment variable {name}", str(value))
        if b"\0" in data:
            raise InvalidOptionError(
                f"the value of environment variable {name} holds a NUL character, which no process "
                f"environment can carry. Encode it, for instance as base64."
            )
        result[key] = data
    return result


def to_text(data: bytes) -> str:
    """Give a path, argument or variable as Python has them; undecodable bytes as surrogates."""
    return data.decode("utf-8", "surrogateescape")


def env_text(env: Mapping[bytes, bytes]) -> dict[str, str]:
    """Give variables as Python has them."""
    return {to_text(name): to_text(value) for name, value in env.items()}


def path_bytes(path: str) -> bytes:
    """Give a path as the seam takes it: any text of at least one character, without NUL."""
    try:
        given = os.fspath(path)
    except TypeError:
        given = None
    if not isinstance(given, str) or not given or "\0" in given:
        raise InvalidOptionError(
            f"path {path!r} is not valid: it takes a non-empty string without NUL characters. Use "
            f"'.' for the working directory."
        )
    return to_bytes("path", given)


def to_bytes(name: str, text: str) -> bytes:
    """Undo `to_text`; the error names ``name`` and not the text, which may be a secret.

    Raises:
        InvalidOptionError: the text holds what stands for no byte.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Without the text: it may be the value of a secret.
        raise InvalidOptionError(
            f"the {name} holds a lone surrogate, which stands for no byte. Only those that Python "
            f"makes of undecodable bytes can be sent back."
        ) from None


def argv_bytes(command: str | Sequence[str], shell: bool) -> tuple[bytes, ...]:
    """Give a command as an argument vector: split as a shell splits words, or for a shell.

    Raises:
        InvalidOptionError: there is nothing to run, or it cannot be split, or an argument is no text.
    """
    if isinstance(command, str):
        if not command.strip():
            raise InvalidOptionError("command='' is not valid: there is nothing to run.")
        if shell:
            words: Sequence[str] = ("/bin/sh", "-c", command)
        else:
            try:
                words = shlex.split(command)
            except ValueError as error:
                raise InvalidOptionError(
                    f"command={command!r} cannot be split as a shell splits words: {error}. Close "
                    f"the quotation, or pass a list."
                ) from None
    elif shell:
        raise InvalidOptionError(
            "shell=True takes a string: a shell would run the first word of a list alone. Pass a "
            "string, or leave shell out."
        )
    else:
        words = command
    if not isinstance(words, (list, tuple)) or not words or not words[0]:
        raise InvalidOptionError(
            f"command={command!r} is not valid: it takes a string, or a list of at least the program."
        )
    for word in words:
        if not isinstance(word, str) or "\0" in word:
            raise InvalidOptionError(
                f"command holds {word!r}: an argument is a string without NUL characters. Convert it "
                f"with str() or os.fspath()."
            )
    return tuple(to_bytes("argument", word) for word in words)


def user_bytes(user: str) -> bytes:
    """Give a user as the seam takes it.

    Raises:
        InvalidOptionError: it is no printable text.
    """
    if not isinstance(user, str) or not user or not user.isprintable():
        raise InvalidOptionError(
            f"user={user!r} is not valid: it takes 'name', 'uid', 'name:group' or 'uid:gid'."
        )
    return user.encode()


def input_bytes(stdin: bytes | str | None) -> bytes | None:
    """Give a program's input; text as UTF-8.

    Raises:
        InvalidOptionError: it is neither bytes nor text.
    """
    if stdin is None or isinstance(stdin, bytes):
        return stdin
    if isinstance(stdin, str):
        return to_bytes("stdin", stdin)
    if isinstance(stdin, (bytearray, memoryview)):
        return bytes(stdin)
    raise InvalidOptionError(
        f"stdin of type {type(stdin).__name__} is not valid: it takes bytes or str, the whole input. "
        f"Read a file's contents first, or upload it and redirect in a shell."
    )


def find_codec(encoding: str) -> codecs.CodecInfo:
    """Give a codec by its name.

    Raises:
        InvalidOptionError: there is none.
    """
    try:
        return codecs.lookup(encoding)
    except (LookupError, TypeError):
        raise InvalidOptionError(
            f"encoding={encoding!r} is not known to Python. Use 'utf-8', or one of the standard "
            f"encodings that its module codecs lists."
        ) from None


def mode_for(target: Path) -> int:
    """Give the mode of a file that is there, else that of a new one."""
    try:
        return target.stat().st_mode & 0o7777
    except FileNotFoundError:
        umask = _umask()
        return 0o666 & ~umask


def _umask() -> int:
    """Read the process's umask; setting it to read it would be seen by other threads."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
