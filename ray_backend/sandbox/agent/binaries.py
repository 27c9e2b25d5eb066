"""The compiled agent, as it lies in the installed package."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from apothic.errors import EnvironmentSetupError
from ray_backend.sandbox.agent.build import BIN, TARGETS, binary_name

__all__ = ["agent_binary", "agent_digest"]

_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}
"""What Docker's images, macOS and Windows call the same architectures."""


def agent_binary(machine: str) -> Path:
    """Give the agent for an architecture: a static program of about 100 KiB.

    Args:
        machine: as `platform.machine` or the Docker engine says it: ``x86_64``, ``amd64``,
            ``aarch64`` or ``arm64``, in any case.

    Raises:
        EnvironmentSetupError: there is none for this architecture, or this is a checkout in which
            it has not been built.
    """
    name = machine.lower()
    target = _ALIASES.get(name, name)
    if target not in TARGETS:
        raise EnvironmentSetupError(
            f"sandboxes have no agent for the architecture {machine!r}, only for "
            f"{', '.join(TARGETS)}; use a node with one of these"
        )
    path = BIN / binary_name(target)
    if not path.is_file():
        raise EnvironmentSetupError(
            f"the sandbox agent {path} is missing; in a checkout, build it with "
            "`python -m ray_backend.sandbox.agent.build` (needs the package ziglang) or install "
            "the checkout with pip, elsewhere install the package again; a job whose working_dir is "
            "the checkout leaves it out, as .gitignore says: add the folders apothic and ray_backend "
            "as py_modules"
        )
    return path


@functools.cache
def agent_digest(machine: str) -> str:
    """Give the SHA-256 of `agent_binary` in hex: what differs whenever the program does.

    Raises:
        EnvironmentSetupError: see `agent_binary`.
    """
    return hashlib.sha256(agent_binary(machine).read_bytes()).hexdigest()
