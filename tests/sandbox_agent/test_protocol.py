"""The codec alone: bytes in, events out, whatever the bytes."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apothic.errors import ApothicError
from ray_backend.sandbox.agent.constants import (
    FRAME_BODY_MAX,
    FRAME_TRAILER,
    INPUT_WINDOW,
    MAGIC,
    PROTOCOL_VERSION,
    Channel,
    FrameType,
    Stage,
    WriteFlag,
)
from ray_backend.sandbox.protocol import (
    AgentConnection,
    AgentVersionError,
    Done,
    Entry,
    Event,
    Exited,
    Failed,
    FileStat,
    FrameReader,
    Granted,
    Killed,
    Listed,
    Opened,
    Output,
    ProtocolError,
    Started,
    Welcome,
    encode_frame,
)

NONCE = bytes(range(16))
STAT = struct.pack("<IIIIQqQQ", 0o100644, 1, 2, 3, 4, -5, 6, 7)
STAT_VALUE = FileStat(0o100644, 1, 2, 3, 4, -5, 6, 7)
F = FrameType

frames = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=8
)


def welcome(nonce: bytes = NONCE, version: int = PROTOCOL_VERSION) -> bytes:
    body = struct.pack("<H16sII", version, nonce, 2, INPUT_WINDOW)
    return MAGIC + encode_frame(F.WELCOME, 0, body)


def ready() -> AgentConnection:
    connection = AgentConnection()
    connection.hello(NONCE)
    assert [type(event) for event in connection.receive(welcome())] == [Welcome]
    return connection


def execute(connection: AgentConnection, **options: bool) -> int:
    return connection.exec(
        [b"true"], cwd=b"/", env={}, stdout_credit=100, stderr_credit=100, **options
    )[0]


def chop(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


def cut(reader: FrameReader, data: bytes) -> list[tuple[int, int, bytes]]:
    return [(kind, stream, bytes(body)) for kind, stream, body in reader.feed(data)]


# Frames.


@given(frames, st.lists(st.integers(0, 50), max_size=30))
def test_frames_survive_any_chopping(sent: list[tuple[int, int, bytes]], sizes: list[int]):
    reader, got = FrameReader(), []
    data = b"".join(encode_frame(kind, stream, body) for kind, stream, body in sent)
    for piece in chop(data, sizes):
        got += cut(reader, piece)
    assert got == sent


def test_a_frame_byte_by_byte_and_with_more_behind():
    reader = FrameReader()
    frame = encode_frame(7, 8, b"body")
    for at in range(len(frame) - 1):
        assert cut(reader, frame[at : at + 1]) == []
    assert cut(reader, frame[-1:] + frame + frame[:3]) == [(7, 8, b"body")] * 2
    assert cut(reader, frame[3:]) == [(7, 8, b"body")]


def test_frames_beyond_the_limit():
    body = bytes(FRAME_BODY_MAX)
    assert cut(FrameReader(), encode_frame(1, 1, body)) == [(1, 1, body)]
    with pytest.raises(ValueError, match="at most"):
        encode_frame(1, 1, body + b"x")
    with pytest.raises(ProtocolError, match="longer than allowed"):
        cut(FrameReader(), struct.pack("<IIB", FRAME_BODY_MAX + 1, 1, 1))
    with pytest.raises(ProtocolError, match="does not end"):
        cut(FrameReader(), encode_frame(1, 1, b"x")[:-1] + bytes([FRAME_TRAILER ^ 1]))


# The hello.


@given(st.binary(max_size=400), st.lists(st.integers(0, 40), max_size=20))
def test_the_welcome_is_found_behind_anything(noise: bytes, sizes: list[int]):
    connection = AgentConnection()
    connection.hello(NONCE, resync=True)
    other = welcome(bytes(16))
    data = noise + other + noise + MAGIC[:3] + MAGIC + MAGIC + welcome()
    events: list[Event] = []
    for piece in chop(data, sizes):
        events += connection.receive(piece)
    assert [type(event) for event in events] == [Welcome]
    assert connection.ready


def test_waiting_for_the_welcome_keeps_little():
    connection = AgentConnection()
    connection.hello(NONCE)
    for _ in range(100):
        connection.receive(bytes(65536))
    assert len(connection._greeting) < 100


def test_another_version_is_an_error_of_its_own():
    connection = AgentConnection()
    connection.hello(NONCE)
    with pytest.raises(AgentVersionError, match="version 9"):
        connection.receive(welcome(version=9))


def test_nothing_can_be_asked_before_the_welcome():
    connection = AgentConnection()
    with pytest.raises(RuntimeError, match="has not answered"):
        connection.stat(b"/")
    connection.hello(NONCE)
    with pytest.raises(RuntimeError, match="once"):
        connection.hello(NONCE)
    with pytest.raises(ValueError, match="16 bytes"):
        AgentConnection().hello(b"short")


def test_what_another_client_left_is_skipped_before_the_hello_and_after_it():
    connection = AgentConnection()
    assert connection.receive(b"the end of what another client asked for") == []
    connection.hello(NONCE, resync=True)
    assert connection.receive(b"more of it") == []
    assert [type(event) for event in connection.receive(welcome())] == [Welcome]
    assert connection.ready


# What we send.


def test_ids_ascend_and_long_requests_come_in_parts():
    connection = ready()
    first, _ = connection.stat(b"/")
    second, data = connection.set_blob(bytes(300_000))
    assert second == first + 1
    parts = cut(FrameReader(), data)
    assert [kind for kind, _, _ in parts] == [F.PART, F.PART, F.SET_BLOB]
    assert b"".join(body for _, _, body in parts) == bytes(300_000)
    assert {stream for _, stream, _ in parts} == {second}


def test_what_cannot_be_said_is_refused():
    connection = ready()
    bad: list[Callable[[], object]] = [
        lambda: connection.stat(b"relative"),
        lambda: connection.stat(b""),
        lambda: connection.stat(b"/a\0b"),
        lambda: connection.stat(b"/" + b"x" * 5000),
        lambda: connection.rename(b"/a", b"b"),
        lambda: connection.set_blob(bytes(2**20 + 1)),
        lambda: connection.exec([], cwd=b"/", env={}, stdout_credit=0, stderr_credit=0),
        lambda: connection.exec([b"a\0"], cwd=b"/", env={}, stdout_credit=0, stderr_credit=0),
        lambda: connection.exec([b"a"], cwd=b"x", env={}, stdout_credit=0, stderr_credit=0),
        lambda: connection.exec(
            [b"a"], cwd=b"/", env={b"A=B": b""}, stdout_credit=0, stderr_credit=0
        ),
        lambda: connection.exec(
            [bytes(1) * 9_000_000], cwd=b"/", env={}, stdout_credit=0, stderr_credit=0
        ),
        lambda: connection.read(b"/a", credit=-1),
        lambda: connection.read(b"/a", credit=1, offset=2**63),
        lambda: connection.write(b"/a", length=-1),
        lambda: connection.write(b"/a", offset=1, flags=WriteFlag.REPLACE),
        lambda: connection.write(b"/a", flags=WriteFlag.REPLACE | WriteFlag.APPEND),
        lambda: connection.window(1),
        lambda: connection.kill(1, grace_ms=0),
    ]
    for attempt in bad:
        with pytest.raises(ValueError, match=r"."):
            attempt()
    assert connection.open_streams == 0


def test_input_keeps_to_the_window():
    connection = ready()
    stream, _ = connection.write(b"/x")
    assert connection.window(stream) == INPUT_WINDOW
    data = connection.send(stream, bytes(INPUT_WINDOW))
    assert sum(len(body) for _, _, body in FrameReader().feed(data)) == INPUT_WINDOW
    with pytest.raises(ValueError, match="takes 0 bytes"):
        connection.send(stream, b"x")
    events = connection.receive(encode_frame(F.GRANT, stream, struct.pack("<I", 10)))
    assert events == [Granted(stream, 10)]
    assert connection.window(stream) == 10
    connection.end(stream)
    assert connection.window(stream) == 0
    with pytest.raises(ValueError, match="no more"):
        connection.send(stream, b"x")


def test_words_to_a_stream_that_has_ended_are_nothing():
    connection = ready()
    stream = execute(connection, stdin=True)
    connection.receive(encode_frame(F.EXIT, stream, struct.pack("<BBQ", 0, 0, 1)))
    assert connection.send(stream, b"x") == b""
    assert connection.end(stream) == b""
    assert connection.credit(stream, Channel.STDOUT, 1) == b""
    assert connection.signal(stream, 1) == b""
    assert connection.cancel(stream) == b""
    assert connection.kill(stream, grace_ms=0) != b""


# What we hear.


def test_an_exec_from_start_to_end():
    connection = ready()
    stream = execute(connection, stdin=True, tell_start=True)
    data = (
        encode_frame(F.STARTED, stream, struct.pack("<I", 77))
        + encode_frame(F.OUTPUT, stream, b"\1out")
        + encode_frame(F.OUTPUT, stream, b"\2err")
        + encode_frame(F.EXIT, stream, struct.pack("<BBQ", 1 | 2 | 4, 11, 1_500_000_000))
    )
    whole = [
        Started(stream, 77),
        Output(stream, Channel.STDOUT, b"out"),
        Output(stream, Channel.STDERR, b"err"),
        Exited(stream, None, 11, True, True, False, False, 1.5),
    ]
    assert connection.receive(data) == whole
    assert connection.open_streams == 0


def test_kills_are_counted():
    connection = ready()
    stream = execute(connection)
    connection.kill(stream, grace_ms=1)
    connection.kill(stream, grace_ms=0)
    connection.receive(encode_frame(F.EXIT, stream, struct.pack("<BBQ", 1, 9, 1)))
    one = encode_frame(F.KILLED, stream, struct.pack("<I", 1))
    assert connection.receive(one + one) == [Killed(stream)] * 2
    with pytest.raises(ProtocolError, match="0 sent"):
        connection.receive(one)


def test_files_and_directories():
    connection = ready()
    read, _ = connection.read(b"/x", credit=10)
    listed, _ = connection.list_directory(b"/", credit=100)
    looked, _ = connection.stat(b"/l", follow=False)
    written, _ = connection.write(b"/w")
    connection.end(written)
    plain, _ = connection.mkdir(b"/d")
    data = (
        encode_frame(F.OPENED, read, STAT)
        + encode_frame(F.OUTPUT, read, b"\1abc")
        + encode_frame(F.DONE, read)
        + encode_frame(F.OUTPUT, listed, b"\1" + b"\4\1\0a" + b"\x08\2\0\xff\n")
        + encode_frame(F.DONE, listed)
        + encode_frame(F.DONE, looked, STAT + b"target")
        + encode_frame(F.DONE, written, STAT)
        + encode_frame(F.ERROR, plain, struct.pack("<IB", 17, 0))
    )
    assert connection.receive(data) == [
        Opened(read, STAT_VALUE),
        Output(read, Channel.STDOUT, b"abc"),
        Done(read),
        Listed(listed, (Entry(b"a", 4), Entry(b"\xff\n", 8)), 9),
        Done(listed),
        Done(looked, STAT_VALUE, b"target"),
        Done(written, STAT_VALUE),
        Failed(plain, 17, Stage.REQUEST),
    ]


EXIT = struct.pack("<BBQ", 0, 0, 1)
# An exec is stream 1, one that tells its start 2, a read 3, a listing 4, a stat 5, a write 6 and
# a mkdir 7, a read of 5 bytes 8; each has credit for 100 bytes.
MALFORMED = {
    "unknown type": encode_frame(0x20, 1),
    "our own type": encode_frame(F.EXEC, 1),
    "a second welcome": welcome()[len(MAGIC) :],
    "no such stream": encode_frame(F.DONE, 99),
    "stream 0": encode_frame(F.DONE, 0),
    "fatal": encode_frame(F.FATAL, 0, b"\xff reason"),
    "fatal for a stream": encode_frame(F.FATAL, 1, b"x"),
    "start that nobody asked for": encode_frame(F.STARTED, 1, b"\1\0\0\0"),
    "pid 0": encode_frame(F.STARTED, 2, b"\0\0\0\0"),
    "short start": encode_frame(F.STARTED, 2, b"\1"),
    "output before the start": encode_frame(F.OUTPUT, 2, b"\1x"),
    "end before the start": encode_frame(F.EXIT, 2, EXIT),
    "output on no channel": encode_frame(F.OUTPUT, 1, b"\3x"),
    "output of nothing": encode_frame(F.OUTPUT, 1, b"\1"),
    "empty output": encode_frame(F.OUTPUT, 1),
    "more than asked for": encode_frame(F.OUTPUT, 1, b"\1" + bytes(101)),
    "more in two": encode_frame(F.OUTPUT, 1, b"\2" + bytes(60)) * 2,
    "grant of what was not sent": encode_frame(F.GRANT, 6, b"\1\0\0\0"),
    "grant for a read": encode_frame(F.GRANT, 3, b"\1\0\0\0"),
    "short exit": encode_frame(F.EXIT, 1, EXIT[:-1]),
    "long exit": encode_frame(F.EXIT, 1, EXIT + b"x"),
    "unknown flags": encode_frame(F.EXIT, 1, b"\x80" + EXIT[1:]),
    "signal 0": encode_frame(F.EXIT, 1, b"\1\0" + EXIT[2:]),
    "signal 65": encode_frame(F.EXIT, 1, b"\1\x41" + EXIT[2:]),
    "exit of a read": encode_frame(F.EXIT, 3, EXIT),
    "done of an exec": encode_frame(F.DONE, 1),
    "error after output": encode_frame(F.OUTPUT, 1, b"\1x")
    + encode_frame(F.ERROR, 1, b"\2\0\0\0\1"),
    "error 0": encode_frame(F.ERROR, 1, b"\0\0\0\0\1"),
    "error beyond all": encode_frame(F.ERROR, 1, b"\0\x10\0\0\1"),
    "unknown stage": encode_frame(F.ERROR, 1, b"\1\0\0\0\x63"),
    "second end": encode_frame(F.EXIT, 1, EXIT) * 2,
    "kill that nobody asked for": encode_frame(F.KILLED, 1, b"\1\0\0\0"),
    "contents before the opening": encode_frame(F.OUTPUT, 3, b"\1x"),
    "done before the opening": encode_frame(F.DONE, 3),
    "opened twice": encode_frame(F.OPENED, 3, STAT) * 2,
    "more than the file was to give": encode_frame(F.OPENED, 8, STAT)
    + encode_frame(F.OUTPUT, 8, b"\1123456"),
    "short stat": encode_frame(F.OPENED, 3, STAT[:-1]),
    "stderr of a file": encode_frame(F.OPENED, 3, STAT) + encode_frame(F.OUTPUT, 3, b"\2x"),
    "name that leads away": encode_frame(F.OUTPUT, 4, b"\1\0\4\0../x"),
    "dot": encode_frame(F.OUTPUT, 4, b"\1\0\1\0."),
    "name with NUL": encode_frame(F.OUTPUT, 4, b"\1\0\2\0a\0"),
    "empty name": encode_frame(F.OUTPUT, 4, b"\1\0\0\0"),
    "name beyond the frame": encode_frame(F.OUTPUT, 4, b"\1\0\xff\xffab"),
    "half an entry": encode_frame(F.OUTPUT, 4, b"\1\0"),
    "stat without stat": encode_frame(F.DONE, 5),
    "link beyond all": encode_frame(F.DONE, 5, STAT + bytes(5000)),
    "done before our end": encode_frame(F.DONE, 6, STAT),
    "mkdir with a stat": encode_frame(F.DONE, 7, STAT),
    "too long a frame": struct.pack("<IIB", FRAME_BODY_MAX + 1, 1, F.OUTPUT),
    "no trailer": encode_frame(F.EXIT, 1, EXIT)[:-1] + b"\0",
}


def busy() -> AgentConnection:
    connection = ready()
    execute(connection)
    execute(connection, tell_start=True)
    connection.read(b"/", credit=100)
    connection.list_directory(b"/", credit=100)
    connection.stat(b"/")
    connection.write(b"/w")
    connection.mkdir(b"/d")
    connection.read(b"/", credit=100, length=5)
    return connection


@pytest.mark.parametrize("row", MALFORMED)
def test_what_no_agent_says_ends_the_connection(row: str):
    connection = busy()
    other, _ = connection.mkdir(b"/other")
    first = encode_frame(F.DONE, other)
    with pytest.raises(ProtocolError) as caught:
        connection.receive(first + MALFORMED[row])
    assert caught.value.events[0] == Done(other)
    assert not connection.ready
    with pytest.raises(ProtocolError, match="broken"):
        connection.receive(b"")
    with pytest.raises(RuntimeError, match="broken"):
        connection.stat(b"/")


kinds = st.one_of(st.sampled_from(sorted(F)), st.integers(0, 255))


@settings(max_examples=400)
@given(
    st.lists(st.tuples(kinds, st.integers(0, 9), st.binary(max_size=80)), max_size=6),
    st.binary(max_size=30),
)
def test_a_hostile_agent_gets_events_or_an_error(sent: list[tuple[int, int, bytes]], tail: bytes):
    """Nothing but `ProtocolError` ever comes out, and never more than was asked for."""
    connection = busy()
    events: list[Event] = []
    try:
        for kind, stream, body in sent:
            events += connection.receive(encode_frame(kind, stream, body))
        events += connection.receive(tail)
    except ProtocolError as error:
        events += error.events
    assert sum(len(event.data) for event in events if isinstance(event, Output)) <= 505


TRANSCRIPT = b"".join(
    (
        encode_frame(F.OUTPUT, 1, b"\1" + bytes(50)),
        encode_frame(F.STARTED, 2, b"\1\0\0\0"),
        encode_frame(F.OUTPUT, 2, b"\2err"),
        encode_frame(F.OPENED, 3, STAT),
        encode_frame(F.OUTPUT, 4, b"\1" + b"\4\1\0a" + b"\x08\2\0\xff\n"),
        encode_frame(F.OUTPUT, 3, b"\1content"),
        encode_frame(F.DONE, 5, STAT + b"target"),
        encode_frame(F.ERROR, 7, struct.pack("<IB", 17, 0)),
        encode_frame(F.DONE, 4),
        encode_frame(F.ERROR, 6, struct.pack("<IB", 28, 0)),
        encode_frame(F.EXIT, 1, EXIT),
        encode_frame(F.EXIT, 2, b"\1\x09" + EXIT[2:]),
        encode_frame(F.DONE, 3),
    )
)
"""What an agent may answer to `busy`."""


@given(st.lists(st.integers(0, 60), max_size=40))
def test_a_transcript_gives_the_same_events_however_it_is_chopped(sizes: list[int]):
    whole = busy().receive(TRANSCRIPT)
    assert len(whole) == 13
    connection = busy()
    got = [event for piece in chop(TRANSCRIPT, sizes) for event in connection.receive(piece)]
    assert got == whole
    assert connection.open_streams == 1


def test_a_transcript_byte_by_byte():
    connection = busy()
    got = [
        event
        for at in range(len(TRANSCRIPT))
        for event in connection.receive(TRANSCRIPT[at : at + 1])
    ]
    assert got == busy().receive(TRANSCRIPT)
    assert connection.receive(b"\x05\0\0\0") == [], "a frame has begun"


@settings(max_examples=400)
@given(
    st.lists(
        st.tuples(st.integers(0, len(TRANSCRIPT) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    st.integers(0, len(TRANSCRIPT)),
)
def test_a_mutated_transcript_gives_events_or_an_error(changes: list[tuple[int, int]], cut_at: int):
    data = bytearray(TRANSCRIPT)
    for at, value in changes:
        data[at] = value
    connection = busy()
    events: list[Event] = []
    try:
        events += connection.receive(bytes(data[:cut_at]))
        events += connection.receive(bytes(data[cut_at:]))
    except ProtocolError as error:
        events += error.events
        assert not connection.ready
    assert len(events) <= 13


def test_errors_are_ours_and_travel():
    error = ProtocolError("why")
    error.events = [Killed(1)]
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ApothicError)
    assert (str(copy), copy.events) == ("why", [Killed(1)])
