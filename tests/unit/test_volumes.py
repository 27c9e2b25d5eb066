"""Volumes on nodes: where they are removed, and links that a killed process left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apothic.errors import BackendError
from ray_backend import volumes
from ray_backend.actors.failure import RemoteFailure
from ray_backend.actors.mounts import Mounts
from tests.support import as_root
from tests.unit.memory_registry import MemoryRegistry

# -- removing ----------------------------------------------------------------------------------------


class Nodes:
    """Stands for the cluster's nodes: each has a shared root or none, or cannot be asked."""

    def __init__(self, *names: str, roots: dict[str, Path], lost: tuple[str, ...] = ()) -> None:
        self.names = names
        self.roots = roots
        self.lost = lost
        self.asked: list[str] = []

    def live(self) -> list[str]:
        return list(self.names)

    def have_shared_root(self, nodes: list[str]) -> dict[str, bool | str]:
        self.asked += nodes
        return {node: "lost" if node in self.lost else node in self.roots for node in nodes}

    def remove(self, name: str, backend: str, node: str | None) -> str | None:
        node = node or self.names[0]
        if backend == "vast_local":
            return None
        if node not in self.roots:
            return volumes.NO_ROOT
        shutil.rmtree(self.roots[node] / name, ignore_errors=True)
        return None


@pytest.fixture
def registry() -> MemoryRegistry:
    made = MemoryRegistry()
    made.put_volume("data", {"backend": "cloud_bucket", "size_gb": None})
    return made


def test_a_portable_volume_is_removed_where_there_is_the_shared_root(
    registry: MemoryRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    nodes = Nodes("a", "b", "c", roots={"c": tmp_path})
    assert volumes.delete(registry, "data", nodes)
    assert not (tmp_path / "data").exists()
    assert registry.list_volumes() == []
    assert capsys.readouterr().err == ""
    assert not volumes.delete(registry, "data", nodes)


def test_nobody_is_asked_where_the_first_node_has_the_shared_root(
    registry: MemoryRegistry, tmp_path: Path
) -> None:
    nodes = Nodes("a", "b", roots={"a": tmp_path, "b": tmp_path})
    assert volumes.delete(registry, "data", nodes)
    assert nodes.asked == []


def test_the_record_goes_where_no_node_has_a_shared_root(
    registry: MemoryRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert volumes.delete(registry, "data", Nodes("a", "b", roots={}))
    assert registry.list_volumes() == []
    assert "APOTHIC_SHARED_ROOT" in capsys.readouterr().err


def test_the_record_stays_where_a_node_cannot_be_asked(registry: MemoryRegistry) -> None:
    with pytest.raises(BackendError, match=r"node b .*lost"):
        volumes.delete(registry, "data", Nodes("a", "b", roots={}, lost=("b",)))
    assert registry.list_volumes() == ["data"]


# -- links -------------------------------------------------------------------------------------------

MOUNT = """
import sys, time
from ray_backend.actors.mounts import Mounts
from tests.unit.memory_registry import MemoryRegistry

mounts = Mounts(MemoryRegistry(), "n")
mounts.mount({"volume": "old", "backend": sys.argv[1], "path": sys.argv[2]})
print("mounted", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APOTHIC_VOLUME_ROOT", str(tmp_path / "local"))
    monkeypatch.setenv("APOTHIC_SHARED_ROOT", str(tmp_path / "shared"))


@pytest.mark.parametrize("new", ["cloud_bucket", "vast_local"])
@pytest.mark.parametrize("old", ["cloud_bucket", "vast_local"])
def test_a_link_of_a_killed_process_is_replaced(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "mount"
    wanted = {"volume": "new", "backend": new, "path": str(path)}
    mounts = Mounts(MemoryRegistry(), "n")
    with subprocess.Popen(
        [sys.executable, "-c", MOUNT, old, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "mounted\n"
            with pytest.raises(RemoteFailure, match="is in use"):
                mounts.mount(wanted)
            mounts.release()
        finally:
            process.send_signal(signal.SIGKILL)
    assert path.is_symlink()
    mounts.mount(wanted)
    assert Path(os.readlink(path)).name == "new"
    mounts.release()
    assert not path.is_symlink()


def test_links_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mount"
    path.symlink_to(tmp_path / "elsewhere")
    mounts = Mounts(MemoryRegistry(), "n")
    with pytest.raises(RemoteFailure, match="not ours"):
        mounts.mount({"volume": "new", "backend": "cloud_bucket", "path": str(path)})
    mounts.release()
    assert Path(os.readlink(path)) == tmp_path / "elsewhere"


def test_who_comes_and_goes_at_once_has_the_link(tmp_path: Path) -> None:
    path = tmp_path / "mount"

    def come_and_go(_: int) -> None:
        mounts = Mounts(MemoryRegistry(), "n")
        for _ in range(150):
            mounts.mount({"volume": "data", "backend": "cloud_bucket", "path": str(path)})
            assert path.is_symlink()
            mounts.release()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, range(4)))
    assert not path.is_symlink()


@as_root
def test_a_link_of_another_user_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own is for its user alone
        root, path = Path(place), Path(place, "mount")
        root.chmod(0o755)
        for variable in ("APOTHIC_VOLUME_ROOT", "APOTHIC_SHARED_ROOT"):
            monkeypatch.setenv(variable, str(root))
        wanted = {"volume": "data", "backend": "cloud_bucket", "path": str(path)}
        mounts, others = Mounts(MemoryRegistry(), "n"), Mounts(MemoryRegistry(), "n")
        mounts.mount(wanted)
        nobody = 65534
        os.seteuid(nobody)
        try:
            others.mount(wanted)
            os.seteuid(0)
            mounts.release()
            os.seteuid(nobody)
            assert path.is_symlink()
            others.release()  # the last one, which may not remove it
        finally:
            os.seteuid(0)
        assert path.is_symlink()
        mounts.mount(wanted)
        mounts.release()
        assert not path.is_symlink()
