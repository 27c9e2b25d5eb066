from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from apothic.errors import EnvironmentSetupError
from ray_backend.sandbox.agent import binaries, build, constants
from ray_backend.sandbox.agent.binaries import agent_binary, agent_digest

MACHINES = {"x86_64": 0x3E, "aarch64": 0xB7}
PT_INTERP = 3


@pytest.mark.usefixtures("shipped_agent")
def test_ships_a_static_program_for_each_architecture():
    for target in build.TARGETS:
        path = agent_binary(target)
        data = path.read_bytes()
        assert data[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", data, 18)[0] == MACHINES[target]
        start, size, count = struct.unpack_from("<Q14xHH", data, 32)
        kinds = [struct.unpack_from("<I", data, start + size * i)[0] for i in range(count)]
        assert PT_INTERP not in kinds, "it would need a loader in the image"
        assert len(data) < 200_000
        assert path.stat().st_mode & 0o111
        assert agent_digest(target) == hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("shipped_agent")
def test_architectures_by_any_of_their_names():
    assert agent_binary("AMD64") == agent_binary("x86_64")
    assert agent_binary("arm64") == agent_binary("aarch64")
    assert agent_digest("arm64") != agent_digest("amd64")
    with pytest.raises(EnvironmentSetupError, match=r"riscv64.*x86_64, aarch64"):
        agent_binary("riscv64")


def test_a_missing_binary_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(binaries, "BIN", tmp_path)
    with pytest.raises(EnvironmentSetupError, match=r"-m ray_backend\.sandbox\.agent\.build"):
        agent_binary("x86_64")


@pytest.mark.usefixtures("shipped_agent")
def test_what_is_current_is_not_built_again(tmp_path: Path):
    assert build.is_current()
    before = [path.stat().st_mtime_ns for path in build.build()]
    assert [path.stat().st_mtime_ns for path in build.build()] == before
    assert not build.is_current(tmp_path)
    for name in (build.STAMP, *map(build.binary_name, build.TARGETS)):
        shutil.copy(build.BIN / name, tmp_path)
    assert build.is_current(tmp_path)
    (tmp_path / build.STAMP).write_text("of other sources\n")
    assert not build.is_current(tmp_path)
    shutil.copy(build.BIN / build.STAMP, tmp_path)
    (tmp_path / build.binary_name("aarch64")).unlink()
    assert not build.is_current(tmp_path)


@pytest.mark.usefixtures("shipped_agent")
def test_another_checkout_takes_what_was_compiled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second, cache = tmp_path / "first", tmp_path / "second", tmp_path / "cache"
    build.build(first, cache)
    with monkeypatch.context() as changes:
        changes.setattr(build, "_compile", None)
        paths = build.build(second, cache)
    assert build.is_current(second)
    for path in paths:
        assert path.read_bytes() == (first / path.name).read_bytes(), "not the same bytes"
        assert path.stat().st_mode & 0o111
    cache.joinpath("in the way").touch()
    assert build.build(tmp_path / "third", cache / "in the way")[0].exists()


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
