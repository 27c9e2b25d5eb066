"""What is dead after a timeout or a close, and what goes on living."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext

import pytest

from apothic import SandboxSession
from apothic.errors import ExecTimeoutError, SandboxClosedError
from tests.conformance.sandboxes.base import Marked, SandboxSuite, marked
from tests.support import eventually, interrupted_in

__all__ = ["InterruptConformance", "KillConformance", "marked"]

_WAIT = "import time, sys\nwhile True: time.sleep(1)\n"
_START = "import subprocess, sys, os, signal, time\n"

# Each starts something awkward, with the token in its arguments, and says "ready" when it is there.
# sys.argv is the token. `child` starts one more Python that runs a piece of code.
_CHILD = (
    _START
    + "def child(code, **options):\n"
    + "    return subprocess.Popen([sys.executable, '-c', code, sys.argv[1]], **options)\n"
    + f"WAIT = {_WAIT!r}\n"
)
AWKWARD = {
    "background child": "child(WAIT)\nprint('ready', flush=True)\nexec(WAIT)",
    "grandchild that holds stdout": (
        "import shlex\n"
        "child('import subprocess, sys, time; subprocess.Popen([sys.executable, \"-c\", '"
        " + repr(WAIT) + ', sys.argv[1]]); time.sleep(1000)')\n"
        "print('ready', flush=True)\nexec(WAIT)"
    ),
    "escapee with setsid": (
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        exec(WAIT)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('ready', flush=True)\nexec(WAIT)"
    ),
    "escapee with setsid and nothing open": (
        "child('import os\\nos.setsid()\\nif os.fork() == 0:\\n'"
        " '    for fd in range(3): os.close(fd)\\n' + '    import time; time.sleep(1000)',"
        " env={}).wait()\n"
        "print('ready', flush=True)\nexec(WAIT)"
    ),
    "one that ignores SIGTERM": (
        "for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
        "child(WAIT)\nprint('ready', flush=True)\nexec(WAIT)"
    ),
    "one that is stopped": (
        "stopped = child(WAIT)\n"
        "os.kill(stopped.pid, signal.SIGSTOP)\n"
        "os.waitpid(stopped.pid, os.WUNTRACED)\n"
        "print('ready', flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)"
    ),
    "endless writer": (
        "child('import os\\nwhile True: os.write(1, b\"x\" * 65536)')\n"
        "child('import os\\nwhile True: os.write(2, b\"x\" * 65536)')\n"
        "print('ready', flush=True)\n"
        "while True: os.write(1, b'x' * 65536)"
    ),
    "one that answers SIGTERM with more": (
        "def more(*_): child(WAIT, start_new_session=True)\n"
        "signal.signal(signal.SIGTERM, more)\n"
        "print('ready', flush=True)\nexec(WAIT)"
    ),
}


# Leaves a child behind, and as much output as there is room for while nobody takes it.
_BRIMFUL = """
child(WAIT)
for fd in (1, 2):
    os.set_blocking(fd, False)
written = time.monotonic()
while time.monotonic() - written < 0.3:
    for fd in (1, 2):
        try:
            os.write(fd, b"x" * 4096)
            written = time.monotonic()
        except BlockingIOError:
            time.sleep(0.001)
open("ended", "w").close()
"""


class KillConformance(SandboxSuite):
    def words(self, python: str, code: str, marked: Marked) -> list[str]:
        return [python, "-c", _CHILD + code, marked.token]

    @pytest.mark.parametrize("kind", list(AWKWARD))
    def test_nothing_lives_after_a_timeout(
        self, session: SandboxSession, python: str, marked: Marked, kind: str
    ) -> None:
        with pytest.raises(ExecTimeoutError) as caught:
            session.exec(
                self.words(python, AWKWARD[kind], marked), timeout_s=3, max_output_bytes=100_000
            )
        assert marked.alive() == []
        assert caught.value.result is not None
        assert "ready" in caught.value.result.stdout or "x" in caught.value.result.stdout
        assert session.exec("echo next").stdout == "next\n"

    @pytest.mark.parametrize("kind", list(AWKWARD))
    def test_nothing_lives_after_a_stream_is_closed(
        self, session: SandboxSession, python: str, marked: Marked, kind: str
    ) -> None:
        stream = session.exec_stream(self.words(python, AWKWARD[kind], marked))
        seen = ""
        while "ready" not in seen:
            seen += next(stream).text
        stream.close()
        assert marked.alive() == []
        stream.close()
        assert list(stream) == []
        assert session.exec("echo next").stdout == "next\n"

    def test_a_dropped_stream_is_closed(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        stream = session.exec_stream(self.words(python, AWKWARD["background child"], marked))
        event = next(stream)
        assert event.text.startswith("ready")
        del stream
        marked.wait_until_none()

    def test_a_cancelled_task_kills(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        words = self.words(python, AWKWARD["background child"], marked)

        async def work() -> None:
            task = asyncio.create_task(session.aio.exec(words))
            while len(await asyncio.to_thread(marked.alive)) < 2:
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(work())
        marked.wait_until_none()

    def test_what_an_exec_leaves_behind_goes_on(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        result = session.exec(
            self.words(python, "child(WAIT)\nprint('left')", marked), timeout_s=30
        )
        assert result.stdout == "left\n"
        assert len(marked.alive()) == 1

    def test_it_goes_on_writing_without_harm(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        chatty = (
            "import os, sys\n"
            "for n in range(200): os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)\n"
            "open(sys.argv[1], 'w').close()\n"
        )
        session.exec(self.words(python, f"child({chatty!r})", marked), timeout_s=30).check()
        eventually(lambda: session.exists(marked.token))
        marked.wait_until_none()

    def test_an_exec_ends_though_a_grandchild_holds_its_output(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        data = "import os\nos.write(1, b'a' * 60000); os.write(2, b'b' * 60000)\n"
        code = f"child(WAIT)\n{data}"
        result = session.exec(self.words(python, code, marked), timeout_s=30)
        assert (len(result.stdout_bytes), len(result.stderr_bytes)) == (60000, 60000)
        assert len(marked.alive()) == 1

    def test_an_exec_ends_though_a_grandchild_writes_without_end(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        code = "child('import os\\nwhile True: os.write(1, b\"x\" * 65536)')\nprint('done')"
        assert session.exec(self.words(python, code, marked), timeout_s=30).ok
        assert len(marked.alive()) == 1

    def test_output_may_be_taken_after_the_time_is_up(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        stream = session.exec_stream(self.words(python, _BRIMFUL, marked), timeout_s=5)
        eventually(lambda: session.exists("ended"))
        with pytest.raises(ExecTimeoutError):  # it began later, so the time of the first is up too
            session.exec("sleep 1000", timeout_s=5)
        events = list(stream)
        assert events[-1].returncode == 0
        result = events[-1].result
        assert result is not None
        assert result.duration_s < 5
        assert sum(len(event.data) for event in events) >= 2 * 65536
        assert len(marked.alive()) == 1

    def test_execs_leave_no_zombies(self, session: SandboxSession) -> None:
        for _ in range(5):
            session.exec("(sleep 0.01 &) ; true", shell=True).check()
        eventually(lambda: "Z" not in session.exec(["sh", "-c", _OWN_STATES]).stdout.split())

    # -- close ----------------------------------------------------------------------------------

    def test_close_ends_a_running_exec(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                session.exec(self.words(python, AWKWARD["background child"], marked))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        marked.wait_for(2)
        session.close()
        thread.join(30)
        assert [type(failure) for failure in failures] == [SandboxClosedError]

    def test_close_ends_a_stream(self, session: SandboxSession) -> None:
        stream = session.exec_stream("echo x; sleep 1000", shell=True)
        assert next(stream).text == "x\n"
        session.close()
        with pytest.raises(SandboxClosedError):
            list(stream)


class InterruptConformance(SandboxSuite):
    """Ctrl-C while a verb waits, in a program that goes on."""

    def test_an_interrupted_exec_is_killed(
        self, session: SandboxSession, python: str, marked: Marked
    ) -> None:
        with interrupted_in("result", when=marked.alive), pytest.raises(KeyboardInterrupt):
            session.exec([python, "-c", _WAIT, marked.token], timeout_s=100)
        marked.wait_until_none()
        eventually(lambda: session.inspect().running_calls == 0)
        assert session.exec([python, "-c", "print('on')"]).stdout == "on\n"

    @pytest.mark.parametrize("leave", ["with", "close", "neither"])
    def test_an_interrupted_stream_is_closed(
        self, session: SandboxSession, python: str, marked: Marked, leave: str
    ) -> None:
        code = f"import os\nos.write(1, b'on')\n{_WAIT}"
        stream = session.exec_stream([python, "-c", code, marked.token], timeout_s=1000)
        assert next(stream).text == "on"
        block = stream if leave == "with" else nullcontext()
        with interrupted_in("next_item"), pytest.raises(KeyboardInterrupt), block:
            next(stream)
        if leave == "close":
            stream.close()
        marked.wait_until_none()
        assert list(stream) == []
        eventually(lambda: session.inspect().running_calls == 0)


# States of the processes whose parent is the one above this shell, which is ours.
_OWN_STATES = """
parent() { sed 's/.*) //' /proc/$1/stat 2>/dev/null | cut -d' ' -f2; }
mine=$(parent $$)
for d in /proc/[0-9]*; do
  set -- $(sed 's/.*) //' $d/stat 2>/dev/null)
  [ "$2" = "$mine" ] && echo $1
done
"""
