"""Reaching a cluster that others started: every form of address, tokens, and what is said when it fails.

One head with a token; each program is another process, somewhere else on the machine.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.jobs.head import Head, running_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

asks_for_tokens = pytest.mark.skipif(
    tuple(map(int, metadata.version("ray").split(".")[:2])) < (2, 52),
    reason="Ray knows tokens from 2.52 on",
)

ROOT = Path(__file__).parents[2]
TOKEN = "open-sesame-" * 4

CONNECT = """
import sys, time
from apothic.backend import connect

began = time.monotonic()
try:
    connect(None, *sys.argv[1:]).list_apps()
    print("connected")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
print(f"{time.monotonic() - began:.1f}")
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(token=TOKEN) as head:
        yield head


def attempt(head: Head, *base_url: str, env: dict[str, str]) -> tuple[str, float]:
    """Have a program connect; give what it says, and how many seconds it took."""
    done = head.run(CONNECT, *base_url, env=env)
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    *lines, seconds = done.stdout.splitlines()
    return "\n".join(lines), float(seconds)


@pytest.mark.parametrize("form", ["host:port", "RAY_ADDRESS", "auto", "auto and RAY_ADDRESS"])
def test_with_the_token(head: Head, form: str) -> None:
    temp = {"RAY_TMPDIR": str(head.directory)}
    said, _ = {
        "host:port": lambda: attempt(head, head.address, env=head.env()),
        "RAY_ADDRESS": lambda: attempt(head, env=head.env(RAY_ADDRESS=head.address)),
        "auto": lambda: attempt(head, "auto", env=head.env(**temp)),
        "auto and RAY_ADDRESS": lambda: attempt(
            head, "auto", env=head.env(RAY_ADDRESS=head.address)
        ),
    }[form]()
    assert said == "connected"


def test_the_token_may_lie_in_a_file(head: Head) -> None:
    env = head.env(token=None, RAY_AUTH_MODE="token")
    env["RAY_AUTH_TOKEN_PATH"] = str(head.directory / ".ray" / "auth_token")
    assert attempt(head, head.address, env=env)[0] == "connected"


@asks_for_tokens
@pytest.mark.parametrize("form", ["host:port", "ray://"])
@pytest.mark.parametrize("token", ["wrong", None])
def test_without_the_token(head: Head, form: str, token: str | None) -> None:
    address = head.address if form == "host:port" else head.client_address
    said, seconds = attempt(head, address, env=head.env(token=token and "another-token"))
    has = "sends none: RAY_AUTH_MODE is not 'token'" if token is None else "sends another one"
    assert said.startswith(
        f"AuthenticationError: the Ray cluster at {address} (from base_url) wants a token, and this "
        f"process {has}"
    )
    assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in said
    assert "another-token" not in said
    assert seconds < 15


@asks_for_tokens
def test_token_mode_without_a_token(head: Head) -> None:
    env = head.env(token=None, RAY_AUTH_MODE="token")
    said, _ = attempt(head, head.address, env=env)
    assert said.startswith("AuthenticationError")
    assert "RAY_AUTH_TOKEN_PATH" in said


@pytest.mark.parametrize("base_url", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_nothing_listens(head: Head, base_url: str) -> None:
    said, seconds = attempt(head, base_url, env=head.env())
    assert said.startswith(f"ConnectionFailedError: no Ray cluster answers at {base_url}")
    assert "ray start --head" in said
    assert seconds < 10


def test_ray_address_is_named_where_it_is_wrong(head: Head) -> None:
    said, _ = attempt(head, env=head.env(RAY_ADDRESS="127.0.0.1:9"))
    assert "answers at 127.0.0.1:9 (from RAY_ADDRESS)" in said
    said, _ = attempt(head, env=head.env(RAY_ADDRESS="head-node"))
    assert said.startswith("InvalidOptionError: RAY_ADDRESS='head-node' is not valid")


def test_something_else_listens(head: Head) -> None:
    address = f"127.0.0.1:{head.ports['dashboard']}"
    said, seconds = attempt(head, address, env=head.env())
    assert said.startswith(f"ConnectionFailedError: the Ray cluster at {address}")
    assert "does not answer as a Ray head does" in said
    assert seconds < 10


def test_another_version_of_ray(head: Head) -> None:
    """The head's own record of its versions is altered for the time of the test."""
    alter = """
import sys
from ray._raylet import GcsClient

client, record = GcsClient(address=sys.argv[1]), (b"CLUSTER_METADATA", b"cluster")
print(client.internal_kv_get(*record).decode())
if sys.argv[2]:
    client.internal_kv_put(record[0], sys.argv[2].encode(), True, record[1])
"""

    def put(metadata: str) -> str:
        done = head.run(alter, head.address, metadata, env=head.env())
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = put("")
    put(json.dumps({**json.loads(before), "ray_version": "2.9.9"}))
    try:
        said, seconds = attempt(head, head.address, env=head.env())
    finally:
        put(before)
    assert said.startswith(f"VersionMismatchError: the Ray cluster at {head.address}")
    assert "2.9.9" in said
    assert "Use the cluster's versions" in said
    assert seconds < 15


def test_a_job_and_a_program_elsewhere_share_a_counter(head: Head) -> None:
    """On nodes that have the package a job needs no runtime environment; it gets the token itself."""
    counter = ROOT / "examples" / "named_counter.py"
    job = head.submit("python named_counter.py", "--working-dir", str(counter.parent))
    assert "counted 1 in" in job
    done = head.run(counter.read_text())
    assert "counted 2 in" in done.stdout, done.stderr
    assert head.run(counter.read_text(), "--close").stdout == "closed\n"


def test_local_starts_one_whatever_ray_address_says(head: Head) -> None:
    code = """
from apothic.backend import connect
connect(None, "local")
import ray
print("address", ray.get_runtime_context().gcs_address)
"""
    done = head.run(code, env=head.env(RAY_ADDRESS=head.address))
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip().endswith(f":{head.ports['gcs']}")
    assert "starting one in this process" in done.stderr


def test_ray_client(head: Head) -> None:
    """Over ray:// everything works but streams, which are refused with what to do."""
    code = """
from apothic import App, enter, exit, method
import apothic.errors as errors

app = App("client-mode")

@app.cls(cpu=0, memory_mb=50)
class Counter:
    def __init__(self):
        self.count = 0

    @method()
    def add(self, by):
        self.count += by
        return self.count

    @method()
    def fail(self):
        raise KeyError("remote")

    @method()
    def items(self):
        yield 1

    @exit()
    def done(self):
        pass

counter = Counter.named("c")
print("calls", counter.add.remote(2), counter.add.map([1, 1]))
try:
    counter.fail.remote()
except KeyError as error:
    print("raised", error)
try:
    next(iter(counter.items.remote_gen()))
except errors.UsageError as error:
    print("stream", error)
info = counter.inspect()
print("inspect", info.state, info.named)
print("listed", [each.instance_id for each in app.client.list_instances()])
app.deploy()
again = app.lookup("client-mode").get_class("Counter").named("c")
print("looked up", again.add.remote(0))
print("closed", [hook.name for hook in counter.close().hooks])
fresh = Counter.new()
print("new", fresh.add.remote(1))
"""
    began = time.monotonic()
    done = head.run(code, env=head.env(RAY_ADDRESS=head.client_address))
    assert done.returncode == 0, done.stdout + done.stderr + head.client_logs()
    assert "calls 2 [3, 4]" in done.stdout
    assert "raised 'remote'" in done.stdout
    assert re.search(r"stream .*cannot stream through a ray:// .*ray job submit", done.stdout)
    assert "inspect ready True" in done.stdout
    assert "listed ['c']" in done.stdout
    assert "looked up 4" in done.stdout
    assert "closed ['done']" in done.stdout
    assert "new 1" in done.stdout
    assert time.monotonic() - began < 90
    left = head.run(
        "from apothic.backend import connect; print(connect().list_instances())",
        env=head.env(RAY_ADDRESS=head.address),
    )
    assert left.stdout == "[]\n", left.stdout + left.stderr


def test_base_url_goes_before_ray_address(head: Head) -> None:
    env = head.env(RAY_ADDRESS="127.0.0.1:9")
    assert attempt(head, head.address, env=env)[0] == "connected"
