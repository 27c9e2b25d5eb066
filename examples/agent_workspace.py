"""What a coding agent does all day: write a package, run its tests, patch it, run them again.

    python examples/agent_workspace.py

It needs a Docker engine where Ray runs. The image has Python and pytest: one is made from Docker Hub's
at the first run, or ``APOTHIC_EXAMPLE_IMAGE`` names one that is there. Nothing is cloned or fetched
while the session runs: it has no network.
"""

from __future__ import annotations

import os
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from apothic import App, Image, SandboxSession

PRESENT = os.environ.get("APOTHIC_EXAMPLE_IMAGE")
IMAGE = (
    Image.from_registry(PRESENT)
    if PRESENT
    else Image.debian_slim(python_version="3.12").pip_install("pytest")
)

app = App("agent-workspace")
workspace = app.sandbox(name="workspace", image=IMAGE, cpu=1, memory_mb=512, timeout_s=60)

PACKAGE = {
    "roman/__init__.py": '''"""Roman numerals."""

from roman.numerals import from_roman, to_roman

__all__ = ["from_roman", "to_roman"]
''',
    "roman/numerals.py": '''"""Integers to Roman numerals and back."""

STEPS = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}


def to_roman(number: int) -> str:
    """Write a number from 1 to 3999 in Roman numerals."""
    text = ""
    for letters, value in STEPS.items():
        count, number = divmod(number, value)
        text += letters * count
    return text


def from_roman(text: str) -> int:
    """Read a number in Roman numerals."""
    number = 0
    for letters, value in STEPS.items():
        while text.startswith(letters):
            text, number = text[len(letters) :], number + value
    if text:
        raise ValueError(f"no Roman numeral: {text!r}")
    return number
''',
    "tests/test_numerals.py": """import pytest

from roman import from_roman, to_roman

KNOWN = [(1, "I"), (3, "III"), (4, "IV"), (9, "IX"), (14, "XIV"), (1994, "MCMXCIV"), (2026, "MMXXVI")]


@pytest.mark.parametrize(("number", "text"), KNOWN)
def test_known_numbers(number, text):
    assert to_roman(number) == text


def test_there_and_back():
    assert all(from_roman(to_roman(number)) == number for number in range(1, 4000))


def test_no_numeral():
    with pytest.raises(ValueError, match="no Roman numeral"):
        from_roman("MMXXVI AD")
""",
}

# What a model would answer to the failing tests.
BEFORE = 'STEPS = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}'
AFTER = """STEPS = {
    **{"M": 1000, "CM": 900, "D": 500, "CD": 400, "C": 100, "XC": 90, "L": 50, "XL": 40},
    **{"X": 10, "IX": 9, "V": 5, "IV": 4, "I": 1},
}"""

TESTS = [
    "python3",
    "-m",
    "pytest",
    "-q",
    "--tb=line",
    "-p",
    "no:cacheprovider",
    "--junitxml=report.xml",
]


def run_tests(session: SandboxSession) -> int | None:
    """Show the tests' output line by line as it is written; give their exit status."""
    status, unfinished = None, ""
    for event in session.exec_stream(TESTS):  # pieces of any length, then one event of kind "exit"
        *lines, unfinished = (unfinished + event.text).split("\n")
        for line in lines:
            print(f"  | {line}", flush=True)
        status = event.returncode
    return status


def main() -> int | None:
    """Play the agent; give the exit status of the last run of the tests."""
    env = {"PYTHONDONTWRITEBYTECODE": 1}
    with workspace.create(cwd="/workspace", env=env) as session:
        print(f"a session of {session.sandbox.label} in {session.pwd()}")
        for path, content in PACKAGE.items():
            session.write_text(path, content, make_parents=True)
        print(f"wrote {', '.join(PACKAGE)}; its tests say:")
        run_tests(session)

        source = session.read_text("roman/numerals.py")
        session.write_text("roman/numerals.py", source.replace(BEFORE, AFTER))
        print("patched roman/numerals.py; its tests now say:")
        status = run_tests(session)

        with tempfile.TemporaryDirectory() as folder:
            report = session.download_file("report.xml", Path(folder, "report.xml"))
            suite = ET.parse(report).getroot()[0]
            print(
                f"downloaded {report.name}, {report.stat().st_size} bytes: "
                f"{suite.get('tests')} tests, {suite.get('failures')} failed"
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
