"""Each page's Python blocks run as one program; what a ``print`` is said to print, it prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from apothic import cli
from tests.support import driver_env

ROOT = Path(__file__).parents[2]
GUIDE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in [*GUIDE, ROOT / "README.md"] if "```python" in page.read_text()]
# What stands for the images of a registry, which tests do without.
PRESENT_IMAGES = {
    "python:3.12-slim": "apothic-test-debian",
    "busybox:stable": "apothic-test-busybox",
}
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n```python\n.*?```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Give the code blocks of a page, those left out that say why they are not run."""
    text = NOT_RUN.sub("", page.read_text())
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.ray
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks(
    page: Path, ray_cluster: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = "\n".join(blocks(page, "python"))
    for image, present in PRESENT_IMAGES.items():
        if image in source:
            request.getfixturevalue("docker_engine")
            source = source.replace(image, present)
    program = tmp_path / f"{page.stem.replace('-', '_')}.py"
    program.write_text(source)
    done = subprocess.run(
        [sys.executable, str(program)],
        env=driver_env(ray_cluster),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", source, re.MULTILINE)
    # Ray adds lines of its own, in colour, where a worker is killed.
    printed = [line for line in done.stdout.splitlines() if not line.startswith("\x1b")]
    assert printed == promised


@pytest.mark.parametrize("page", [*GUIDE, ROOT / "README.md"], ids=lambda page: page.stem)
def test_commands_and_links(page: Path) -> None:
    """Every `apothic` command is one, every `make` target and every linked file exists."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [line.strip() for block in blocks(page, "(?:sh)?") for line in block.splitlines()]
    for line in lines:
        if line.startswith("apothic "):
            cli._parser().parse_args(shlex.split(line.partition("<")[0])[1:])
        if line.startswith("make "):
            assert line.split()[1] in targets
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_pages_are_listed() -> None:
    listed = set(re.findall(r"\((\S+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed == {page.name for page in GUIDE} - {"README.md"}


def test_the_picture_shows_the_quickstart() -> None:
    """Whoever changes what the quickstart says draws the picture again (docs/picture.py)."""
    source = (ROOT / "examples" / "quickstart.py").read_text()
    titles = re.findall(r'^    title\("(.+)"\)$', source.partition("def attach")[0], re.MULTILINE)
    picture = (ROOT / "docs" / "quickstart.svg").read_text()
    assert re.findall(r'<text class="title"[^>]*>(.*)</text>', picture) == titles
