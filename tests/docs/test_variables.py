"""Every environment variable that the packages read is named in the guide or the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ray_backend import readiness

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
VARIABLE = re.compile(r"APOTHIC_[A-Z0-9_]+")


def variables_read() -> set[str]:
    """Give the texts in the packages' code that are the name of a variable and nothing more."""
    found = set()
    for package in (ROOT / "apothic", ROOT / "ray_backend"):
        for module in package.rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= {node.value} & set(VARIABLE.findall(node.value))
        for source in package.rglob("*.[ch]"):
            found |= set(re.findall(rf'"({VARIABLE.pattern})"', source.read_text()))
    return found


def variables_named() -> set[str]:
    return {name for page in PAGES for name in VARIABLE.findall(page.read_text())}


def test_what_is_read_is_named_and_the_other_way_round() -> None:
    assert readiness.PLACEMENT_TIMEOUT_VARIABLE in variables_read()
    assert variables_read() == variables_named()


def test_the_wait_for_room_is_as_long_as_documented() -> None:
    for page in ("clusters.md", "errors.md"):
        text = (ROOT / "docs" / page).read_text()
        [line] = [line for line in text.splitlines() if " 600 s" in line]
        assert f" {readiness.PLACEMENT_TIMEOUT_S:g} s" in line
        assert readiness.PLACEMENT_TIMEOUT_VARIABLE in line
