"""Drive an agent over pipes: real processes, no container.

Waiting is always for an event or for a fact, with a deadline that only a failing test reaches.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray_backend.sandbox.agent.constants import Channel
from ray_backend.sandbox.protocol import (
    AgentConnection,
    Done,
    Entry,
    Event,
    Exited,
    Failed,
    Granted,
    Killed,
    Listed,
    Opened,
    Output,
    ProtocolError,
    Started,
    Welcome,
)

DEADLINE_S = 30.0
CREDIT = 1 << 20
ENV = {b"PATH": b"/usr/local/bin:/usr/bin:/bin"}
MARK = "APOTHIC_TEST_MARK"

E = TypeVar("E")


def wait_until(fact: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that no descriptor tells of."""
    give_up = time.monotonic() + deadline_s
    while not fact():
        assert time.monotonic() < give_up, f"still not so after {deadline_s} s: {what}"
        os.sched_yield()


def marked(mark: str) -> dict[int, str]:
    """Give the processes, zombies left out, that carry a mark in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode("ascii", "replace")
    return found


def memory_kib(pid: int, field: str = "VmRSS") -> int:
    """Give a figure of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise AssertionError(f"{field} of {pid}")


@dataclass
class Ran:
    """What became of an exec."""

    stream: int
    stdout: bytes
    stderr: bytes
    end: Exited | Failed

    @property
    def exit(self) -> Exited:
        assert isinstance(self.end, Exited), self.end
        return self.end

    @property
    def failed(self) -> Failed:
        assert isinstance(self.end, Failed), (self.end, self.stdout, self.stderr)
        return self.end


class Agent:
    """One agent process and one client of it; events wait here by stream."""

    def __init__(
        self,
        binary: Path,
        *arguments: str,
        wrap: Sequence[str] = (),
        env: dict[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
        connect: bool = True,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the agent
        self.process = subprocess.Popen(
            [*wrap, str(binary), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env={
                **(os.environ if env is None else env),
                "ASAN_OPTIONS": "detect_leaks=0",
                MARK: self.mark,
            },
            preexec_fn=preexec,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.selector = selectors.DefaultSelector()
        self.move(self.process.stdin.fileno(), self.process.stdout.fileno())
        if connect:
            self.connect()

    def move(self, to_agent: int, from_agent: int) -> None:
        """Speak over these descriptors from now on."""
        for known in list(self.selector.get_map()):
            self.selector.unregister(known)
        self.to_agent, self.from_agent = to_agent, from_agent
        os.set_blocking(to_agent, False)
        os.set_blocking(from_agent, False)
        self.selector.register(from_agent, selectors.EVENT_READ)

    def drop(self) -> None:
        """Close both descriptors, as the death of a client does."""
        for known in list(self.selector.get_map()):
            self.selector.unregister(known)
        os.close(self.to_agent)
        os.close(self.from_agent)
        self.eof = True

    def connect(self, *, resync: bool = False) -> None:
        """Become a new client of the same agent."""
        self.connection = AgentConnection()
        self.unsent = bytearray()
        self.events: dict[int, list[Event]] = {}
        self.eof = False
        self.reading = True
        self.push(self.connection.hello(os.urandom(16), resync=resync))
        self.welcome = self.until(0, Welcome)

    @property
    def env(self) -> dict[bytes, bytes]:
        return {**ENV, MARK.encode(): self.mark.encode()}

    # Moving bytes.

    def push(self, data: bytes) -> None:
        self.unsent += data
        self._write()

    def _write(self) -> None:
        while self.unsent:
            try:
                n = os.write(self.to_agent, memoryview(self.unsent)[: 1 << 16])
            except BlockingIOError:
                break
            except BrokenPipeError:
                self.unsent.clear()
                break
            del self.unsent[:n]
        known = self.to_agent in self.selector.get_map()
        if self.unsent and not known:
            self.selector.register(self.to_agent, selectors.EVENT_WRITE)
        elif not self.unsent and known:
            self.selector.unregister(self.to_agent)

    def step(self, timeout_s: float) -> bool:
        """Move what can be moved; gives whether anything happened."""
        ready = self.selector.select(timeout_s)
        for key, _ in ready:
            if key.fd == self.to_agent:
                self._write()
            elif self.reading:
                data = os.read(self.from_agent, 1 << 18)
                if not data:
                    self.eof = True
                    self.selector.unregister(self.from_agent)
                for event in self.connection.receive(data) if data else ():
                    self.events.setdefault(getattr(event, "stream", 0), []).append(event)
        return bool(ready)

    def until(self, stream: int, *kinds: type[E]) -> E:
        """Wait for the stream's next event of these kinds and take it, leaving the others."""
        give_up = time.monotonic() + DEADLINE_S
        while True:
            waiting = self.events.get(stream, [])
            for event in waiting:
                if isinstance(event, kinds):
                    waiting.remove(event)
                    return event
            if Failed not in kinds and any(isinstance(event, Failed) for event in waiting):
                raise AssertionError(f"{waiting}")
            assert not self.eof, f"the agent is gone: {self.said()}"
            assert time.monotonic() < give_up, f"no {kinds} of stream {stream}: {waiting}"
            self.step(1.0)

    def said(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode("utf-8", "replace")

    # Verbs.

    def start(
        self,
        argv: Sequence[bytes | str],
        *,
        cwd: bytes = b"/",
        env: dict[bytes, bytes] | None = None,
        user: bytes = b"",
        stdin: bool = False,
        tell_start: bool = False,
        credit: int = CREDIT,
    ) -> int:
        """Send an exec without waiting for anything."""
        stream, data = self.connection.exec(
            [os.fsencode(part) for part in argv],
            cwd=cwd,
            env=self.env | (env or {}),
            user=user,
            stdin=stdin,
            tell_start=tell_start,
            stdout_credit=credit,
            stderr_credit=credit,
        )
        self.push(data)
        return stream

    def started(self, argv: Sequence[bytes | str], **options: object) -> int:
        """Start an exec and wait until its program runs."""
        stream = self.start(argv, tell_start=True, **options)  # type: ignore[arg-type]
        self.until(stream, Started)
        return stream

    def finish(self, stream: int, stdin: bytes | None = None) -> Ran:
        """Read all that an exec writes, giving credit as it comes, until its end."""
        streams = {Channel.STDOUT: bytearray(), Channel.STDERR: bytearray()}
        rest = memoryview(stdin or b"")
        open_input = stdin is not None
        while True:
            if open_input:
                n = min(len(rest), self.connection.window(stream))
                if n:
                    self.push(self.connection.send(stream, rest[:n]))
                    rest = rest[n:]
                if not rest:
                    self.push(self.connection.end(stream))
                    open_input = False
            event = self.until(stream, Started, Output, Granted, Exited, Failed)
            if isinstance(event, Output):
                streams[event.channel] += event.data
                self.push(self.connection.credit(stream, event.channel, len(event.data)))
            if isinstance(event, Exited | Failed):
                out, err = (bytes(data) for data in streams.values())
                return Ran(stream, out, err, event)

    def run(
        self, argv: Sequence[bytes | str], stdin: bytes | None = None, **options: object
    ) -> Ran:
        return self.finish(
            self.start(argv, stdin=stdin is not None, **options),  # type: ignore[arg-type]
            stdin,
        )

    def line(self, stream: int) -> bytes:
        """Wait until a program has written a whole line, and take what it has written."""
        text = b""
        while not text.endswith(b"\n"):
            text += self.until(stream, Output).data
        return text

    def kill(self, stream: int, grace_ms: int = 0, *, discard_output: bool = False) -> None:
        """Kill an exec and wait until nothing of it is alive."""
        self.push(self.connection.kill(stream, grace_ms=grace_ms, discard_output=discard_output))
        self.until(stream, Killed)

    def request(self, opened: tuple[int, bytes]) -> Done | Failed:
        stream, data = opened
        self.push(data)
        ended: Done | Failed = self.until(stream, Done, Failed)
        return ended

    def read(self, opened: tuple[int, bytes]) -> bytes | Failed:
        stream, data = opened
        self.push(data)
        content = bytearray()
        while True:
            event: Opened | Output | Done | Failed = self.until(
                stream, Opened, Output, Done, Failed
            )
            if isinstance(event, Output):
                content += event.data
                self.push(self.connection.credit(stream, event.channel, len(event.data)))
            elif isinstance(event, Done):
                return bytes(content)
            elif isinstance(event, Failed):
                return event

    def write(self, opened: tuple[int, bytes], content: bytes) -> Done | Failed:
        stream, data = opened
        self.push(data)
        rest = memoryview(content)
        while rest:
            n = min(len(rest), self.connection.window(stream))
            self.push(self.connection.send(stream, rest[:n]))
            rest = rest[n:]
            if rest and not self.connection.window(stream):
                event = self.until(stream, Granted, Failed)
                if isinstance(event, Failed):
                    return event
        self.push(self.connection.end(stream))
        ended: Done | Failed = self.until(stream, Done, Failed)
        return ended

    def names(self, path: bytes, credit: int = CREDIT) -> list[Entry] | Failed:
        stream, data = self.connection.list_directory(path, credit=credit)
        self.push(data)
        entries: list[Entry] = []
        while True:
            event: Listed | Done | Failed = self.until(stream, Listed, Done, Failed)
            if isinstance(event, Listed):
                entries += event.entries
                self.push(self.connection.credit(stream, Channel.STDOUT, event.cost))
            elif isinstance(event, Done):
                return entries
            elif isinstance(event, Failed):
                return event

    # The end.

    @property
    def pid(self) -> int:
        """The agent's own id, seen from here, also where something else started it."""
        pid = self.process.pid
        while Path(f"/proc/{pid}/comm").read_text().strip() != "agent":
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return pid

    def gone(self) -> int:
        """Wait until the agent has ended and nothing that it started is alive."""
        with contextlib.suppress(ProtocolError):
            while not self.eof:
                assert self.step(DEADLINE_S), "the agent does not end"
        status = self.process.wait(DEADLINE_S)
        wait_until(lambda: not marked(self.mark), f"gone: {marked(self.mark)}")
        return status

    def close(self) -> None:
        """End the agent as the death of its client does; nothing may be left, nothing said."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(KeyError):
                self.selector.unregister(self.to_agent)
            self.process.stdin.close()
        try:
            if "--die-on-eof" not in self.process.args:  # type: ignore[operator]
                self.process.send_signal(signal.SIGTERM)
            self.gone()
        finally:
            self.process.kill()
            self.process.wait()
            for pid in marked(self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            said = self.said()
            self.selector.close()
            self.stderr.close()
            assert self.process.stdout is not None
            self.process.stdout.close()
        assert not said, said


def keepers(agent: Agent) -> list[int]:
    """Give the agent's children: one for each exec of which something is alive, and who rests."""
    found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in found]


def state(pid: int) -> str:
    """Give the letter for what a process does, as `ps` shows it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def running(binary: Path, *arguments: str, **options: object) -> Iterator[Agent]:
    """Have an agent for a while."""
    agent = Agent(binary, *(arguments or ("--die-on-eof",)), **options)  # type: ignore[arg-type]
    try:
        yield agent
    finally:
        agent.close()
