"""A recipe (`Image`) as the text of a Dockerfile, for classes and for sandboxes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from apothic.errors import InvalidOptionError

if TYPE_CHECKING:
    from apothic.image import Image, ImageStep

__all__ = ["CONTEXT_DIRECTORY", "base_of", "base_reference", "dockerfile_of", "is_build_context"]

CONTEXT_DIRECTORY = ".apothic"
"""Where in a build context the files of ``add`` steps lie, each under its digest."""
_PYTHON_SOURCES = "apothic:python"
_PYTHON_DIRECTORY = "/opt/apothic-python"
_FROM = re.compile(r"^[ \t]*FROM[ \t]", re.IGNORECASE | re.MULTILINE)


def base_of(image: Image) -> str:
    """Give the image that a recipe starts from; a Dockerfile of its own may name another."""
    return base_reference(image.base, image.python_version)


def base_reference(base: str | None, python_version: str | None) -> str:
    """Give the reference of the image that a recipe's ``base`` and ``python_version`` name."""
    return base or f"python:{python_version or '3.11'}-slim"


def dockerfile_of(image: Image, *, complete: bool = False) -> str:
    """Write a recipe as a Dockerfile.

    A Dockerfile with a ``FROM`` of its own that nothing but added files precedes starts the image:
    the files are then its build context, and ``base`` is not asked for.

    Args:
        image: the recipe, its files packed when ``complete``.
        complete: write variables, files and the working directory too, which a class sets at run
            time.

    Raises:
        InvalidOptionError: when ``complete`` and a variable holds a line break, which no Dockerfile
            can say.
    """
    shell = ["/bin/sh", "-c"]
    lines = [] if _own_from(image) is not None else [f"FROM {base_of(image)}"]
    for step in image.steps:
        if step.kind == "apt":
            names = " ".join(step.values)
            lines.append(
                f"RUN apt-get update && apt-get install -y --no-install-recommends {names} "
                f"&& rm -rf /var/lib/apt/lists/*"
            )
        elif step.kind == "run":
            lines.extend(_run(command, shell) for command in step.values)
        elif step.kind == "shell":
            shell = step.values[0].split()
            lines.append(f"SHELL {json.dumps(shell)}")
        elif step.kind == "pip":
            lines.append(f"RUN pip install --no-cache-dir {_quoted(step.values)}")
        elif step.kind == "uv":
            lines.append(
                f"RUN pip install --no-cache-dir uv && uv pip install --system "
                f"{_quoted(step.values)}"
            )
        elif step.kind == "dockerfile":
            lines.extend(step.values)
        elif complete:
            lines.extend(_complete_step(image, step))
    return "\n".join(lines) + "\n"


def is_build_context(image: Image, step: ImageStep) -> bool:
    """Tell whether an ``add`` step gives the files that a Dockerfile with its own ``FROM`` copies."""
    own = _own_from(image)
    return own is not None and any(step is early for early in image.steps[:own])


def _own_from(image: Image) -> int | None:
    """Give the index of the Dockerfile step that starts the image, if one does."""
    for index, step in enumerate(image.steps):
        if step.kind == "dockerfile":
            return index if _FROM.search(step.values[0]) else None
        if step.kind != "add":
            return None
    return None


def _complete_step(image: Image, step: ImageStep) -> Iterable[str]:
    if step.kind == "env":
        for name, value in sorted(step.variables.items()):
            yield f"ENV {name}={_literal(name, value)}"
    elif step.kind == "workdir":
        yield f"WORKDIR {_unexpanded(step.values[0])}"
    elif step.kind == "add" and step.remote is not None and not is_build_context(image, step):
        remote = step.remote.rstrip("/") or "/"  # with a final slash a file keeps its source's name
        if remote.startswith(_PYTHON_SOURCES):
            remote = _PYTHON_DIRECTORY + remote.removeprefix(_PYTHON_SOURCES)
            yield f'ENV PYTHONPATH="{_PYTHON_DIRECTORY}${{PYTHONPATH:+:$PYTHONPATH}}"'
        paths = [f"{CONTEXT_DIRECTORY}/{step.digest}", _unexpanded(remote)]
        yield f"COPY {json.dumps(paths)}"


def _run(command: str, shell: list[str]) -> str:
    """Give the instruction; a command of several lines must not end at the first one."""
    return f"RUN {json.dumps([*shell, command])}" if "\n" in command else f"RUN {command}"


def _quoted(words: Iterable[str]) -> str:
    return " ".join(map(shlex.quote, words))


def _unexpanded(text: str) -> str:
    """Keep the engine from putting variables in."""
    return text.replace("\\", "\\\\").replace("$", "\\$")


def _literal(name: str, value: str) -> str:
    if "\n" in value or "\r" in value:
        raise InvalidOptionError(
            f"image variable {name}={value!r} holds a line break, which an image cannot take. Give "
            f"it to the session or the exec: session.set_env({name}=…)."
        )
    escaped = _unexpanded(value).replace('"', '\\"')
    return f'"{escaped}"'
