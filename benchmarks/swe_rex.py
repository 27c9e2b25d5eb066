"""SWE-ReX's server in a container of a derived image, reached over loopback by its own client."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import secrets
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Coroutine, Iterator
from typing import Any

__all__ = ["NotInstallableError", "SweRex", "swe_rex"]

VERSION = "1.4.0"
DIRECTORY = "/opt/swe-rex"
IMAGE = "apothic-bench-swe-rex"
INSTALL_S = 120
START_S = 60


class NotInstallableError(Exception):
    """SWE-ReX cannot be had here."""


class SweRex:
    """A server in a container, and one client of it on an event loop of its own."""

    def __init__(self, runtime: Any, loop: asyncio.AbstractEventLoop) -> None:
        from swerex.runtime import abstract  # type: ignore[import-not-found]

        self._runtime = runtime
        self._loop = loop
        self._words = abstract
        self._true = abstract.Command(command=["/bin/true"], shell=False)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def execute(self) -> Any:
        return self._wait(self._runtime.execute(self._true))

    def execute_at_once(self, count: int) -> Any:
        async def all_of_them() -> Any:
            return await asyncio.gather(*(self._runtime.execute(self._true) for _ in range(count)))

        return self._wait(all_of_them())

    def write(self, path: str, content: str) -> Any:
        request = self._words.WriteFileRequest(path=path, content=content)
        return self._wait(self._runtime.write_file(request))

    def read(self, path: str) -> Any:
        return self._wait(self._runtime.read_file(self._words.ReadFileRequest(path=path)))

    def upload(self, source: str, target: str) -> Any:
        request = self._words.UploadRequest(source_path=source, target_path=target)
        return self._wait(self._runtime.upload(request))


@contextlib.contextmanager
def swe_rex(docker: Any, base: str) -> Iterator[SweRex]:
    """Install it, derive an image from ``base``, and start it; all is removed at the end.

    Args:
        docker: a client of docker-py.
        base: an image with a ``python3``.

    Raises:
        NotInstallableError: no wheels for that Python, no registry, or this process cannot be its
            client.
    """
    with contextlib.ExitStack() as undo:
        packages = undo.enter_context(tempfile.TemporaryDirectory(prefix="apothic-bench-"))
        _install(packages, _python_version(docker, base))
        sys.path.append(packages)
        undo.callback(sys.path.remove, packages)
        try:
            from swerex.runtime.remote import (  # type: ignore[import-not-found]
                RemoteRuntime,
            )
        except ImportError as error:
            raise NotInstallableError(f"its client cannot be imported: {error}") from error
        _build(docker, base, packages)
        undo.callback(docker.images.remove, IMAGE, force=True)
        port, token = _free_port(), secrets.token_hex(16)
        container = docker.containers.run(
            IMAGE,
            f"python3 -m swerex.server --host 127.0.0.1 --port {port} --auth-token {token}",
            environment={"PYTHONPATH": DIRECTORY},
            network_mode="host",
            init=True,
            detach=True,
        )
        undo.callback(container.remove, force=True)
        loop = asyncio.new_event_loop()
        undo.callback(loop.close)
        runtime = RemoteRuntime(
            host="http://127.0.0.1",
            port=port,
            auth_token=token,
            timeout=START_S,
            logger=logging.getLogger(__name__),  # its own tells of every request
        )
        loop.run_until_complete(runtime.wait_until_alive(timeout=START_S))
        yield SweRex(runtime, loop)


def _python_version(docker: Any, image: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    said: bytes = docker.containers.run(image, ["python3", "-c", code], remove=True)
    return said.decode().strip()


def _install(target: str, python_version: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", target, "--only-binary=:all:", "--python-version", python_version]
    try:
        subprocess.run(
            [*command, f"swe-rex=={VERSION}"],
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
    except subprocess.CalledProcessError as error:
        raise NotInstallableError(str(error.stderr).strip().splitlines()[-1]) from error
    except subprocess.TimeoutExpired as error:
        raise NotInstallableError(f"pip took more than {INSTALL_S} s") from error


def _build(docker: Any, base: str, packages: str) -> None:
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        archive.add(packages, "packages")
        dockerfile = f"FROM {base}\nCOPY packages {DIRECTORY}\n".encode()
        member = tarfile.TarInfo("Dockerfile")
        member.size = len(dockerfile)
        archive.addfile(member, io.BytesIO(dockerfile))
    context.seek(0)
    docker.images.build(fileobj=context, custom_context=True, tag=IMAGE, rm=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
