from __future__ import annotations

import importlib.util
import struct
import subprocess
from pathlib import Path

import pytest

from ray_backend.sandbox.agent import build, constants

MACHINES = {"x86_64": 0x3E, "aarch64": 0xB7}
PT_INTERP = 3


def test_ships_a_static_program_for_each_architecture(tmp_path: Path):
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("the package ziglang is not installed")
    for target, path in zip(build.TARGETS, build.build(tmp_path), strict=True):
        data = path.read_bytes()
        assert path.name == build.binary_name(target)
        assert data[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", data, 18)[0] == MACHINES[target]
        start, size, count = struct.unpack_from("<Q14xHH", data, 32)
        kinds = [struct.unpack_from("<I", data, start + size * i)[0] for i in range(count)]
        assert PT_INTERP not in kinds, "it would need a loader in the image"
        assert len(data) < 200_000
        assert path.stat().st_mode & 0o111


def test_tells_its_version(checked_agent: Path):
    done = subprocess.run([checked_agent, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(constants.PROTOCOL_VERSION)


def test_refuses_arguments_that_it_does_not_know(checked_agent: Path):
    done = subprocess.run([checked_agent, "--what"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--what" in done.stderr


def test_a_compiler_error_is_shown(tmp_path: Path):
    wrong = tmp_path / "wrong.c"
    wrong.write_text("int main(void) { return nothing; }\n")
    with pytest.raises(build.BuildError, match="nothing"):
        build.build_checked(tmp_path / "out", [wrong])
    with pytest.raises(build.BuildError, match="no such compiler"):
        build.build_checked(tmp_path / "out", [wrong], cc="no-such-cc")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.c"]
