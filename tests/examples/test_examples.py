"""Each example runs as a process of its own, and says what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import driver_env

pytestmark = pytest.mark.ray

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart() -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")],
        env=driver_env(None),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "socketserver" in run.stdout
    assert "ran in 2 containers" in run.stdout
    assert "remote OperationalError: unterminated string" in run.stdout
    assert "same process: True" in run.stdout
    assert run.stdout.count("exit hooks that ran: ['close_index'") == 2
