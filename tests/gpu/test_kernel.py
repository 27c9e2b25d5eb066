"""An instance with ``gpu_count=1`` has a GPU to itself, and a kernel runs on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import vector_add
from tests.gpu.vector_add import COUNT, CudaError, device_count
from tests.support import driver_env, read_line, running

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


@pytest.fixture
def gpus() -> int:
    """Count the machine's GPUs; skip where there is none, or no driver for them."""
    try:
        count = device_count()
    except OSError as error:
        pytest.skip(f"no NVIDIA driver here: {error}")
    except CudaError as error:
        pytest.skip(f"the NVIDIA driver finds no GPU: {error}")
    if count == 0:
        pytest.skip("the NVIDIA driver counts no GPU")
    return count


def test_a_kernel_runs_on_the_gpu_of_an_instance(gpus: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(Path(vector_add.__file__))],
        env=driver_env(None),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with running(process):
        found = json.loads(read_line(process, "FOUND"))
        assert found["sum"] == [1.5 * number for number in range(COUNT)]
        assert len(found["assigned"]) == 1
        assert found["seen"] == 1
        process.communicate(timeout=60)
    assert process.returncode == 0
