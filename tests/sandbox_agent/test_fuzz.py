"""A short run of the parser's fuzz target; the long ones are for whoever changes the parser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ray_backend.sandbox.agent import build

TARGET = Path(__file__).with_name("fuzz_wire.c")
WIRE = Path(build.__file__).with_name("wire.c")
RUNS = 20_000


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_frames(tmp_path_factory: pytest.TempPathFactory, seed: int):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) on PATH")
    program = tmp_path_factory.getbasetemp() / "fuzz-wire"
    if not program.exists():
        build.build_checked(program, [TARGET, WIRE], options=["-DSTANDALONE"])
    command = [program, str(RUNS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{RUNS} runs\n"), done.stderr


def test_libfuzzer(tmp_path: Path):
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("no clang on PATH; the mutations above run without it")
    program = tmp_path / "fuzz-wire"
    build.build_checked(program, [TARGET, WIRE], cc=clang, options=["-fsanitize=fuzzer"])
    command = [program, "-runs=50000", "-seed=1", "-max_len=4096"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
