"""Byte-exactness and bounds: big outputs, big inputs, long arguments, output without end."""

from __future__ import annotations

import hashlib
import os

from apothic import SandboxSession
from tests.conformance.sandboxes.base import SandboxSuite

_RANDOM = """
import hashlib, os, sys, threading
def write(fd, size):
    digest = hashlib.sha256()
    left = size
    while left:
        piece = os.urandom(min(left, 1 << 20))
        digest.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view):]
        left -= len(piece)
    open(f"digest{fd}", "w").write(digest.hexdigest())
size = int(sys.argv[1])
threads = [threading.Thread(target=write, args=(fd, size)) for fd in (1, 2)]
for t in threads: t.start()
for t in threads: t.join()
"""
_ARGUMENTS = (
    "import hashlib, os, sys; "
    "print(hashlib.sha256(b'\\0'.join(map(os.fsencode, sys.argv[1:]))).hexdigest())"
)
_INPUT = (
    "import hashlib, sys; d = hashlib.sha256()\n"
    "while piece := sys.stdin.buffer.read(1 << 20): d.update(piece)\n"
    "print(d.hexdigest())"
)
MIB = 1024 * 1024


class DataConformance(SandboxSuite):
    def test_64_mib_on_both_outputs_at_once(self, session: SandboxSession, python: str) -> None:
        result = session.exec([python, "-c", _RANDOM, str(64 * MIB)], timeout_s=120).check()
        assert not result.truncated
        assert hashlib.sha256(result.stdout_bytes).hexdigest() == session.read_text("digest1")
        assert hashlib.sha256(result.stderr_bytes).hexdigest() == session.read_text("digest2")

    def test_8_mib_on_both_outputs_as_a_stream(self, session: SandboxSession, python: str) -> None:
        digests = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}
        for event in session.exec_stream([python, "-c", _RANDOM, str(8 * MIB)], timeout_s=120):
            if event.kind != "exit":
                digests[event.kind].update(event.data)
        assert digests["stdout"].hexdigest() == session.read_text("digest1")
        assert digests["stderr"].hexdigest() == session.read_text("digest2")

    def test_1_mib_of_arguments(self, session: SandboxSession, python: str) -> None:
        words = [os.urandom(50_000).replace(b"\0", b"\1") for _ in range(21)]
        text = [word.decode("utf-8", "surrogateescape") for word in words]
        result = session.exec([python, "-c", _ARGUMENTS, *text]).check()
        assert result.stdout.strip() == hashlib.sha256(b"\0".join(words)).hexdigest()

    def test_50_mib_of_input(self, session: SandboxSession, python: str) -> None:
        data = os.urandom(MIB) * 50
        result = session.exec([python, "-c", _INPUT], stdin=data, timeout_s=120).check()
        assert result.stdout.strip() == hashlib.sha256(data).hexdigest()

    def test_input_and_output_at_once(self, session: SandboxSession) -> None:
        data = os.urandom(8 * MIB)
        assert session.exec("cat", stdin=data, timeout_s=60).stdout_bytes == data

    def test_every_byte(self, session: SandboxSession) -> None:
        data = bytes(range(256)) * 3
        session.write_bytes("all", data)
        assert session.exec("cat all").stdout_bytes == data
        assert session.exec("cat", stdin=data).stdout_bytes == data

    def test_output_far_beyond_the_limit(self, session: SandboxSession) -> None:
        result = session.exec(
            "head -c 300000000 /dev/zero", max_output_bytes=1000, timeout_s=120
        ).check()
        assert result.stdout_bytes == b"\0" * 1000
        assert result.stdout_truncated
