"""A client's life: credit, attaching again, the end, and clients that do not keep to the rules."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_backend.sandbox.agent.constants import (
    BLOB_MAX,
    FRAME_BODY_MAX,
    INPUT_WINDOW,
    MAGIC,
    PROTOCOL_VERSION,
    Capability,
    Channel,
    FrameType,
)
from ray_backend.sandbox.protocol import (
    AgentConnection,
    Done,
    Exited,
    Failed,
    FrameReader,
    Granted,
    Output,
    ProtocolError,
    encode_frame,
)
from tests.sandbox_agent.harness import DEADLINE_S, Agent, marked, memory_kib, running, wait_until

Launch = Callable[..., Agent]


def test_welcome(agent: Agent):
    assert agent.welcome.version == PROTOCOL_VERSION
    assert agent.welcome.input_window == INPUT_WINDOW
    assert Capability.INIT not in agent.welcome.capabilities


def test_the_first_of_all_is_init(launch: Launch, namespace: tuple[str, ...]):
    assert Capability.INIT in launch(wrap=namespace).welcome.capabilities


# Credit.


def test_no_more_comes_than_was_asked_for(agent: Agent):
    stream = agent.start(["sh", "-c", "yes | head -c 100000"], credit=10)
    assert agent.until(stream, Output).data == b"y\n" * 5
    assert agent.run(["echo", "others"]).stdout == b"others\n"
    assert agent.events[stream] == []
    agent.push(agent.connection.credit(stream, Channel.STDOUT, 7))
    assert agent.until(stream, Output).data == b"y\ny\ny\ny"
    agent.push(agent.connection.credit(stream, Channel.STDOUT, 1 << 20))
    assert len(agent.finish(stream).stdout) == 100_000 - 17


def test_a_channel_without_credit_does_not_stall_the_other(agent: Agent):
    stream, data = agent.connection.exec(
        [b"sh", b"-c", b"(yes >&2 &); echo done; sleep 1000"],
        cwd=b"/",
        env=agent.env,
        stdout_credit=100,
        stderr_credit=0,
    )
    agent.push(data)
    event = agent.until(stream, Output)
    assert (event.channel, event.data) == (Channel.STDOUT, b"done\n")
    agent.kill(stream, discard_output=True)


def test_an_end_without_output_needs_no_credit(agent: Agent):
    stream = agent.start(["sh", "-c", "exit 3"], credit=0)
    assert agent.until(stream, Exited).status == 3


def test_what_is_in_the_pipes_waits_for_credit(agent: Agent):
    stream = agent.start(["sh", "-c", "echo out; echo err >&2"], credit=0)
    agent.run(["true"])
    assert agent.events.get(stream, []) == []
    for channel in Channel:
        agent.push(agent.connection.credit(stream, channel, 100))
    ran = agent.finish(stream)
    assert (ran.stdout, ran.stderr) == (b"out\n", b"err\n")


def test_a_program_that_does_not_read_stalls_only_itself(agent: Agent):
    stream = agent.start(["sleep", "1000"], stdin=True)
    sent = 0
    while (window := agent.connection.window(stream)) > 0:
        agent.push(agent.connection.send(stream, bytes(window)))
        sent += window
        agent.run(["true"])
        while any(isinstance(event, Granted) for event in agent.events.get(stream, [])):
            agent.until(stream, Granted)
    assert INPUT_WINDOW <= sent <= INPUT_WINDOW + 65536
    assert agent.run(["cat"], stdin=b"x" * 1_000_000).stdout == b"x" * 1_000_000
    agent.kill(stream)


def test_many_slow_readers_cost_little(agent: Agent, tmp_path: Path):
    (tmp_path / "big").write_bytes(bytes(1 << 22))
    before = memory_kib(agent.pid, "VmHWM")
    for _ in range(100):
        _, data = agent.connection.read(bytes(tmp_path / "big"), credit=1000)
        agent.push(data)
    assert agent.run(["echo", "others"]).stdout == b"others\n"
    assert memory_kib(agent.pid, "VmHWM") < before + 1024


# The blob and the environment.


@pytest.mark.parametrize("size", [0, 1, FRAME_BODY_MAX, FRAME_BODY_MAX + 1, BLOB_MAX])
def test_blob(agent: Agent, size: int):
    assert agent.read(agent.connection.get_blob(credit=BLOB_MAX)) == b""
    for _ in range(3):
        blob = os.urandom(size)
        assert isinstance(agent.request(agent.connection.set_blob(blob)), Done)
        assert agent.read(agent.connection.get_blob(credit=1000)) == blob


def test_a_blob_beyond_the_limit(agent: Agent):
    stream = agent.connection._table.last + 1
    agent.connection.stat(b"/")  # takes the number
    body = bytes(FRAME_BODY_MAX)
    parts = b"".join(encode_frame(FrameType.PART, stream, body) for _ in range(9))
    agent.push(parts + encode_frame(FrameType.SET_BLOB, stream))
    assert agent.until(stream, Failed).errno == errno.EFBIG


def test_environment(launch: Launch):
    agent = launch(env={"A": "1", "B": "two\nlines=", "EMPTY": ""})
    data = agent.read(agent.connection.environ(credit=10))
    assert isinstance(data, bytes)
    assert {b"A=1", b"B=two\nlines=", b"EMPTY="} <= set(data.split(b"\0"))


# Attaching again.


def test_a_new_client_finds_files_blob_and_background_processes(launch: Launch):
    agent = launch()
    agent.request(agent.connection.set_blob(b"kept"))
    left = agent.run(["sh", "-c", "setsid sleep 1000 & echo $!"])
    running = agent.start(["sh", "-c", "echo $$; exec sleep 1000"])
    foreground = int(agent.line(running))
    agent.connect(resync=True)
    assert agent.read(agent.connection.get_blob(credit=100)) == b"kept"
    os.kill(int(left.stdout), 0)
    wait_until(lambda: foreground not in marked(agent.mark), "the lost exec is killed")
    ran = agent.run(["echo", "new"])
    assert (ran.stream, ran.stdout) == (2, b"new\n")
    os.kill(int(left.stdout), signal.SIGKILL)


def frames(agent: Agent, tmp_path: Path) -> bytes:
    """Give requests of every shape, the last of them a large write."""
    connection = agent.connection
    out = b"".join(
        data
        for _, data in (
            connection.stat(b"/"),
            connection.exec([b"true"], cwd=b"/", env={}, stdout_credit=1, stderr_credit=1),
            connection.set_blob(bytes(300_000)),
        )
    )
    stream, data = connection.write(bytes(tmp_path / "half"))
    return out + data + connection.send(stream, b"\xab" * 200_000)


def test_a_new_client_may_attach_in_the_middle_of_any_frame(agent: Agent, tmp_path: Path):
    size = len(frames(agent, tmp_path))
    numbers = random.Random(1)
    cuts = [*range(60), *(numbers.randrange(size) for _ in range(60)), size - 1, size]
    for cut in cuts:
        agent.connect(resync=True)
        agent.push(frames(agent, tmp_path)[:cut])
        agent.connect(resync=True)
        assert agent.run(["echo", "here"]).stdout == b"here\n"
        assert not (tmp_path / "half").exists()


def test_what_was_for_another_client_is_skipped(agent: Agent):
    stream, data = agent.connection.read(b"/dev/zero", credit=10_000_000)
    agent.push(data)
    agent.until(stream, Output)
    agent.connect(resync=True)
    assert agent.run(["echo", "here"]).stdout == b"here\n"


def test_a_hello_inside_of_data_is_data(agent: Agent, tmp_path: Path):
    forged = MAGIC + encode_frame(FrameType.HELLO, 0, struct.pack("<H16s", 1, b"x" * 16))
    content = forged * 1000
    assert isinstance(agent.write(agent.connection.write(bytes(tmp_path / "f")), content), Done)
    assert agent.read(agent.connection.read(bytes(tmp_path / "f"), credit=1 << 20)) == content
    # Also when its writer dies half way: padding completes the frame, which is then dropped whole.
    stream, data = agent.connection.write(bytes(tmp_path / "f"))
    agent.push(data + agent.connection.send(stream, content[:100_000])[:50_000])
    agent.connect(resync=True)
    assert agent.run(["echo", "here"]).stdout == b"here\n"


def test_another_version_is_told_ours(agent: Agent):
    body = struct.pack("<H16s", PROTOCOL_VERSION + 1, b"n" * 16)
    agent.push(MAGIC + encode_frame(FrameType.HELLO, 0, body))
    with pytest.raises(ProtocolError):  # two welcomes are one too many for the old client
        agent.until(0, Done)
    agent.connect(resync=True)
    assert agent.run(["echo", "here"]).stdout == b"here\n"


# Clients that do not keep to the rules.


def request(kind: int, stream: int, body: bytes = b"") -> bytes:
    return encode_frame(kind, stream, body)


EXEC = struct.pack("<IIIII", 0, 0, 0, 1, 0)
HOSTILE = {
    "type 0": request(0, 1),
    "unknown type": request(0x7F, 1),
    "a type of the agent": request(FrameType.EXIT, 1),
    "stream 0": request(FrameType.STAT, 0, b"\0\0\0\0/"),
    "too long": struct.pack("<IIB", FRAME_BODY_MAX + 1, 1, FrameType.STAT),
    "much too long": b"\xff" * 9,
    "no trailer": request(FrameType.STAT, 1, b"\0\0\0\0/")[:-1] + b"\0",
    "never opened": request(FrameType.KILL, 7, b"\0\0\0\0\0"),
    "opened twice": request(FrameType.STAT, 1, b"\0\0\0\0/") * 2,
    "descending": request(FrameType.STAT, 5, b"\0\0\0\0/")
    + request(FrameType.STAT, 4, b"\0\0\0\0/"),
    "empty stat": request(FrameType.STAT, 1),
    "relative path": request(FrameType.STAT, 1, b"\0\0\0\0x"),
    "NUL in a path": request(FrameType.STAT, 1, b"\0\0\0\0/a\0b"),
    "short read": request(FrameType.READ, 1, b"\0" * 19),
    "name longer than the frame": request(FrameType.RENAME, 1, b"\0\0\0\0\xff\xff/a"),
    "exec without strings": request(FrameType.EXEC, 1, EXEC),
    "exec without program": request(
        FrameType.EXEC, 1, struct.pack("<IIIII", 0, 0, 0, 0, 0) + b"/\0\0"
    ),
    "exec without end": request(FrameType.EXEC, 1, EXEC + b"/\0\0true"),
    "exec with more than it counts": request(FrameType.EXEC, 1, EXEC + b"/\0\0true\0x\0"),
    "exec that counts to 2^32": request(
        FrameType.EXEC, 1, struct.pack("<IIIII", 0, 0, 0, 2**32 - 1, 2**32 - 1) + b"/\0\0true\0"
    ),
    "relative cwd": request(FrameType.EXEC, 1, EXEC + b"x\0\0true\0"),
    "part of what has none": request(FrameType.PART, 1, b"\0\0\0\0/") + request(FrameType.STAT, 1),
    "broken off": request(FrameType.PART, 1, b"x") + request(FrameType.STAT, 2, b"\0\0\0\0/"),
    "too many parts": request(FrameType.PART, 1, bytes(FRAME_BODY_MAX)) * 65,
    "data for a read": request(FrameType.READ, 1, b"\0" * 20 + b"/dev/zero")
    + request(FrameType.DATA, 1, b"x"),
    "credit on no channel": request(FrameType.STAT, 1, b"\0\0\0\0/")
    + request(FrameType.CREDIT, 1, b"\7\1\0\0\0"),
    "kill of a file": request(FrameType.READ, 1, b"\0" * 20 + b"/dev/zero")
    + request(FrameType.KILL, 1, b"\0\0\0\0\0"),
    "signal 0": request(FrameType.STAT, 1, b"\0\0\0\0/") + request(FrameType.SIGNAL, 1, b"\0"),
    "short hello": request(FrameType.HELLO, 0, b"x"),
}


@pytest.mark.parametrize("row", HOSTILE)
def test_nonsense_is_answered_and_the_next_client_served(agent: Agent, row: str):
    agent.push(HOSTILE[row])
    assert gave_up(agent)
    agent.connect(resync=True)
    assert agent.run(["echo", "here"]).stdout == b"here\n"


def test_data_beyond_the_window(agent: Agent):
    stream = agent.start(["sleep", "1000"], stdin=True)
    for _ in range(INPUT_WINDOW // FRAME_BODY_MAX + 1):
        agent.push(request(FrameType.DATA, stream, bytes(FRAME_BODY_MAX)))
    assert gave_up(agent) == "more data than was granted"
    agent.connect(resync=True)
    assert agent.run(["echo", "here"]).stdout == b"here\n"


def gave_up(agent: Agent) -> str:
    """Wait until the agent says why it has dropped us; gives what it said."""
    reader = FrameReader()
    while True:
        agent._write()
        if not any(key.fd == agent.from_agent for key, _ in agent.selector.select(30)):
            continue
        for kind, _, body in reader.feed(os.read(agent.from_agent, 65536)):
            if kind == FrameType.FATAL:
                return bytes(body).decode()


def test_garbage(agent: Agent):
    """Random bytes, and valid traffic with some bytes changed; nothing of it can change a file."""
    numbers = random.Random(7)
    before = memory_kib(agent.pid, "VmHWM")
    for turn in range(150):
        agent.connect(resync=True)
        connection = agent.connection
        if turn % 3 == 0:
            data = bytearray(numbers.randbytes(numbers.randrange(1, 3000)))
        else:
            pieces = [
                connection.stat(b"/etc/passwd")[1],
                connection.read(b"/etc/passwd", credit=100)[1],
                connection.list_directory(b"/etc", credit=500)[1],
                connection.set_blob(numbers.randbytes(50))[1],
                connection.exec([b"true"], cwd=b"/", env={}, stdout_credit=9, stderr_credit=9)[1],
                connection.get_blob(credit=9)[1],
                connection.environ(credit=9)[1],
            ]
            data = bytearray(b"".join(pieces))
            for _ in range(numbers.randrange(1, 5)):
                # Types and paths stay what they are: only lengths, ids and numbers are tried.
                at = numbers.choice([i for i, byte in enumerate(data) if byte in (0, 9, 100)])
                data[at] = numbers.choice([0, 1, 0x7F, 0x80, 0xFF])
        agent.push(bytes(data))
        agent.reading = turn % 2 == 0
        with contextlib.suppress(ProtocolError):
            agent.step(0)
        agent.reading = True
    agent.connect(resync=True)
    assert agent.run(["echo", "here"]).stdout == b"here\n"
    assert memory_kib(agent.pid, "VmHWM") < before + 16384, "sanitizers keep some of what is freed"


def test_a_client_that_never_reads_makes_nothing_grow(agent: Agent):
    before = memory_kib(agent.pid)
    asked = b"".join(agent.connection.stat(b"/etc/passwd")[1] for _ in range(20_000))
    agent.reading = False
    agent.push(asked)
    while agent.unsent and agent.selector.select(0.0):
        left = len(agent.unsent)
        agent._write()
        if len(agent.unsent) == left:
            break
    wait_until(lambda: sleeping(agent), "the agent waits for us to read")
    assert memory_kib(agent.pid) < before + 1024
    agent.reading = True
    while agent.connection.open_streams:
        agent.step(30)
    assert agent.run(["echo", "here"]).stdout == b"here\n"


def sleeping(agent: Agent) -> bool:
    return Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


# The end.


def test_the_end_of_stdin_ends_everything(any_agent: Agent):
    script = "trap '' TERM; setsid sleep 1000 & sleep 1000 & (sleep 1000; :)"
    any_agent.run(["sh", "-c", "setsid sleep 1000 & :"])
    any_agent.started(["sh", "-c", script])
    assert any_agent.process.stdin is not None
    any_agent.process.stdin.close()
    assert any_agent.gone() == 0


def test_the_end_of_stdin_counts_while_nobody_reads(any_agent: Agent):
    stream = any_agent.start(["yes"], credit=1 << 30)
    any_agent.until(stream, Output)
    any_agent.reading = False
    # Requests whose answers have no room are left in stdin, and the end is behind them.
    any_agent.push(b"".join(any_agent.connection.stat(b"/")[1] for _ in range(20_000)))
    wait_until(lambda: sleeping(any_agent), "the agent waits for somebody to read")
    assert any_agent.process.stdin is not None
    any_agent.process.stdin.close()
    assert any_agent.process.wait(DEADLINE_S) == 0
    any_agent.reading = True
    assert any_agent.gone() == 0


def test_without_the_flag_the_end_of_stdin_ends_nothing(checked_agent: Path, tmp_path: Path):
    """A named session: another client comes, on the same pipes."""
    os.mkfifo(tmp_path / "in")
    os.mkfifo(tmp_path / "out")
    shell = f'exec "$0" "$@" <{tmp_path}/in >{tmp_path}/out'
    process = subprocess.Popen(["sh", "-c", shell, str(checked_agent)])
    try:
        for _ in range(3):
            to_agent = os.open(tmp_path / "in", os.O_WRONLY)
            from_agent = os.open(tmp_path / "out", os.O_RDONLY)
            connection = AgentConnection()
            os.write(to_agent, connection.hello(os.urandom(16), resync=True))
            while not connection.ready:
                connection.receive(os.read(from_agent, 65536))
            _, data = connection.stat(b"/")
            os.write(to_agent, data)
            while connection.open_streams:
                connection.receive(os.read(from_agent, 65536))
            os.close(to_agent)
            os.close(from_agent)
            assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_sigterm_ends_everything(launch: Launch):
    agent = launch()
    agent.started(["sh", "-c", "trap '' TERM; sleep 1000"])
    agent.process.send_signal(signal.SIGTERM)
    assert agent.gone() == 0


def test_a_killed_agent_leaves_nothing(launch: Launch):
    """Its keepers see that it is gone; PID 1 needs no such care."""
    agent = launch()
    agent.started(["sh", "-c", "trap '' TERM; setsid sleep 1000 & sleep 1000"])
    agent.process.kill()
    assert agent.gone() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("own", "then"), [("", "127.0.0.1\tlocalhost"), ("127.0.0.9 mine", "127.0.0.9 mine")]
)
def test_localhost_is_named_where_the_image_does_not(
    namespace: tuple[str, ...], shipped_agent: Path, tmp_path: Path, own: str, then: str
):
    """As PID 1 of a container without a network, whose ``/etc/hosts`` is the image's."""
    hosts = tmp_path / "hosts"
    hosts.write_text(own)
    script = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    with running(shipped_agent, wrap=(*namespace, "sh", "-c", script, "sh")) as agent:
        assert agent.run(["head", "-n", "1", "/etc/hosts"]).stdout.decode() == then + "\n" * (
            not own
        )
    assert hosts.read_text().startswith(then)
