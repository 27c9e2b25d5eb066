"""A cluster of its own, as an operator starts one: a head with dashboard, ports and files apart."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
import uuid
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import eventually, processes_of_run, processes_of_session

HEAD_VARIABLE = "APOTHIC_TEST_HEAD"
_PORTS = ("gcs", "dashboard", "client", "agent")


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        python: the interpreter that its nodes and its jobs run.
        directory: its files; also the home directory of its processes.
        token: what it wants to see, or None.
    """

    python: Path
    directory: Path
    ports: dict[str, int]
    token: str | None

    @property
    def address(self) -> str:
        """Where nodes and drivers connect to."""
        return f"127.0.0.1:{self.ports['gcs']}"

    @property
    def client_address(self) -> str:
        """Where Ray Client connects to."""
        return f"ray://127.0.0.1:{self.ports['client']}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted to."""
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    def client_logs(self) -> str:
        """Give what the servers of Ray Client have written."""
        found = self.directory.glob("ray/session_latest/logs/ray_client_server*")
        return "".join(f"\n== {path.name}\n{path.read_text()}" for path in sorted(found))

    def env(self, *, token: str | None = "right", **variables: str) -> dict[str, str]:
        """Give the environment of a process that is to use it.

        Args:
            token: "right", another one, or None for a process that knows of no token.
            **variables: more variables.
        """
        env = clean_env(self.directory / "elsewhere")
        if self.token is not None and token is not None:
            env["RAY_AUTH_MODE"] = "token"
            env["RAY_AUTH_TOKEN"] = self.token if token == "right" else token
        return {**env, **variables}

    def run(
        self, code: str, *args: str, env: dict[str, str] | None = None, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of a user, elsewhere on this machine."""
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            env=env or self.env(RAY_ADDRESS=self.address),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, entrypoint: str, *options: str, timeout_s: float = 90) -> str:
        """Run ``ray job submit`` to the end of the job; give what it printed, the job's log in it.

        Options come before the entry point, as one would type them.
        """
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address",
             self.dashboard, *options, "--", *entrypoint.split()],
            env=self.env(),
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout


@contextmanager
def running_head(python: Path = Path(sys.executable), token: str | None = None) -> Iterator[Head]:
    """Start a head; end it by ending its own processes, and no others."""
    with ExitStack() as stack:
        # Sockets lie in it: its name must be short.
        directory = Path(tempfile.mkdtemp(prefix="apothic-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        (directory / "elsewhere").mkdir()
        head = Head(python, directory, free_ports(), token)
        mark = uuid.uuid4().hex
        env = clean_env(directory)
        env.update(
            {
                HEAD_VARIABLE: mark,
                "PATH": f"{python.parent}:{env['PATH']}",  # jobs run the `python` that is found there
                "RAY_AUTH_MODE": "token" if token else "disabled",
                "RAY_TMPDIR": str(directory),
            }
        )
        if token:
            (directory / ".ray").mkdir()
            (directory / ".ray" / "auth_token").write_text(token)
        log = stack.enter_context(open(directory / "head.log", "w+"))
        process = subprocess.Popen(
            [python, "-m", "ray.scripts.scripts", "start", "--head", "--block",
             "--num-cpus=4", "--include-dashboard=true", "--disable-usage-stats",
             f"--port={head.ports['gcs']}", f"--dashboard-port={head.ports['dashboard']}",
             f"--ray-client-server-port={head.ports['client']}",
             f"--dashboard-agent-listen-port={head.ports['agent']}",
             "--object-store-memory=100000000"],
            env=env,
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process, mark)
        eventually(lambda: _answers(head) or process.poll() is not None, 90)
        assert process.poll() is None, (directory / "head.log").read_text()
        yield head


def bare_python(directory: Path) -> Path:
    """Make an interpreter that has all packages of this one but ours, as nodes may be."""
    venv.create(directory, symlinks=True)
    [packages] = directory.glob("lib/python3*/site-packages")
    import ray

    for entry in Path(ray.__file__).parents[1].iterdir():
        ours = entry.name.startswith(("apothic", "_apothic", "ray_backend"))
        if not ours and entry.suffix not in (".pth", ".pyc") and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry)
    return directory / "bin" / "python"


def clean_env(home: Path) -> dict[str, str]:
    """Give this process's environment without what it says about Ray, and another home directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PYTHONUNBUFFERED": "1"}


def free_ports() -> dict[str, int]:
    """Find ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in _PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(_PORTS, sockets, strict=True)}


def _answers(head: Head) -> bool:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/")
    if head.token:
        request.add_header("Authorization", f"Bearer {head.token}")
    try:
        with (
            urllib.request.urlopen(request, timeout=5),
            socket.create_connection(("127.0.0.1", head.ports["client"]), timeout=5),
        ):
            return True
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the head and whatever it started, known by a variable in the environment of them all.

    Some write their title over it; they are of its session.
    """

    def killed() -> bool:
        left = processes_of_run(HEAD_VARIABLE, mark).keys() | processes_of_session(process.pid)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    eventually(killed)
    process.wait()
