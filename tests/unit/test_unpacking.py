"""Files of images on a node, which others read while they are unpacked again."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from apothic import Image
from ray_backend.actors import services as module
from ray_backend.actors.services import WorkerServices

DIGEST = "d" * 64
PYTHON = "apothic:python"


class Node:
    """Stands for a worker's process on a node: unpacks what `content` is."""

    def __init__(self, session: Path) -> None:
        self.session = session
        self.content = b""
        self._services = WorkerServices.__new__(WorkerServices)  # without a cluster
        self._services._fetch = lambda _: self.content  # type: ignore[method-assign]

    def unpack(self, source: Path, remote: str | Path) -> None:
        image = Image.debian_slim()
        image = image.add_local_dir(source) if source.is_dir() else image.add_local_file(source)
        (self.content,) = image.pack()[1].values()
        self.unpack_again(remote)

    def unpack_again(self, remote: str | Path) -> None:
        self._services._unpack(str(remote), DIGEST)

    @property
    def python(self) -> Path:
        return self.session / "apothic" / "python" / DIGEST[:32]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    session = tmp_path / "session"
    monkeypatch.setattr(module, "session_directory", lambda: session)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Node(session)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    (made / "inner").mkdir(parents=True)
    (made / "a.txt").write_text("old content of a")
    (made / "inner" / "run.sh").write_text("#!/bin/sh\n")
    (made / "inner" / "run.sh").chmod(0o755)
    (made / "inner" / "link").symlink_to("../a.txt")
    os.link(made / "a.txt", made / "same.txt")
    return made


def tree(root: Path) -> dict[str, str]:
    """Give every file, with what is in it."""
    return {str(at.relative_to(root)): at.read_text() for at in root.rglob("*") if at.is_file()}


def inodes(root: Path) -> dict[str, int]:
    return {str(at.relative_to(root)): at.lstat().st_ino for at in root.rglob("*")}


def test_a_directory_is_as_it_was(node: Node, source: Path, tmp_path: Path) -> None:
    for remote, target in (
        (tmp_path / "there", tmp_path / "there"),
        (f"{PYTHON}/package", node.python / "package"),
    ):
        node.unpack(source, remote)
        assert tree(target) == tree(source)
        assert (target / "inner" / "run.sh").stat().st_mode & 0o777 == 0o755
        assert os.readlink(target / "inner" / "link") == "../a.txt"
    assert sys.path[0] == str(node.python)


def test_who_reads_a_file_reads_it_to_its_end(node: Node, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    (target / "inner").mkdir(parents=True)
    (target / "inner" / "kept").write_text("kept")
    node.unpack(source, target)
    node.unpack(source / "a.txt", tmp_path / "alone")
    with (target / "a.txt").open() as one, (tmp_path / "alone").open() as other:
        (source / "a.txt").write_text("new")
        (source / "inner" / "link").unlink()
        (source / "inner" / "link").symlink_to("run.sh")
        node.unpack(source, target)
        node.unpack(source / "a.txt", tmp_path / "alone")
        assert one.read() == other.read() == "old content of a"
    assert tree(target) == {**tree(source), "inner/kept": "kept"}
    assert os.readlink(target / "inner" / "link") == "run.sh"
    assert (tmp_path / "alone").read_text() == "new"


@pytest.mark.parametrize("remote", ["there", f"{PYTHON}/package"])
def test_what_is_there_is_left_alone(
    node: Node, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str
) -> None:
    monkeypatch.chdir(tmp_path)
    target = node.python / "package" if remote.startswith(PYTHON) else tmp_path / remote
    node.unpack(source, remote)
    before, changed = inodes(target), (target / "a.txt").stat().st_ctime_ns
    node.unpack_again(remote)
    assert inodes(target) == before
    assert (target / "a.txt").stat().st_ctime_ns == changed
    node.unpack(source / "a.txt", f"{remote}.txt")
    single = target.with_name(target.name + ".txt")
    before_ns = single.stat().st_ctime_ns
    node.unpack_again(f"{remote}.txt")
    assert single.stat().st_ctime_ns == before_ns


def test_of_a_package_that_cannot_be_unpacked_nothing_is_there(node: Node) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        top = tarfile.TarInfo(".")
        top.type = tarfile.DIRTYPE
        top.mode = 0o755
        archive.addfile(top)
        archive.addfile(tarfile.TarInfo("./good.py"))
        archive.addfile(tarfile.TarInfo("../outside.py"))
    node.content = packed.getvalue()
    with pytest.raises(tarfile.FilterError):
        node.unpack_again(f"{PYTHON}/package")
    assert [*node.session.rglob("*.py"), *node.python.glob("*")] == []
