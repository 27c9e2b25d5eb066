"""A Docker engine of a test's own, which it may stop, kill and start again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apothic.errors import SandboxEngineError
from ray_backend.sandbox.engine.connection import Engine
from tests.docker.support import BUSYBOX
from tests.support import eventually, process_is_gone


class OwnEngine:
    """A ``dockerd`` in a directory and a network namespace of its own.

    Without the namespace it would remove the machine's ``docker0``, which ``--bridge=none`` does.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self._directory = directory
        self.host = f"unix://{directory}/sock"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        at = self._directory
        containerd = at / "exec" / "containerd" / "containerd.pid"
        if containerd.exists() and process_is_gone(int(containerd.read_text())):
            containerd.unlink()  # it died with its dockerd, and this machine may keep its zombie
        with (at / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "unshare", "--net", "dockerd", f"--data-root={at}/data", f"--exec-root={at}/exec",
                    f"--pidfile={at}/pid", f"--host={self.host}", "--bridge=none",
                    "--iptables=false", "--storage-driver=vfs", *self._options,
                ],
                stdout=log,
                stderr=log,
            )  # fmt: skip
        eventually(self._answers, 60)

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(timeout=60)

    def end(self) -> None:
        """Stop it with all that belongs to it, after a kill as well; remove its directory."""
        if self._process is not None and self._process.poll() is not None:
            self.start()  # only it ends the containers and the containerd that a killed one left
        with contextlib.suppress(SandboxEngineError), contextlib.closing(self.connect()) as engine:
            for found in engine.list_containers({}):
                engine.remove(found.id)
        self.stop()
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if str(self._directory) in (point := line.split()[1]):
                subprocess.run(["umount", point], check=True)
        shutil.rmtree(self._directory)

    def connect(self) -> Engine:
        before = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = self.host
        try:
            return Engine.connect()
        finally:
            if before is None:
                del os.environ["DOCKER_HOST"]
            else:
                os.environ["DOCKER_HOST"] = before

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()
        with contextlib.suppress(SandboxEngineError):
            self.connect().close()
            return True
        return False


@contextlib.contextmanager
def own_engine(template: Engine, *options: str) -> Iterator[OwnEngine]:
    """Run one that has the small base image; ``options`` are dockerd's."""
    with tempfile.TemporaryDirectory(prefix="apothic-d", ignore_cleanup_errors=True) as directory:
        own = OwnEngine(Path(directory), *options)
        own.start()
        try:
            with contextlib.closing(own.connect()) as engine:
                for _ in engine.api.load_image(template.api.get_image(BUSYBOX)):
                    pass
            yield own
        finally:
            own.end()
