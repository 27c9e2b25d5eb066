"""The agent on a socket of its client's: in place of stdin and stdout, and back to them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.sandbox_agent.harness import Agent, wait_until


class Link:
    """A listening socket; `take` moves an agent's client onto what connects."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "s")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.listener.settimeout(30)

    def take(self, agent: Agent) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        agent.move(os.dup(connection.fileno()), os.dup(connection.fileno()))
        return connection


def test_a_linked_agent_serves_its_client_over_the_socket(
    launch: Callable[..., Agent], tmp_path: Path
) -> None:
    link = Link(tmp_path)
    agent = launch("--die-on-eof", "--link", link.path, connect=False)
    with link.take(agent):
        agent.connect()
        ran = agent.run(["/bin/sh", "-c", "cat; echo err >&2"], stdin=b"x" * 300_000)
        assert (ran.stdout, ran.stderr) == (b"x" * 300_000, b"err\n")
        assert ran.exit.status == 0
    agent.drop()


def test_the_end_of_the_link_is_the_end_of_an_agent_that_dies_with_its_client(
    launch: Callable[..., Agent], tmp_path: Path
) -> None:
    link = Link(tmp_path)
    agent = launch("--die-on-eof", "--link", link.path, connect=False)
    with link.take(agent):
        agent.connect()
        agent.started(["/bin/sleep", "1000"])
    agent.drop()
    wait_until(lambda: agent.process.poll() is not None, "the agent ends")


def test_after_the_end_of_the_link_another_client_comes_over_stdin(
    launch: Callable[..., Agent], tmp_path: Path
) -> None:
    link = Link(tmp_path)
    agent = launch("--link", link.path, connect=False)
    assert agent.process.stdin is not None
    assert agent.process.stdout is not None
    with link.take(agent):
        agent.connect()
        agent.request(agent.connection.set_blob(b"kept"))
        agent.started(["/bin/sleep", "1000"])  # killed with its client
    agent.drop()
    agent.move(agent.process.stdin.fileno(), agent.process.stdout.fileno())
    agent.connect(resync=True)
    ran = agent.run(["/bin/echo", "on"])
    assert ran.stdout == b"on\n"
    assert agent.read(agent.connection.get_blob(credit=1000)) == b"kept"


def test_an_agent_without_its_link_says_so_and_uses_stdin(launch: Callable[..., Agent]) -> None:
    agent = launch("--link", "/nowhere/s")
    assert agent.run(["/bin/echo", "on"]).stdout == b"on\n"
    assert agent.said() == "agent: no link: No such file or directory\n"
    agent.stderr.truncate(0)
