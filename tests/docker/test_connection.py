from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker.errors
import pytest
import requests.exceptions

from apothic.errors import ImageNotFoundError, SandboxEngineError
from ray_backend.sandbox.engine.address import EngineAddress
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.launch import Launched
from ray_backend.sandbox.engine.translate import KNOWN_ERRORS, to_sandbox_error, translated
from tests.docker.support import new_owner, read_line, spec_of, with_container
from tests.support import as_root


def test_every_error_of_the_library_is_known_and_translated():
    classes = {
        value
        for value in vars(docker.errors).values()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and value.__module__ == "docker.errors"
    }
    assert classes == KNOWN_ERRORS
    for kind in (*KNOWN_ERRORS, requests.exceptions.ConnectionError, requests.exceptions.Timeout):
        error = kind.__new__(kind)
        error.args = ("text",)
        vars(error).update(name="text", param="text", msg="text", response=None, explanation=None)
        assert isinstance(to_sandbox_error(error, "work"), SandboxEngineError | ImageNotFoundError)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), translated("work"):
        raise ZeroDivisionError


def test_no_socket(tmp_path: Path):
    with pytest.raises(SandboxEngineError, match=r"no Docker socket .*apt-get install docker.io"):
        Engine.connect(f"unix://{tmp_path}/none.sock")


def test_nobody_listens(tmp_path: Path):
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(SandboxEngineError, match=r"no Docker engine listens.*systemctl start"):
        Engine.connect(f"unix://{path}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SandboxEngineError, match="no Docker engine listens"):
        Engine.connect(f"tcp://127.0.0.1:{port}")


@as_root
def test_refused():
    path = Path("/tmp") / f"apothic-test-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o600)
            listener.listen()
            code = (
                "import os, sys; os.setgid(65534); os.setuid(65534)\n"
                "from ray_backend.sandbox.engine.address import EngineAddress as A\n"
                "try: A(sys.argv[1]).check(5)\n"
                "except Exception as error: print(type(error).__name__, error)"
            )
            # The user must not need to read this checkout: import first, then switch.
            code = "import ray_backend.sandbox.engine.address, pwd\n" + code
            done = subprocess.run(
                [sys.executable, "-c", code, f"unix://{path}"],
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            path.unlink()
    assert "NoEngineError user nobody may not use" in done.stdout
    assert "usermod -aG docker nobody" in done.stdout


@pytest.mark.parametrize(
    "host", ["ssh://somewhere", "npipe:////./pipe/docker", "fd://", "unix://", "nonsense"]
)
def test_unsupported_address(host: str):
    with pytest.raises(SandboxEngineError, match="is not supported"):
        EngineAddress.find(host)


def test_address_from_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://engine.example:2376")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", "/certs")
    assert EngineAddress.find() == EngineAddress(
        "tcp://engine.example:2376", Path("/certs"), verify=True
    )
    assert EngineAddress.find("unix:///x.sock").socket_path == "/x.sock"


def test_the_engine_of_the_environment_is_used(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "elsewhere.sock"
    path.symlink_to(engine.address.socket_path or "")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    found = Engine.connect()
    try:
        assert (found.address.socket_path, found.info.id) == (str(path), engine.info.id)
    finally:
        found.close()
    path.unlink()
    with pytest.raises(SandboxEngineError, match=rf"no Docker socket {path}.*set DOCKER_HOST"):
        Engine.connect()


@contextmanager
def _answering(path: Path, answer: bytes | None) -> Iterator[None]:
    """Listen on a socket and answer each request with the same bytes, or never."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    held = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None and connection.recv(65536):
                connection.sendall(answer)
                connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in held:
            connection.close()


def _version_answer(newest: str, oldest: str) -> bytes:
    body = json.dumps({"Version": "1", "ApiVersion": newest, "MinAPIVersion": oldest}).encode()
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (_version_answer("1.38", "1.12"), r"sandboxes need one of API 1\.41 \(Docker 20\.10\)"),
        (_version_answer("9.99", "9.90"), r"with API 9\.90 to 9\.99; sandboxes need"),
        (b"SSH-2.0-OpenSSH\r\n", "does not answer as a Docker engine"),
    ],
)
def test_wrong_engine(tmp_path: Path, answer: bytes, says: str):
    with (
        _answering(tmp_path / "s", answer),
        pytest.raises(SandboxEngineError, match=says),
    ):
        Engine.connect(f"unix://{tmp_path}/s")


def test_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray_backend.sandbox.engine.connection.PROBE_TIMEOUT_S", 0.3)
    with (
        _answering(tmp_path / "s", None),
        pytest.raises(SandboxEngineError, match="does not answer as a Docker engine"),
    ):
        Engine.connect(f"unix://{tmp_path}/s")


def test_over_tcp(engine: Engine):
    """The same engine behind a TCP port: requests and the attached stream."""
    path = engine.address.socket_path
    if path is None:
        pytest.skip("the engine is behind TCP already")

    async def relay() -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_unix_connection(path)
            pumps = [_pump(reader, there[1]), _pump(there[0], writer)]
            await asyncio.gather(*pumps)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            await asyncio.to_thread(_use_over_tcp, f"tcp://127.0.0.1:{port}")

    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    def _use_over_tcp(host: str) -> None:
        remote = Engine.connect(host)

        async def body(launched: Launched) -> None:
            launched.stream.write(b"over tcp\n")
            assert await read_line(launched.stream) == "over tcp"

        with_container(remote, spec_of(new_owner()), body)
        remote.close()

    asyncio.run(relay())
