r"""A short run of the parser's fuzz target. Long ones, with clang, after a change of the parser::

    clang -g -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -Iray_backend/sandbox/agent \
        tests/sandbox_agent/fuzz_wire.c ray_backend/sandbox/agent/wire.c -o /tmp/fuzz && /tmp/fuzz
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ray_backend.sandbox.agent import build

TARGET = Path(__file__).with_name("fuzz_wire.c")
WIRE = Path(build.__file__).with_name("wire.c")
RUNS = 20_000


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_frames(compiler: str, tmp_path_factory: pytest.TempPathFactory, seed: int):
    program = tmp_path_factory.getbasetemp() / "fuzz-wire"
    if not program.exists():
        build.build_checked(program, [TARGET, WIRE], cc=compiler, options=["-DSTANDALONE"])
    command = [program, str(RUNS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{RUNS} runs\n"), done.stderr
