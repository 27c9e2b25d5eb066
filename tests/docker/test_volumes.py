from __future__ import annotations

from pathlib import Path

import pytest

from apothic.errors import SandboxEngineError
from apothic.volume import Volume
from ray_backend.directories import SHARED_ROOT_VARIABLE, volume_directory
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.container import BindMount
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.volumes import bind_volumes, check_same_directories
from tests.docker.support import run_inside


def test_the_files_that_classes_see(
    engine: Engine, owner: OwnerLabels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(SHARED_ROOT_VARIABLE, str(tmp_path))
    volumes = {
        "/data": Volume.vast_local("test-local", size_gb=1),
        "/cloud/deep": Volume.cloud("test-cloud"),
    }
    for volume in volumes.values():
        directory = volume_directory(volume.name, volume.backend)
        directory.mkdir(parents=True)
        (directory / "in").write_text(volume.name)
    mounts = bind_volumes(engine, volumes, owner)
    said = run_inside(
        engine,
        owner,
        "cat /data/in /cloud/deep/in; echo out > /data/out; ls -a /data",
        mounts=mounts,
    )
    assert said == "test-localtest-cloud.\n..\nin\nout\n"
    local = volume_directory("test-local", "vast_local")
    assert (local / "out").read_text() == "out\n"
    assert local.parent.stat().st_mode & 0o777 == 0o700


def test_no_shared_root(engine: Engine, owner: OwnerLabels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(SHARED_ROOT_VARIABLE, raising=False)
    with pytest.raises(SandboxEngineError, match="has no shared root"):
        bind_volumes(engine, {"/data": Volume.cloud("test-cloud")}, owner)


def test_none(engine: Engine, owner: OwnerLabels):
    assert bind_volumes(engine, {}, owner) == ()


def test_a_directory_that_the_engine_sees_otherwise(engine: Engine, owner: OwnerLabels):
    """Of a path that exists on one side only, as where Ray runs in a container."""
    with pytest.raises(SandboxEngineError, match=r"sees another .*docker run -v"):
        check_same_directories(engine, [BindMount("/none/such", "/data")], owner)
