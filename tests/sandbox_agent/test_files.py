from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import Channel, FrameType, WriteFlag
from ray_backend.sandbox.protocol import Done, Failed, Granted, Opened, Output, encode_frame
from tests.sandbox_agent.harness import Agent, memory_kib
from tests.support import as_root, mounted

MIB = 1 << 20
NAMES = [
    b"plain",
    b"two words",
    b"new\nline",
    b"-rf",
    b"\xff\xfe\x80",
    b"*?[",
    b"\x01",
    "é".encode(),
]


def write(agent: Agent, path: Path | bytes, content: bytes, **options: object) -> Done | Failed:
    opened = agent.connection.write(os.fsencode(path), **options)  # type: ignore[arg-type]
    return agent.write(opened, content)


def read(agent: Agent, path: Path | bytes, **options: object) -> bytes | Failed:
    return agent.read(agent.connection.read(os.fsencode(path), credit=MIB, **options))  # type: ignore[arg-type]


def failure(outcome: object) -> int:
    assert isinstance(outcome, Failed), outcome
    return outcome.errno


@pytest.mark.parametrize("size", [0, 1, 131_070, 131_071, 131_072, 131_073, 3 * MIB + 7])
def test_sizes(agent: Agent, tmp_path: Path, size: int):
    content = os.urandom(size)
    done = write(agent, tmp_path / "file", content)
    assert isinstance(done, Done)
    assert done.stat is not None
    assert (done.stat.size, stat.S_IMODE(done.stat.mode)) == (size, 0o644)
    assert (tmp_path / "file").read_bytes() == content
    assert read(agent, tmp_path / "file") == content


@pytest.mark.slow
def test_a_gibibyte_in_constant_memory(agent: Agent, tmp_path: Path):
    before = memory_kib(agent.pid, "VmHWM")
    block, count = os.urandom(MIB), 1024
    stream, data = agent.connection.write(os.fsencode(tmp_path / "big"), length=count * MIB)
    agent.push(data)
    for _ in range(count):
        rest = memoryview(block)
        while rest:
            n = min(len(rest), agent.connection.window(stream))
            agent.push(agent.connection.send(stream, rest[:n]))
            rest = rest[n:]
            if rest:
                agent.until(stream, Granted)
    agent.push(agent.connection.end(stream))
    agent.until(stream, Done)
    stream, data = agent.connection.read(os.fsencode(tmp_path / "big"), credit=MIB)
    agent.push(data)
    agent.until(stream, Opened)
    back, want = hashlib.sha256(), hashlib.sha256()
    for _ in range(count):
        want.update(block)
    while not isinstance(event := agent.until(stream, Output, Done), Done):
        back.update(event.data)
        agent.push(agent.connection.credit(stream, Channel.STDOUT, len(event.data)))
    (tmp_path / "big").unlink()
    assert back.digest() == want.digest()
    assert memory_kib(agent.pid, "VmHWM") < before + 1024


def test_ranges(agent: Agent, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read(agent, path, offset=3, length=4) == b"3456"
    assert read(agent, path, offset=8, length=4) == b"89"
    assert read(agent, path, offset=10) == b""
    assert read(agent, path, offset=99) == b""
    assert read(agent, path, length=0) == b""
    write(agent, path, b"ab", offset=4, flags=WriteFlag.KEEP_REST)
    assert path.read_bytes() == b"0123ab6789"
    write(agent, path, b"ab", offset=4)
    assert path.read_bytes() == b"0123ab"
    write(agent, path, b"x", flags=WriteFlag.APPEND)
    assert path.read_bytes() == b"0123abx"
    write(agent, path, b"y", offset=9, flags=WriteFlag.KEEP_REST)
    assert path.read_bytes() == b"0123abx\0\0y"


def test_any_name(agent: Agent, tmp_path: Path):
    place = os.fsencode(tmp_path / "place")
    assert isinstance(agent.request(agent.connection.mkdir(place)), Done)
    for name in NAMES:
        assert isinstance(write(agent, place + b"/" + name, name), Done)
    assert sorted(os.listdir(place)) == sorted(NAMES)
    entries = agent.names(place)
    assert not isinstance(entries, Failed)
    assert sorted(entry.name for entry in entries) == sorted(NAMES)
    for name in NAMES:
        path = place + b"/" + name
        assert read(agent, path) == name
        assert isinstance(agent.request(agent.connection.rename(path, path + b"2")), Done)
        assert isinstance(agent.request(agent.connection.remove(path + b"2")), Done)
    assert isinstance(agent.request(agent.connection.remove(place, directory=True)), Done)
    assert not os.path.exists(place)


def test_overwriting_keeps_mode_owner_and_links(agent: Agent, tmp_path: Path):
    path, hard, soft = tmp_path / "file", tmp_path / "hard", tmp_path / "soft"
    path.write_bytes(b"a longer old content")
    path.chmod(0o751)
    if os.geteuid() == 0:
        os.chown(path, 1234, 567)
    hard.hardlink_to(path)
    soft.symlink_to("file")
    before = path.stat()
    write(agent, soft, b"new")
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_uid, after.st_gid) == (
        before.st_ino,
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert soft.is_symlink()
    assert hard.read_bytes() == b"new"


def test_replacing_keeps_mode_and_owner_and_follows_links(agent: Agent, tmp_path: Path):
    path, hard = tmp_path / "file", tmp_path / "hard"
    path.write_bytes(b"a longer old content")
    if os.geteuid() == 0:
        os.chown(path, 1234, 567)
    path.chmod(0o4751)
    hard.hardlink_to(path)
    (tmp_path / "place").mkdir()
    (tmp_path / "absolute").symlink_to(path)
    (tmp_path / "place/soft").symlink_to("../absolute")
    before = path.stat()
    stream, data = agent.connection.write(
        os.fsencode(tmp_path / "place/soft"), flags=WriteFlag.REPLACE, length=3
    )
    agent.push(data + agent.connection.send(stream, b"new"))
    assert agent.run(["cat", str(path)]).stdout == b"a longer old content", "not replaced yet"
    agent.push(agent.connection.end(stream))
    agent.until(stream, Done)
    after = path.stat()
    assert path.read_bytes() == b"new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert hard.read_bytes() == b"a longer old content"
    assert (tmp_path / "place/soft").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["absolute", "file", "hard", "place"]
    assert os.listdir(tmp_path / "place") == ["soft"]


def test_replacing_what_is_not_there(agent: Agent, tmp_path: Path):
    replace = WriteFlag.REPLACE
    assert isinstance(write(agent, tmp_path / "new", b"1", flags=replace, mode=0o777), Done)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755
    (tmp_path / "soft").symlink_to("target")
    assert isinstance(write(agent, tmp_path / "soft", b"2", flags=replace), Done)
    assert (tmp_path / "target").read_bytes() == b"2"
    assert failure(write(agent, tmp_path / "a/b", b"", flags=replace)) == errno.ENOENT
    parents = replace | WriteFlag.MAKE_PARENTS
    assert isinstance(write(agent, tmp_path / "a/b", b"3", flags=parents), Done)
    assert (tmp_path / "a/b").read_bytes() == b"3"
    name = b"x" * 255
    assert isinstance(write(agent, bytes(tmp_path) + b"/" + name, b"4", flags=replace), Done)


def test_what_cannot_be_replaced(agent: Agent, tmp_path: Path):
    replace, place = WriteFlag.REPLACE, bytes(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    for name, error in [
        (b"", errno.EISDIR),
        (b"/", errno.EISDIR),
        (b"/.", errno.EISDIR),
        (b"/loop", errno.ELOOP),
        (b"/fifo", errno.EOPNOTSUPP),
        (b"/file/x", errno.ENOTDIR),
        (b"/" + b"x" * 256, errno.ENAMETOOLONG),
    ]:
        assert failure(write(agent, place + name, b"", flags=replace)) == error, name
    assert failure(write(agent, b"/dev/null", b"", flags=replace)) == errno.EOPNOTSUPP
    assert failure(write(agent, b"/", b"", flags=replace)) == errno.EISDIR
    assert sorted(os.listdir(tmp_path)) == before
    body = struct.pack("<IIQQ", replace | WriteFlag.APPEND, 0o644, 0, 0) + place + b"/file"
    stream, _ = agent.connection.write(place + b"/file")
    agent.push(encode_frame(FrameType.WRITE, stream, body))
    assert agent.until(stream, Failed).errno == errno.EINVAL


def test_a_cancelled_replacement_leaves_the_old(agent: Agent, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")
    stream, data = agent.connection.write(bytes(tmp_path / "file"), flags=WriteFlag.REPLACE)
    agent.push(data + agent.connection.send(stream, b"half") + agent.connection.cancel(stream))
    assert agent.until(stream, Failed).errno == errno.ECANCELED
    stream, data = agent.connection.write(bytes(tmp_path / "file"), flags=WriteFlag.REPLACE)
    agent.push(data + agent.connection.send(stream, b"half"))
    agent.connect(resync=True)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_link_to_nothing_is_written_through(agent: Agent, tmp_path: Path):
    (tmp_path / "soft").symlink_to("target")
    assert isinstance(write(agent, tmp_path / "soft", b"new"), Done)
    assert (tmp_path / "target").read_bytes() == b"new"
    assert (tmp_path / "soft").is_symlink()


def test_modes_of_new_files(agent: Agent, tmp_path: Path):
    write(agent, tmp_path / "program", b"", mode=0o777)
    assert stat.S_IMODE((tmp_path / "program").stat().st_mode) == 0o755
    done = write(agent, tmp_path / "program", b"", flags=WriteFlag.EXCLUSIVE)
    assert failure(done) == errno.EEXIST


@as_root
def test_what_is_new_belongs_to_the_owner(launch: Callable[..., Agent], tmp_path: Path):
    agent = launch("--owner", "1234:567")

    def owner(name: str) -> tuple[int, int]:
        found = (tmp_path / name).lstat()
        return found.st_uid, found.st_gid

    ours, theirs = (0, os.getegid()), (1234, 567)
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "group").mkdir()
    os.chown(tmp_path / "group", 0, 89)
    (tmp_path / "group").chmod(0o2755)
    connection, place = agent.connection, os.fsencode(tmp_path)
    write(agent, tmp_path / "new", b"1")
    write(agent, tmp_path / "beside", b"1", flags=WriteFlag.REPLACE)
    write(agent, tmp_path / "old", b"1")
    write(agent, tmp_path / "a/b/c", b"1", flags=WriteFlag.MAKE_PARENTS)
    write(agent, tmp_path / "program", b"1", mode=0o4755)
    write(agent, tmp_path / "group/x/y", b"1", flags=WriteFlag.MAKE_PARENTS)
    agent.request(connection.mkdir(place + b"/d"))
    agent.request(connection.mkdir(place + b"/d//e/./f/../g/", parents=True))
    for name in ("new", "beside", "a", "a/b", "a/b/c", "program", "d", "d/e", "d/e/f", "d/e/g"):
        assert owner(name) == theirs, name
    assert owner("old") == ours
    assert stat.S_IMODE((tmp_path / "program").stat().st_mode) == 0o4755
    assert (owner("group"), owner("group/x"), owner("group/x/y")) == (
        (0, 89),
        (1234, 89),
        (1234, 89),
    )


def test_errors(agent: Agent, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "loop").symlink_to("loop")
    connection, place = agent.connection, os.fsencode(tmp_path)
    assert failure(read(agent, tmp_path / "missing")) == errno.ENOENT
    assert failure(read(agent, tmp_path)) == errno.EISDIR
    assert failure(read(agent, tmp_path / "file/x")) == errno.ENOTDIR
    assert failure(read(agent, tmp_path / "loop")) == errno.ELOOP
    assert failure(read(agent, place + b"/" + b"x" * 256)) == errno.ENAMETOOLONG
    assert failure(write(agent, tmp_path, b"")) == errno.EISDIR
    assert failure(write(agent, tmp_path / "no/parent", b"")) == errno.ENOENT
    assert failure(write(agent, tmp_path / "file/x", b"")) == errno.ENOTDIR
    parents = WriteFlag.MAKE_PARENTS
    assert failure(write(agent, tmp_path / "file/x/y", b"", flags=parents)) == errno.ENOTDIR
    assert failure(agent.names(place + b"/file")) == errno.ENOTDIR
    assert failure(agent.names(place + b"/missing")) == errno.ENOENT
    assert failure(agent.request(connection.stat(place + b"/missing"))) == errno.ENOENT
    assert failure(agent.request(connection.remove(place + b"/missing"))) == errno.ENOENT
    assert failure(agent.request(connection.remove(place))) == errno.EISDIR
    assert failure(agent.request(connection.remove(place, directory=True))) == errno.ENOTEMPTY
    assert (tmp_path / "file").read_bytes() == b"old"


def test_make_parents(agent: Agent, tmp_path: Path):
    path = tmp_path / "a/b/c/file"
    assert isinstance(write(agent, path, b"new", flags=WriteFlag.MAKE_PARENTS), Done)
    assert path.read_bytes() == b"new"


def test_mkdir(agent: Agent, tmp_path: Path):
    def mkdir(path: Path, **options: bool) -> Done | Failed:
        return agent.request(agent.connection.mkdir(os.fsencode(path), **options))

    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(".")
    assert isinstance(mkdir(tmp_path / "a"), Done)
    assert failure(mkdir(tmp_path / "a")) == errno.EEXIST
    assert failure(mkdir(tmp_path / "a", parents=True)) == errno.EEXIST
    assert isinstance(mkdir(tmp_path / "a", exist_ok=True), Done)
    assert failure(mkdir(tmp_path / "b/c")) == errno.ENOENT
    assert isinstance(mkdir(tmp_path / "b/c", parents=True), Done)
    assert isinstance(mkdir(tmp_path / "b/c/", parents=True, exist_ok=True), Done)
    assert isinstance(mkdir(tmp_path / "link", parents=True, exist_ok=True), Done)
    assert failure(mkdir(tmp_path / "file", exist_ok=True)) == errno.EEXIST
    assert failure(mkdir(tmp_path / "file/x", parents=True)) == errno.ENOTDIR
    assert isinstance(mkdir(Path("/"), parents=True, exist_ok=True), Done)


def test_stat(agent: Agent, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.utime(tmp_path / "file", ns=(0, 1_234_567_890_123_456_789))

    def look(name: str, *, follow: bool) -> Done:
        done = agent.request(agent.connection.stat(os.fsencode(tmp_path / name), follow=follow))
        assert isinstance(done, Done)
        return done

    seen, want = look("link", follow=True), (tmp_path / "file").stat()
    assert seen.link is None
    assert seen.stat is not None
    assert (seen.stat.mode, seen.stat.uid, seen.stat.gid, seen.stat.nlink) == (
        want.st_mode,
        want.st_uid,
        want.st_gid,
        1,
    )
    assert (seen.stat.size, seen.stat.inode, seen.stat.device) == (5, want.st_ino, want.st_dev)
    assert seen.stat.mtime_ns == 1_234_567_890_123_456_789
    seen = look("link", follow=False)
    assert seen.link == b"file"
    assert seen.stat is not None
    assert stat.S_ISLNK(seen.stat.mode)
    os.utime(tmp_path / "file", ns=(0, -1_500_000_000))
    assert look("file", follow=False).stat.mtime_ns == -1_500_000_000  # type: ignore[union-attr]


def test_rename(agent: Agent, tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    names = os.fsencode(old), os.fsencode(new)
    outcome = agent.request(agent.connection.rename(*names, replace=False))
    assert failure(outcome) == errno.EEXIST
    assert new.read_bytes() == b"new"
    assert isinstance(agent.request(agent.connection.rename(*names)), Done)
    assert (new.read_bytes(), old.exists()) == (b"old", False)
    assert failure(agent.request(agent.connection.rename(*names))) == errno.ENOENT


def test_what_could_wait_for_ever_is_refused(agent: Agent, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for use in (lambda path: read(agent, path), lambda path: write(agent, path, b"x")):
        assert failure(use(tmp_path / "fifo")) == errno.EOPNOTSUPP
    reader = os.open(tmp_path / "fifo", os.O_RDWR)
    assert failure(write(agent, tmp_path / "fifo", b"x")) == errno.EOPNOTSUPP
    os.close(reader)
    assert read(agent, b"/dev/zero", length=10) == bytes(10)
    assert read(agent, b"/dev/null") == b""
    assert isinstance(write(agent, b"/dev/null", b"x"), Done)
    assert failure(write(agent, b"/dev/full", b"x")) == errno.ENOSPC


def test_files_without_a_size(agent: Agent):
    assert read(agent, b"/proc/self/comm") == b"agent\n"


def test_big_directories_come_piece_by_piece(agent: Agent, tmp_path: Path):
    names = {b"%0200d" % i for i in range(3000)}
    for name in names:
        (tmp_path / name.decode()).touch()
    entries = agent.names(os.fsencode(tmp_path), credit=1000)
    assert not isinstance(entries, Failed)
    assert {entry.name for entry in entries} == names
    assert len(entries) == len(names)
    assert {entry.kind for entry in entries} <= {0, 8}


def test_a_cancelled_write_of_a_new_file_leaves_nothing(agent: Agent, tmp_path: Path):
    (tmp_path / "existing").write_bytes(b"old content")
    for name in ("new", "existing"):
        stream, data = agent.connection.write(os.fsencode(tmp_path / name))
        agent.push(data + agent.connection.send(stream, b"half"))
        agent.push(agent.connection.cancel(stream))
        assert agent.until(stream, Failed).errno == errno.ECANCELED
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "existing").read_bytes() == b"halfcontent"


def test_a_cancelled_read_ends(agent: Agent):
    stream, data = agent.connection.read(b"/dev/zero", credit=1 << 30)
    agent.push(data)
    agent.until(stream, Output)
    agent.push(agent.connection.cancel(stream))
    assert agent.until(stream, Failed).errno == errno.ECANCELED
    assert agent.connection.open_streams == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 1 MiB."""
    with mounted("tmpfs", tmp_path / "small", "size=1m") as place:
        yield place


def test_a_full_disk(agent: Agent, small_disk: Path):
    old = os.urandom(300_000)
    path, new = small_disk / "file", small_disk / "new"
    assert isinstance(write(agent, path, old), Done)
    content = bytes(2 * MIB)
    assert failure(write(agent, new, content)) == errno.ENOSPC
    assert not new.exists(), "half a new file was left"
    announced = write(agent, path, content, length=len(content))
    assert failure(announced) == errno.ENOSPC
    assert path.read_bytes() == old, "the old content had to be whole"
    assert isinstance(write(agent, new, bytes(500_000)), Done), "the reserved space was not freed"
    new.unlink()
    for length in (None, len(content)):
        replaced = write(agent, path, content, flags=WriteFlag.REPLACE, length=length)
        assert failure(replaced) == errno.ENOSPC
        assert path.read_bytes() == old
        assert os.listdir(small_disk) == ["file"]
    assert failure(write(agent, path, content)) == errno.ENOSPC
    assert isinstance(write(agent, path, old, length=len(old)), Done)
    assert path.read_bytes() == old
