"""Files and directories: contents, names, what is kept on overwriting, errors."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from apothic import SandboxSession
from apothic.errors import (
    InvalidOptionError,
    SandboxFileError,
    SandboxFileExistsError,
    SandboxFileNotFoundError,
    SandboxIsADirectoryError,
    SandboxNoSpaceError,
    SandboxNotADirectoryError,
)
from apothic.session_calls import PART_BYTES
from tests.conformance.sandboxes.base import SandboxSuite

SIZES = [0, 1, 4095, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 12345]
ODD_NAMES = [
    "with space", "line\nbreak", "-rf", "--", "'quotes\"", "$HOME *", "ünï", "\\back", "\udcff\udc80",
    "x" * 255, "...", " ", "tab\t", "\x01",
]  # fmt: skip
BIG_BYTES = 256 * 1024 * 1024


def mode_of(session: SandboxSession, path: str) -> str:
    return session.exec(["stat", "-c", "%a %i %h", path]).check().stdout.strip()


class FileConformance(SandboxSuite):
    # -- contents -------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", SIZES)
    def test_bytes_round_trip(self, session: SandboxSession, tmp_path: Path, size: int) -> None:
        data = os.urandom(size)
        path = f"{session.pwd()}/file"
        assert session.write_bytes("file", data) == path
        assert session.read_bytes("file") == data
        assert session.read_bytes(path) == data
        local = tmp_path / "in"
        local.write_bytes(data)
        assert session.upload_file(local, "uploaded") == f"{session.pwd()}/uploaded"
        assert session.read_bytes("uploaded") == data
        assert session.download_file("uploaded", tmp_path / "out") == tmp_path / "out"
        assert (tmp_path / "out").read_bytes() == data
        assert sorted(os.listdir(tmp_path)) == ["in", "out"]

    @pytest.mark.parametrize("size", [10, PART_BYTES * 2])
    def test_append(self, session: SandboxSession, size: int) -> None:
        first, second = os.urandom(size), os.urandom(size)
        session.write_bytes("log", first, append=True)
        session.write_bytes("log", second, append=True)
        assert session.read_bytes("log") == first + second

    def test_overwriting_with_less(self, session: SandboxSession) -> None:
        for size in (PART_BYTES * 2, 1000, 0):
            session.write_bytes("file", b"x" * size)
            assert session.read_bytes("file") == b"x" * size

    def test_kinds_of_bytes(self, session: SandboxSession) -> None:
        for content in (b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4]):
            session.write_bytes("file", content)
            assert session.read_bytes("file") == b"abc"
        import array

        session.write_bytes("file", memoryview(array.array("i", [1, 2])))
        assert len(session.read_bytes("file")) == 8
        for bad in ("text", None, 5, [1]):
            with pytest.raises(InvalidOptionError, match="write_text"):
                session.write_bytes("file", bad)

    def test_text(self, session: SandboxSession) -> None:
        text = "zeile\r\nlinie\nü😀\0"
        assert session.write_text("file", text) == f"{session.pwd()}/file"
        assert session.read_text("file") == text
        assert session.read_bytes("file") == text.encode()
        session.write_text("latin", "ü", encoding="latin-1")
        assert session.read_bytes("latin") == b"\xfc"
        assert session.read_text("latin", encoding="latin-1") == "ü"
        session.write_text("latin", "ß", encoding="latin-1", append=True)
        assert session.read_text("latin", encoding="latin-1") == "üß"

    def test_text_that_cannot_be(self, session: SandboxSession) -> None:
        session.write_bytes("file", b"\xff")
        with pytest.raises(UnicodeDecodeError):
            session.read_text("file")
        with pytest.raises(UnicodeEncodeError):
            session.write_text("file", "ü", encoding="ascii")
        with pytest.raises(InvalidOptionError, match="no-such"):
            session.read_text("file", encoding="no-such")
        with pytest.raises(InvalidOptionError, match="no-such"):
            session.write_text("file", "x", encoding="no-such")
        with pytest.raises(InvalidOptionError, match="write_bytes"):
            session.write_text("file", b"bytes")
        assert session.read_bytes("file") == b"\xff"

    def test_a_big_file_in_constant_memory(self, session: SandboxSession, tmp_path: Path) -> None:
        piece = os.urandom(1024 * 1024)
        digest = hashlib.sha256()
        with open(tmp_path / "big", "wb") as file:
            for _ in range(BIG_BYTES // len(piece)):
                file.write(piece)
                digest.update(piece)
        tracemalloc.start()
        try:
            session.upload_file(tmp_path / "big", "big")
            session.download_file("big", tmp_path / "back")
            assert tracemalloc.get_traced_memory()[1] < 64 * 1024 * 1024
        finally:
            tracemalloc.stop()
        back = hashlib.sha256()
        with open(tmp_path / "back", "rb") as file:
            while found := file.read(1 << 20):
                back.update(found)
        assert back.digest() == digest.digest()

    def test_files_without_a_size(self, session: SandboxSession) -> None:
        assert b"Linux" in session.read_bytes("/proc/version")
        assert session.read_bytes("/dev/null") == b""
        session.write_bytes("/dev/null", b"gone")
        session.write_bytes("/dev/null", b"gone", append=True)

    # -- names ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
    def test_odd_names(self, session: SandboxSession, tmp_path: Path, name: str) -> None:
        assert (
            session.write_text(name, name[:1] + "content", encoding="utf-16")
            == (f"{session.pwd()}/{name}")
            if "\udcff" not in name
            else session.write_text(name, "content")
        )
        assert session.exists(name)
        assert session.listdir() == [name]
        session.download_file(name, tmp_path / "out")
        session.upload_file(tmp_path / "out", name)
        shown = session.exec(["ls", "-1a", "--", f"./{name}"]).stdout_bytes
        assert os.fsencode(name) in shown or b"?" in shown or b"\\" in shown or b"$'" in shown
        directory = session.mkdir(f"dir/{name}")
        session.chdir(directory)
        assert session.pwd() == directory
        assert session.exec("touch here").ok
        assert session.listdir(directory) == ["here"]
        with pytest.raises(SandboxFileNotFoundError):
            session.read_bytes(name)

    @pytest.mark.parametrize("path", ["", "a\0b", None, 5, b"bytes", "\ud800"], ids=ascii)
    def test_bad_paths_are_refused(self, session: SandboxSession, path: object) -> None:
        calls: list[Callable[[], object]] = [
            lambda: session.exists(path),
            lambda: session.listdir(path),
            lambda: session.mkdir(path),
            lambda: session.chdir(path),
            lambda: session.read_bytes(path),
            lambda: session.write_bytes(path, b""),
            lambda: session.exec("true", cwd=path) if path is not None else session.chdir(path),
        ]
        for call in calls:
            with pytest.raises(InvalidOptionError):
                call()

    def test_paths_are_joined_and_absolute(self, session: SandboxSession) -> None:
        work = session.pwd()
        assert session.mkdir("a//b/./c/") == f"{work}/a/b/c"
        assert session.write_text("./a/./f", "1") == f"{work}/a/f"
        session.chdir("a/b")
        assert session.pwd() == f"{work}/a/b"
        assert session.read_text("../f") == "1"
        assert session.chdir("..") == f"{work}/a"
        assert session.chdir(".") == f"{work}/a"
        assert session.chdir("b/../../a") == f"{work}/a"
        assert session.chdir("/") == "/"
        assert session.chdir("../..") == "/"
        assert session.exists(work.lstrip("/"))

    def test_dots_after_a_link_lead_where_the_kernel_goes(self, session: SandboxSession) -> None:
        session.mkdir("far/away")
        session.write_text("far/file", "far")
        session.write_text("file", "near")
        session.exec("ln -s far/away link").check()
        assert session.read_text("link/../file") == "far"
        assert session.exec("cat link/../file").stdout == "far"

    # -- directories ----------------------------------------------------------------------------

    def test_listing(self, session: SandboxSession) -> None:
        for name in ("b", "a", ".hidden", "C"):
            session.write_text(name, "")
        assert session.listdir() == session.listdir(".") == [".hidden", "C", "a", "b"]
        assert session.listdir(session.mkdir("empty")) == []
        with pytest.raises(SandboxNotADirectoryError, match="/a'"):
            session.listdir("a")
        with pytest.raises(SandboxFileNotFoundError, match="absent"):
            session.listdir("absent")

    def test_listing_many(self, session: SandboxSession) -> None:
        session.exec("i=0; while [ $i -lt 3000 ]; do echo > file-$i; i=$((i+1)); done", shell=True)
        assert session.listdir() == sorted(f"file-{n}" for n in range(3000))

    def test_making_directories(self, session: SandboxSession) -> None:
        work = session.pwd()
        assert session.mkdir("a/b/c") == f"{work}/a/b/c"
        assert session.mkdir("a/b/c") == f"{work}/a/b/c"
        with pytest.raises(SandboxFileExistsError, match="a/b/c"):
            session.mkdir("a/b/c", exist_ok=False)
        with pytest.raises(SandboxFileNotFoundError, match="x/y"):
            session.mkdir("x/y", parents=False)
        session.write_text("file", "")
        with pytest.raises(SandboxFileExistsError, match="file"):
            session.mkdir("file")
        with pytest.raises(SandboxNotADirectoryError, match="file/below"):
            session.mkdir("file/below")
        session.exec("ln -s a link; ln -s nowhere dangling", shell=True).check()
        assert session.mkdir("link") == f"{work}/link"
        with pytest.raises(SandboxFileExistsError):
            session.mkdir("dangling")

    def test_existing(self, session: SandboxSession) -> None:
        session.write_text("file", "")
        session.exec("ln -s nowhere dangling; ln -s file link; ln -s loop loop", shell=True)
        assert session.exists()
        assert session.exists("file")
        assert session.exists("link")
        assert not session.exists("absent")
        assert not session.exists("absent/below")
        assert not session.exists("file/below")
        assert not session.exists("dangling")
        assert not session.exists("loop")

    def test_changing_the_directory(self, session: SandboxSession) -> None:
        session.write_text("file", "")
        with pytest.raises(SandboxNotADirectoryError, match="file"):
            session.chdir("file")
        with pytest.raises(SandboxFileNotFoundError, match="absent"):
            session.chdir("absent")
        assert session.pwd().endswith("/work")

    # -- overwriting ----------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [10, PART_BYTES + 10])
    @pytest.mark.parametrize("how", ["write", "append", "upload"])
    def test_mode_and_links_are_kept(
        self, session: SandboxSession, tmp_path: Path, how: str, size: int
    ) -> None:
        session.write_text("file", "old")
        session.exec("chmod 4751 file; ln file hard; ln -s file soft", shell=True).check()
        before = mode_of(session, "file")
        data = b"n" * size
        if how == "upload":
            (tmp_path / "in").write_bytes(data)
            session.upload_file(tmp_path / "in", "soft")
        else:
            session.write_bytes("soft", data, append=how == "append")
        assert session.exec("readlink soft").stdout == "file\n"
        # The kernel takes the set-user-id bit off a file that is written to.
        mode = before.replace("4751", "751")
        assert mode_of(session, "file") in (before, mode)
        assert mode_of(session, "hard") in (before, mode)
        assert session.read_bytes("hard") == (b"old" if how == "append" else b"") + data

    def test_a_link_that_leads_nowhere_is_written_through(self, session: SandboxSession) -> None:
        session.exec("ln -s made link").check()
        session.write_text("link", "x")
        assert session.read_text("made") == "x"

    def test_new_files_have_a_plain_mode(self, session: SandboxSession) -> None:
        session.write_text("file", "")
        assert mode_of(session, "file").split()[0] in ("644", "664", "600")

    # -- errors ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [10, PART_BYTES + 10])
    def test_what_cannot_be_written(
        self, session: SandboxSession, tmp_path: Path, size: int
    ) -> None:
        data = b"x" * size
        (tmp_path / "in").write_bytes(data)
        session.mkdir("dir")
        session.write_text("file", "")
        for write in (
            lambda path: session.write_bytes(path, data),
            lambda path: session.upload_file(tmp_path / "in", path),
        ):
            with pytest.raises(SandboxFileNotFoundError, match="make_parents=True") as caught:
                write("absent/file")
            assert caught.value.filename == f"{session.pwd()}/absent/file"
            assert caught.value.errno == errno.ENOENT
            with pytest.raises(SandboxIsADirectoryError, match="dir"):
                write("dir")
            with pytest.raises(SandboxNotADirectoryError, match="file/below"):
                write("file/below")
        assert session.listdir() == ["dir", "file"]

    def test_missing_parents_are_made_where_asked_for(
        self, session: SandboxSession, tmp_path: Path
    ) -> None:
        (tmp_path / "in").write_bytes(b"x" * (PART_BYTES + 1))
        session.write_text("a/b/file", "1", make_parents=True)
        session.write_bytes("c/d/file", b"2", make_parents=True)
        session.upload_file(tmp_path / "in", "e/f/file", make_parents=True)
        session.write_text("file", "3", make_parents=True)
        assert session.listdir() == ["a", "c", "e", "file"]
        with pytest.raises(SandboxNotADirectoryError):
            session.write_text("file/below/f", "", make_parents=True)
        session.download_file("a/b/file", tmp_path / "x" / "y", make_parents=True)
        assert (tmp_path / "x" / "y").read_text() == "1"

    def test_what_cannot_be_read(self, session: SandboxSession, tmp_path: Path) -> None:
        session.mkdir("dir")
        session.write_text("file", "")
        session.exec("mkfifo pipe").check()
        (tmp_path / "out").write_text("old")
        for read in (
            session.read_bytes,
            session.read_text,
            lambda path: session.download_file(path, tmp_path / "out"),
        ):
            with pytest.raises(SandboxFileNotFoundError, match="absent"):
                read("absent")
            with pytest.raises(SandboxIsADirectoryError, match="dir"):
                read("dir")
            with pytest.raises(SandboxNotADirectoryError):
                read("file/below")
            with pytest.raises(SandboxFileError, match="pipe") as caught:
                read("pipe")
            assert caught.value.errno == errno.EOPNOTSUPP
        assert (tmp_path / "out").read_text() == "old"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("size", [1, PART_BYTES + 1])
    def test_a_full_device_raises_no_space(self, session: SandboxSession, size: int) -> None:
        with pytest.raises(SandboxNoSpaceError, match="/dev/full") as caught:
            session.write_bytes("/dev/full", bytes(size))
        assert caught.value.errno == errno.ENOSPC
        assert session.exists("/dev/full")

    def test_local_side_of_transfers(self, session: SandboxSession, tmp_path: Path) -> None:
        session.write_text("file", "new")
        with pytest.raises(FileNotFoundError):
            session.upload_file(tmp_path / "absent", "x")
        with pytest.raises(IsADirectoryError):
            session.upload_file(tmp_path, "x")
        with pytest.raises(FileNotFoundError):
            session.download_file("file", tmp_path / "absent" / "out")
        with pytest.raises(IsADirectoryError):
            session.download_file("file", tmp_path)
        assert session.listdir() == ["file"]
        assert os.listdir(tmp_path) == []
        (tmp_path / "real").write_text("old")
        (tmp_path / "real").chmod(0o640)
        (tmp_path / "link").symlink_to("real")
        session.download_file("file", str(tmp_path / "link"))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "new"
        assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
