"""What only containers show, whichever way their session is reached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from apothic import Image, Sandbox, SandboxSession
from apothic.errors import ExecTimeoutError, SandboxLostError
from ray_backend.sandbox.engine.connection import Engine
from tests.conformance.sandboxes.base import SandboxSuite


class ContainerConformance(SandboxSuite):
    def test_a_fork_loop_is_ended_within_the_limit_of_processes(
        self, session: SandboxSession, python: str
    ) -> None:
        loop = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
        with pytest.raises(ExecTimeoutError):
            session.exec([python, "-c", loop], timeout_s=2)
        left = session.exec("ls -d /proc/[0-9]* | wc -l", shell=True).check()
        assert int(left.stdout) < 10

    def test_running_out_of_memory_is_said_and_the_session_goes_on(
        self, session: SandboxSession, python: str
    ) -> None:
        result = session.exec([python, "-c", "b = bytearray(10**9)\nprint(len(b))"])
        assert result.returncode == 137
        assert result.oom_killed
        assert session.exec("echo on", shell=True).stdout == "on\n"

    def test_a_container_that_is_killed_is_lost(
        self, session: SandboxSession, docker_engine: Engine
    ) -> None:
        docker_engine.kill(session.inspect().container_id or "")
        with pytest.raises(SandboxLostError, match="killed or removed from outside"):
            session.exec("true")

    def test_the_agent_cannot_be_killed_from_inside(self, session: SandboxSession) -> None:
        session.exec("sleep 1000 &", shell=True)
        kills = "for n in $(seq 1 64); do kill -$n 1; done; kill -9 1; kill -STOP 1; echo END"
        assert session.exec(kills, shell=True).stdout == "END\n"
        with contextlib.suppress(SandboxLostError):  # it takes what watches over itself along
            session.exec("kill -9 -1", shell=True, timeout_s=20)
        assert session.exec("echo on", shell=True).stdout == "on\n"
        left = session.exec("ls -d /proc/[0-9]* | wc -l", shell=True).check()
        assert int(left.stdout) < 10

    def test_what_verbs_make_belongs_to_the_images_user(
        self, define: Callable[..., Sandbox]
    ) -> None:
        image = Image.from_registry("apothic-test-debian").with_dockerfile("USER nobody")
        with define(image=image).create(cwd="/work/deep") as session:
            session.write_text("sub/file", "a\n", make_parents=True)
            session.exec("echo b >> sub/file && mkdir other && touch sub/new", shell=True).check()
            assert session.read_text("sub/file") == "a\nb\n"
            owners = session.exec("stat -c %U . sub sub/file", shell=True).check().stdout
            assert owners.split() == ["nobody"] * 3
            session.write_text("/etc/issue", "kept\n")
            assert session.exec("stat -c %U /etc/issue", shell=True).check().stdout == "root\n"

    def test_localhost_is_there(self, session: SandboxSession, python: str) -> None:
        code = (
            "import socket\n"
            "server = socket.create_server(('', 0))\n"
            "port = server.getsockname()[1]\n"
            "socket.create_connection((socket.gethostname(), port)).close()\n"
            "server.accept()[0].close()\n"
            "client = socket.create_connection(('localhost', port))\n"
            "client.sendall(b'met')\n"
            "print(server.accept()[0].recv(3).decode())\n"
        )
        assert session.exec([python, "-c", code]).check().stdout == "met\n"

    def test_nothing_is_reached_from_inside(self, session: SandboxSession, python: str) -> None:
        script = """
import os, socket
for path in ("/var/run/docker.sock", "/proc/1/mem", "/proc/1/fd/0", "/.apothic/agent"):
    try:
        open(path, "r+b").close()
        print("OPENED", path)
    except OSError:
        pass
for address in (("172.17.0.1", 22), ("10.0.0.1", 80), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, timeout=1).close()
        print("REACHED", address)
    except OSError:
        pass
try:
    os.kill(1, 9)
except OSError:
    pass
print("END")
"""
        assert session.exec([python, "-c", script]).check().stdout == "END\n"
        assert session.exec("echo on", shell=True).stdout == "on\n"
