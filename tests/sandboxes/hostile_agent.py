"""What a container runs in place of the agent: a program that answers as no agent does.

`hostile_program` gives its text, whose first lines are the table of the protocol's numbers. Its first
argument names what it does; it speaks over the link, where it is given one.
"""

from __future__ import annotations

import inspect

from ray_backend.sandbox.agent import constants

__all__ = ["AT_START", "ON_EXEC", "hostile_program"]

AT_START = {
    "wrong version": "version 2",
    "no magic": "does not answer",
    "ends": "does not answer",
    "endless environment": "more than 8388608",
    "endless blob": "more than 1048576",
    "environment before its opening": "malformed",
}
"""What it does before the session is ready, and what the error says of it."""

ON_EXEC = {
    "too long a frame": "longer than allowed",
    "unknown stream": "not open",
    "unknown type": "type 0x20",
    "no trailer": "does not end",
    "two ends": "not open",
    "output after the end": "not open",
    "more output than asked for": "asked for",
    "output on no channel": "not a valid Channel",
    "opened, an exec": "stream of EXEC",
    "a second welcome": "malformed",
    "killed, unasked": "no place",
    "granted, unasked": "granted",
    "signal 200": "signal 200",
    "fatal": "gave up",
    "half a frame": "exit status 0",
}
"""What it says when it is to run a program, and what the error says of it."""

_BODY = r'''
import os, socket, struct, sys, time

DOES = sys.argv[1]
reading, writing = 0, 1
if "--link" in sys.argv:
    link = socket.socket(socket.AF_UNIX)
    link.connect(sys.argv[sys.argv.index("--link") + 1])
    reading = writing = link.fileno()
F = FrameType
STAT = struct.pack("<IIIIQqQQ", 0o100644, 0, 0, 1, 0, 0, 0, 0)
EXITED = struct.pack("<BBQ", 0, 0, 1)

def frame(kind, stream, body=b""):
    return struct.pack("<IIB", len(body), stream, kind) + body + bytes([FRAME_TRAILER])

def say(data):
    view = memoryview(data)
    while view:
        view = view[os.write(writing, view):]

def silence():
    while True:
        time.sleep(1000)

held = b""
def hear(size):
    global held
    while len(held) < size:
        more = os.read(reading, 1 << 16)
        if not more:
            sys.exit()
        held += more
    piece, held = held[:size], held[size:]
    return piece

def next_frame():
    length, stream, kind = struct.unpack("<IIB", hear(FRAME_HEADER_BYTES))
    body = hear(length)
    hear(1)
    return kind, stream, body

if DOES == "never answers":
    silence()
if DOES == "endless noise":
    while True:
        say(bytes(65536))
if DOES == "ends":
    sys.exit()
hear(len(MAGIC))
nonce = next_frame()[2][2:]
version = 2 if DOES == "wrong version" else PROTOCOL_VERSION
welcome = frame(F.WELCOME, 0, struct.pack("<H16sII", version, nonce, 0, INPUT_WINDOW))
if DOES == "no magic":
    sys.stderr.write("I am no agent\n")
    sys.exit(3)
say(MAGIC + welcome)

def endless(stream):
    """As much as credit allows."""
    say(frame(F.OPENED, stream, STAT))
    left = 0
    while True:
        say(frame(F.OUTPUT, stream, b"\1" + b"A" * 65536))
        left += 65536
        if left >= 1 << 18:
            left -= 1 << 18
            while next_frame()[0] != F.CREDIT:
                pass

def bustle(stream):
    """Valid output of few bytes a frame, as fast as can be, and no end even when it is killed."""
    credit = 256 * 1024
    piece = b"".join(frame(F.OUTPUT, stream, b"\1wild") for _ in range(256))
    while True:
        while credit >= 1024:
            say(piece)
            credit -= 1024
        kind, _, body = next_frame()
        if kind == F.CREDIT:
            credit += struct.unpack("<BI", body)[1]

def at_exec(stream):
    said = {
        "too long a frame": struct.pack("<IIB", 0xFFFFFFFF, stream, F.OUTPUT),
        "unknown stream": frame(F.EXIT, stream + 1, EXITED),
        "unknown type": frame(0x20, stream),
        "no trailer": frame(F.EXIT, stream, EXITED)[:-1] + b"\0",
        "two ends": frame(F.EXIT, stream, EXITED) * 2,
        "output after the end": frame(F.EXIT, stream, EXITED) + frame(F.OUTPUT, stream, b"\1x"),
        "more output than asked for": frame(F.OUTPUT, stream, b"\1" + bytes(100_000)) * 100,
        "output on no channel": frame(F.OUTPUT, stream, b"\3x"),
        "opened, an exec": frame(F.OPENED, stream, STAT),
        "a second welcome": welcome,
        "killed, unasked": frame(F.KILLED, stream, b"\1\0\0\0"),
        "granted, unasked": frame(F.GRANT, stream, b"\1\0\0\0"),
        "signal 200": frame(F.EXIT, stream, struct.pack("<BBQ", ExitFlag.SIGNALED, 200, 1)),
        "fatal": frame(F.FATAL, 0, b"reason"),
        "half a frame": frame(F.OUTPUT, stream, b"\1xyz")[:-2],
    }
    if DOES in said:
        say(said[DOES])
        if DOES == "half a frame":
            sys.exit()
        silence()
    if DOES == "bustle":
        bustle(stream)

while True:
    kind, stream, body = next_frame()
    if kind == F.ENVIRON and DOES == "environment before its opening":
        say(frame(F.OUTPUT, stream, b"\1x"))
    elif kind == F.ENVIRON and DOES == "endless environment":
        endless(stream)
    elif kind == F.GET_BLOB and DOES == "endless blob":
        endless(stream)
    elif kind in (F.ENVIRON, F.GET_BLOB):
        say(frame(F.OPENED, stream, STAT) + frame(F.DONE, stream))
    elif kind == F.STAT and DOES != "deaf":
        say(frame(F.DONE, stream, STAT))
    elif kind in (F.MKDIR, F.SET_BLOB):
        say(frame(F.DONE, stream))
    elif kind == F.EXEC:
        at_exec(stream)
'''


def hostile_program() -> bytes:
    """Give the program, for an image with Python."""
    numbers = inspect.getsource(constants).partition("_NUMBERS = (")[0]
    return f"#!/usr/bin/python3 -S\n{numbers}{_BODY}".encode()
