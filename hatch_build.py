"""The build hook: every wheel, an editable one too, carries the sandbox agent for both machines."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = "ray_backend/sandbox/agent/build.py"


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles the agent where the sources lie; at once when it is there and they are the same."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files of the wheel are collected.

        Raises:
            RuntimeError: the compiler refused.
        """
        runpy.run_path(str(Path(self.root, BUILD)))["build"]()
