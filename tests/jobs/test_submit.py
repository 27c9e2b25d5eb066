"""`ray job submit` to a cluster whose nodes do not have the package: it comes with the job.

The head runs an interpreter that has everything but this distribution, its metadata too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_backend.sandbox.engine.connection import Engine
from tests.docker.support import left_of
from tests.jobs.head import Head, bare_python, running_head
from tests.support import eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    directory = tmp_path_factory.mktemp("bare")
    python = bare_python(directory)
    code = "import ray, pydantic, apothic"
    have = subprocess.run(
        [python, "-c", code], cwd=directory, capture_output=True, text=True, check=False
    )
    assert "No module named 'apothic'" in have.stderr
    with running_head(python) as head:
        yield head


def test_two_jobs_share_a_named_instance(head: Head, tmp_path: Path) -> None:
    # The first brings the package as py_modules, the second in its working directory.
    with_modules = json.dumps({"py_modules": [str(ROOT / "apothic"), str(ROOT / "ray_backend")]})
    first = head.submit(
        "python quickstart.py --keep",
        "--working-dir", str(ROOT / "examples"), "--runtime-env-json", with_modules,
    )  # fmt: skip
    assert "5 searches at once were answered by 2 processes" in first
    assert "sqlite3.OperationalError: unterminated string" in first
    assert first.count("ran close_index") == 2
    [home] = re.findall(r"made 'shared', which lives in process (\d+)", first)
    assert re.search(rf"by its handle: process {home} says '\w*re\w*'", first)
    assert "'shared' is kept" in first

    directory = tmp_path / "job"
    for package in ("apothic", "ray_backend", "examples"):
        shutil.copytree(
            ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    second = head.submit("python examples/quickstart.py --attach", "--working-dir", str(directory))
    assert f"by its name: process {home} says 'http.cookiejar'" in second
    assert f"shared, process {home}: index closed after 2 searches" in second

    # Nothing of either job is left, so that a third, here a program beside the cluster, finds nothing.
    third = head.run(
        "import runpy, sys; sys.argv[1:] = ['--attach']; "
        f"runpy.run_path({str(ROOT / 'examples' / 'quickstart.py')!r}, run_name='__main__')"
    )
    assert "no instance 'shared' lives on this cluster" in third.stderr
    assert third.returncode == 1


SESSION_JOB = """
from apothic import App, Image
from apothic.backend import connect

image = Image.from_registry("apothic-test-busybox")
box = App("job").sandbox(image=image, cpu=0, memory_mb=64)
with box.create(cwd="/work") as session:
    session.write_text("word", "from inside")
    print("SAID", session.exec("cat word").check().stdout)
left_open = box.create()
left_open.exec(["sh", "-c", "sleep 1000 &"]).check()
print("CLUSTER", connect().cluster_id)
"""


@pytest.mark.docker
def test_a_job_opens_sessions_and_leaves_nothing(
    head: Head, tmp_path: Path, docker_engine: Engine
) -> None:
    """The agent comes with the package; what the job left open is closed at its end."""
    (tmp_path / "session_job.py").write_text(SESSION_JOB)
    with_modules = json.dumps({"py_modules": [str(ROOT / "apothic"), str(ROOT / "ray_backend")]})
    said = head.submit(
        "python session_job.py",
        "--working-dir", str(tmp_path), "--runtime-env-json", with_modules,
    )  # fmt: skip
    assert "SAID from inside" in said
    found = re.search(r"CLUSTER (\w+)", said)
    assert found is not None
    cluster = found[1]
    eventually(lambda: not left_of(docker_engine, cluster))


def test_a_cluster_without_the_package_says_so(head: Head) -> None:
    """A program beside the cluster brings no package along; the error names it, within seconds."""
    code = """
import sys, time
sys.path[:] = [each for each in sys.path if each]  # Ray hands the current directory to its workers
from apothic import App, method
from apothic.errors import ApothicError

app = App("bare")

@app.cls(cpu=0, memory_mb=50)
class Echo:
    @method()
    def echo(self, word):
        return word

began = time.monotonic()
try:
    print(Echo.new().echo.remote("came back"))
except ApothicError as error:
    print(f"{type(error).__name__}: {error}")
print(f"AFTER {time.monotonic() - began:.1f} s")
"""
    done = head.run(code)
    assert done.returncode == 0, done.stderr
    assert "EnvironmentSetupError: the nodes of this cluster lack 'ray_backend'" in done.stdout
    assert "runtime_env=" in done.stdout
    found = re.search(r"AFTER ([0-9.]+) s", done.stdout)
    assert found is not None
    assert float(found[1]) < 30
