"""Much of everything: output, input, files, memory and processes, in containers without Ray.

This process is the actor's here: what it may not grow by, an actor may not either.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apothic import Image, Sandbox, SandboxSession
from apothic.errors import (
    ExecStartError,
    ExecTimeoutError,
    SandboxExecError,
    SandboxFileError,
    SandboxLostError,
    SandboxNoSpaceError,
    SandboxPermissionError,
)
from ray_backend.sandbox.containers import SessionContainer
from ray_backend.sandbox.engine.connection import Engine
from tests.conformance.sandboxes.base import Marked, marked
from tests.docker.support import BUSYBOX, left_of
from tests.sandboxes.direct import DirectEngine
from tests.sandboxes.test_direct import Direct
from tests.support import eventually

__all__ = ["marked"]

MIB = 1024**2
NEXT_EXEC_S = 5.0
"""An exec takes milliseconds; this much is for a machine that does other things as well."""


def memory_mib(status: str, field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def bounded(session: SandboxSession, *, ours_mib: float, agents_mib: float) -> Iterator[None]:
    """See how far the memory of this process and of the agent grows at its peak."""
    session.exec("true").check()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mib(Path("/proc/self/status").read_text(), "VmRSS")
    agents = memory_mib(session.exec("cat /proc/1/status").stdout, "VmRSS")
    yield
    grown = memory_mib(Path("/proc/self/status").read_text(), "VmHWM") - before
    assert grown < ours_mib
    assert memory_mib(session.exec("cat /proc/1/status").stdout, "VmHWM") - agents < agents_mib


class TestBytes(Direct):
    def test_64_mib_of_both_outputs_at_once(self, session: SandboxSession, python: str) -> None:
        code = (
            "import hashlib, os, sys, threading\n"
            "def pour(fd):\n"
            "    digest = hashlib.sha256()\n"
            "    for _ in range(64):\n"
            "        piece = os.urandom(1 << 20)\n"
            "        digest.update(piece)\n"
            "        while piece: piece = piece[os.write(fd, piece):]\n"
            "    open(str(fd), 'w').write(digest.hexdigest())\n"
            "threads = [threading.Thread(target=pour, args=(fd,)) for fd in (1, 2)]\n"
            "for one in threads: one.start()\n"
            "for one in threads: one.join()\n"
        )
        with bounded(session, ours_mib=512, agents_mib=4):
            result = session.exec([python, "-c", code], max_output_bytes=64 * MIB).check()
        assert not result.truncated
        for name, data in (("1", result.stdout_bytes), ("2", result.stderr_bytes)):
            assert len(data) == 64 * MIB
            assert hashlib.sha256(data).hexdigest() == session.read_text(name)

    def test_output_without_end_is_dropped_in_constant_memory(
        self, session: SandboxSession
    ) -> None:
        with (
            bounded(session, ours_mib=32, agents_mib=4),
            pytest.raises(ExecTimeoutError) as caught,
        ):
            session.exec("yes & yes >&2", shell=True, timeout_s=3, max_output_bytes=MIB)
        result = caught.value.result
        assert result is not None
        assert result.stdout_truncated
        assert result.stderr_truncated
        assert result.stdout_bytes == result.stderr_bytes == b"y\n" * (MIB // 2)

    def test_a_stream_that_nobody_reads_holds_its_program_up(self, session: SandboxSession) -> None:
        with bounded(session, ours_mib=32, agents_mib=4):
            script = "while :; do head -c 1048576 /dev/zero; echo >> count; done"
            with session.exec_stream(script, shell=True):
                before = -1
                while (now := len(self.counted(session))) > before:
                    before = now
                    time.sleep(0.5)  # a program that writes on would have shown it by now
            assert now < 32

    def counted(self, session: SandboxSession) -> str:
        return session.read_text("count") if session.exists("count") else ""

    def test_50_mib_of_input(self, session: SandboxSession) -> None:
        data = os.urandom(50 * MIB)
        shown = session.exec("sha256sum", stdin=data).check().stdout.split()[0]
        assert shown == hashlib.sha256(data).hexdigest()

    def test_a_mebibyte_of_arguments(self, session: SandboxSession, python: str) -> None:
        words = [f"{n:07d}" + "x" * 1017 for n in range(1024)]
        code = (
            "import hashlib, sys; print(hashlib.sha256(''.join(sys.argv[1:]).encode()).hexdigest())"
        )
        shown = session.exec([python, "-c", code, *words]).check().stdout.strip()
        assert shown == hashlib.sha256("".join(words).encode()).hexdigest()


class TestFiles(Direct):
    def test_a_gibibyte_in_constant_memory(self, session: SandboxSession, tmp_path: Path) -> None:
        piece = os.urandom(MIB)
        digest = hashlib.sha256()
        with open(tmp_path / "big", "wb") as file:
            for n in range(1024):
                numbered = n.to_bytes(8, "big") + piece[8:]
                file.write(numbered)
                digest.update(numbered)
        with bounded(session, ours_mib=96, agents_mib=4):
            session.upload_file(tmp_path / "big", "big")
            (tmp_path / "big").unlink()
            session.download_file("big", tmp_path / "back")
        back = hashlib.sha256()
        with open(tmp_path / "back", "rb") as file:
            while found := file.read(MIB):
                back.update(found)
        assert back.digest() == digest.digest()
        (tmp_path / "back").unlink()

    def test_the_owner_is_kept(self, session: SandboxSession, tmp_path: Path) -> None:
        session.write_text("file", "old")
        session.exec("chown 1234:4321 file; chmod 640 file", shell=True).check()
        (tmp_path / "in").write_bytes(os.urandom(3 * MIB))
        session.write_text("file", "new")
        session.upload_file(tmp_path / "in", "file")
        session.write_text("file", "more", append=True)
        assert session.exec("stat -c %u:%g:%a file").stdout == "1234:4321:640\n"

    def test_a_full_disk(self, define: Callable[..., Sandbox], tmp_path: Path) -> None:
        """The memory file system of a container is half as large as its memory."""
        (tmp_path / "in").write_bytes(bytes(24 * MIB))
        with self.open(define(memory_mb=128)) as session:
            session.write_text("/dev/shm/file", "old")
            session.exec("head -c 60M /dev/zero > /dev/shm/rest", shell=True).check()
            for write in (
                lambda: session.write_bytes("/dev/shm/file", bytes(6 * MIB)),
                lambda: session.write_bytes("/dev/shm/file", bytes(24 * MIB)),
                lambda: session.upload_file(tmp_path / "in", "/dev/shm/file"),
                lambda: session.upload_file(tmp_path / "in", "/dev/shm/new"),
            ):
                with pytest.raises(SandboxNoSpaceError, match="/dev/shm/"):
                    write()
                assert session.read_text("/dev/shm/file") == "old"
            assert session.listdir("/dev/shm") == ["file", "rest"]

    def test_what_even_root_may_not(self, session: SandboxSession) -> None:
        for write in (
            lambda: session.write_text("/proc/sys/kernel/hostname", "x"),
            lambda: session.write_text("/.apothic/new", "x"),
            lambda: session.mkdir("/sys/new"),
        ):
            with pytest.raises(SandboxPermissionError):
                write()
        with pytest.raises(SandboxFileError):
            session.read_bytes("/proc/1/mem")


EAT = "data = bytearray(10**9)"


class TestMemory(Direct):
    def test_an_exec_names_the_limit(self, define: Callable[..., Sandbox], python: str) -> None:
        with self.open(define(memory_mb=200)) as session:
            result = session.exec([python, "-c", EAT])
            assert (result.oom_killed, result.memory_mb, result.signal) == (True, 200, 9)
            with pytest.raises(SandboxExecError, match="out of memory, memory_mb=200"):
                result.check()
            # Of a child, in an exec that ends well otherwise; and while output streams.
            result = session.exec(f"{python} -c '{EAT}'; echo on; exit 5", shell=True)
            assert (result.oom_killed, result.returncode, result.stdout) == (True, 5, "on\n")
            code = f"print('first', flush=True)\n{EAT}"
            events = list(session.exec_stream([python, "-c", code]))
            assert [event.text for event in events] == ["first\n", ""]
            last = events[-1].result
            assert last is not None
            assert last.oom_killed
            with pytest.raises(SandboxExecError, match="out of memory, memory_mb=200"):
                last.check()
            # One that is in the background takes nobody along.
            session.exec(f'{python} -c \'{EAT}; open("no", "w")\' &', shell=True).check()
            assert session.exec("echo on").stdout == "on\n"
            assert not session.exec("true").oom_killed

    def test_the_agent_goes_with_its_container(
        self,
        define: Callable[..., Sandbox],
        python: str,
        engine: DirectEngine,
        docker_engine: Engine,
    ) -> None:
        """Root inside may ask the kernel to prefer the agent, and loses its own session."""
        session = self.open(define(memory_mb=100))
        code = (
            "import os, time\n"
            "open('/proc/1/oom_score_adj', 'w').write('1000')\n"
            "open('/proc/self/oom_score_adj', 'w').write('0')\n"
            "for _ in range(10):\n"
            "    if os.fork() == 0:\n"
            "        data = bytearray(30_000_000)\n"
            "        while True: time.sleep(1000)\n"
            "while True: time.sleep(1000)\n"
        )
        with pytest.raises(SandboxLostError, match=r"memory \(memory_mb=100\) was used up"):
            session.exec([python, "-c", code])
        (ref,) = engine.sessions.values()
        eventually(lambda: ref.native.state == "lost")
        eventually(lambda: left_of(docker_engine, engine.cluster_id) == [])
        session.close()


class TestDisk(Direct):
    """Whether ``disk_gb`` is enforced is the engine's to say: what it was told to limit, it does."""

    FULL = "dd if=/dev/zero of=/big bs=1M count=30"
    LIMIT_GB = 0.02

    @pytest.fixture
    def looks(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """Have sessions look often; give what they see."""
        seen: list[bool] = []
        look = SessionContainer.disk_is_full

        async def noted(container: SessionContainer) -> bool:
            seen.append(await look(container))
            return seen[-1]

        monkeypatch.setattr(SessionContainer, "disk_is_full", noted)
        for module in ("containers", "host"):
            monkeypatch.setattr(f"ray_backend.sandbox.{module}.DISK_LOOK_S", 0.05)
        return seen

    def test_more_than_disk_gb(
        self,
        define: Callable[..., Sandbox],
        looks: list[bool],
        engine: DirectEngine,
        docker_engine: Engine,
    ) -> None:
        session = self.open(define(image=Image.from_registry(BUSYBOX), disk_gb=self.LIMIT_GB))
        notes, container = session.inspect().notes, session.inspect().container_id or ""
        host = docker_engine.api.inspect_container(container)["HostConfig"]
        if (host.get("StorageOpt") or {}).get("size"):
            self.enforced(session, notes)
            assert looks == []
        else:
            self.watched(session, notes, looks, engine)
            eventually(lambda: docker_engine.inspect(container) is None)
            eventually(lambda: left_of(docker_engine, engine.cluster_id) == [])
        session.close()

    def enforced(self, session: SandboxSession, notes: tuple[str, ...]) -> None:
        assert notes == ()  # nothing is to be known: it is as documented
        done = session.exec(self.FULL)
        assert not done.ok
        assert "No space" in done.stderr
        session.exec("rm /big").check()
        with pytest.raises(SandboxNoSpaceError, match="/big"):
            session.write_bytes("/big", bytes(30 * MIB))
        assert session.exec("echo on").stdout == "on\n"

    def watched(
        self,
        session: SandboxSession,
        notes: tuple[str, ...],
        looks: list[bool],
        engine: DirectEngine,
    ) -> None:
        [note] = notes
        assert "cannot limit disks" in note
        assert "measured every 0.05 s" in note
        assert f"above disk_gb={self.LIMIT_GB} the session ends" in note
        session.write_bytes("/less", bytes(10 * MIB))
        before = len(looks)
        eventually(lambda: len(looks) >= before + 2)  # the second one began after the write
        assert not any(looks)
        assert session.exec("echo on").stdout == "on\n"
        with pytest.raises(
            SandboxLostError, match=f"more than disk_gb={self.LIMIT_GB} to its disk"
        ):
            session.exec(f"{self.FULL}; sleep 1000", shell=True)
        with pytest.raises(SandboxLostError, match="disk_gb"):  # it stays what it is
            session.read_bytes("/less")
        (ref,) = engine.sessions.values()
        eventually(lambda: ref.native.state == "lost")


class TestKills(Direct):
    def check_next(self, session: SandboxSession, marked: Marked) -> None:
        begin = time.monotonic()
        assert session.exec("echo next").stdout == "next\n"
        assert time.monotonic() - begin < NEXT_EXEC_S
        assert marked.alive() == []

    FORKS = (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    )
    FULL = (
        "import os, sys, time\n"
        "while True:\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            while True: time.sleep(1000)\n"
        "    except OSError:\n"
        "        break\n"
        "print('full', flush=True)\n"
        "while True: time.sleep(1000)\n"
    )
    OTHERS = (
        "import os, time\n"
        "for uid in (1234, 65534):\n"
        "    if os.fork() == 0:\n"
        "        os.setgroups([]); os.setgid(uid); os.setuid(uid)\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            print('there', flush=True)\n"
        "            while True: time.sleep(1000)\n"
        "        os._exit(0)\n"
        "while True: time.sleep(1000)\n"
    )

    def test_a_stream_of_a_fork_loop_is_closed(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        code = "print('ready', flush=True)\n" + self.FORKS
        with session.exec_stream([python, "-c", code, marked.token]) as stream:
            assert next(stream).text == "ready\n"
        self.check_next(session, marked)

    def test_all_processes_are_used_up(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        stream = session.exec_stream([python, "-c", self.FULL, marked.token])
        assert next(stream).text == "full\n"
        with pytest.raises(ExecStartError, match="limit of processes"):
            session.exec("true")
        session.write_text("file", "files need no process")
        assert session.read_text("file") == "files need no process"
        stream.close()
        self.check_next(session, marked)
        with pytest.raises(ExecTimeoutError) as caught:
            session.exec([python, "-c", self.FULL, marked.token], timeout_s=4)
        assert caught.value.result is not None
        assert caught.value.result.stdout == "full\n"
        self.check_next(session, marked)

    @pytest.mark.parametrize("how", ["timeout", "close"])
    def test_those_that_became_somebody_else(
        self, session: SandboxSession, python: str, marked: Marked, how: str
    ) -> None:
        words = [python, "-c", self.OTHERS, marked.token]
        if how == "timeout":
            with pytest.raises(ExecTimeoutError) as caught:
                session.exec(words, timeout_s=2)
            assert caught.value.result is not None
            assert caught.value.result.stdout == "there\nthere\n"
        else:
            seen = ""
            with session.exec_stream(words) as stream:
                while seen.count("there") < 2:
                    seen += next(stream).text
        self.check_next(session, marked)
