"""The agent's binaries, made once a session, and agents that must leave nothing behind."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ray_backend.sandbox.agent import build
from ray_backend.sandbox.agent.binaries import agent_binary
from tests.sandbox_agent.harness import Agent, running
from tests.support import unable

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture(scope="session")
def compiler() -> str:
    """Give the system's C compiler: the agent with sanitizers and the programs of tests need it."""
    if shutil.which("cc") is None:
        unable("no C compiler (cc) on PATH")
    return "cc"


@pytest.fixture(scope="session")
def checked_agent(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the agent with sanitizers; where there is no compiler, the tests cannot run."""
    if sys.platform != "linux":
        pytest.skip("the agent runs on Linux")
    return build.build_checked(tmp_path_factory.mktemp("agent") / "agent-checked", cc=compiler)


@pytest.fixture(scope="session")
def shipped_agent() -> Path:
    """Give the agent as it is shipped, for this machine; built anew if its sources have changed."""
    if sys.platform != "linux":
        pytest.skip("the agent runs on Linux")
    build.build()
    return agent_binary(platform.machine())


@pytest.fixture(scope="session")
def namespace() -> tuple[str, ...]:
    """Give the words that make a command PID 1 of a namespace of its own."""
    if shutil.which("unshare") is None:
        unable("no unshare (util-linux) on PATH")
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        unable(f"no process-id namespace can be made here: {tried.stderr.strip()}")
    return NAMESPACE


@pytest.fixture
def launch(checked_agent: Path) -> Iterator[Callable[..., Agent]]:
    """Give what starts an agent with sanitizers; each ends, and leaves nothing, with the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(
            running(checked_agent, *arguments, **options)
        )


@pytest.fixture
def agent(launch: Callable[..., Agent]) -> Agent:
    """Give a running agent that is an ordinary process here."""
    return launch()


@pytest.fixture(params=["process", "init", "shipped"])
def any_agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    """Give a running agent: with sanitizers as an ordinary process and as PID 1, and as shipped."""
    wrap = () if request.param == "process" else request.getfixturevalue("namespace")
    name = "shipped_agent" if request.param == "shipped" else "checked_agent"
    with running(request.getfixturevalue(name), wrap=wrap) as agent:
        yield agent
