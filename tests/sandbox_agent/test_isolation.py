"""What code in the sandbox, as root with the capabilities that a container has, cannot do to PID 1.

Each test runs it in a process-id namespace of its own, with the capabilities cut as a container
engine cuts them: it has neither CAP_SYS_PTRACE, CAP_SYS_RESOURCE, CAP_SYS_ADMIN nor CAP_SYS_NICE.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest

from tests.sandbox_agent.harness import Agent
from tests.support import unable

PR_CAPBSET_DROP = 24
CONTAINER = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
"""CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW,
SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP: what Docker leaves to root."""


@pytest.fixture
def confined(launch: Callable[..., Agent], namespace: tuple[str, ...]) -> Agent:
    if os.geteuid() != 0:
        unable("only root can be confined")
    # The bounding set counts from the next execve on: that of the agent.
    cut = (
        "import ctypes,os,sys; c = ctypes.CDLL(None);"
        f"[c.prctl({PR_CAPBSET_DROP}, n, 0, 0, 0) for n in range(41) if n not in {CONTAINER}];"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return launch(wrap=(*namespace, sys.executable, "-S", "-c", cut))


def attempt(agent: Agent, code: str) -> str:
    """Run code in the sandbox; gives what it printed, after a check that the agent still works."""
    prelude = "import ctypes, os, resource, signal, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    ran = agent.run([sys.executable, "-S", "-c", prelude + code])
    assert agent.run(["echo", "here"]).stdout == b"here\n"
    assert ran.exit.status == 0, ran
    return ran.stdout.decode().strip()


def test_the_confinement_is_real(confined: Agent):
    held = int(
        attempt(confined, "print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])"),
        16,
    )
    assert {n for n in range(64) if held >> n & 1} <= CONTAINER


HIDDEN = """
for path in ('fd/0', 'fd/1', 'environ', 'mem', 'cwd', 'root', 'exe'):
    for use in (os.readlink, lambda name: open(name, 'rb').read(1), lambda name: open(name, 'wb')):
        try:
            use('/proc/%d/' % PID + path)
        except (PermissionError, FileNotFoundError): continue
        except OSError as error:
            if use is os.readlink: continue # no link
        print(path)
"""


def test_its_pipes_cannot_be_opened(confined: Agent):
    assert attempt(confined, "PID = 1" + HIDDEN) == ""


def test_it_cannot_be_traced(confined: Agent):
    code = "print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())"
    assert attempt(confined, code) == "-1 1"


def test_a_keeper_is_guarded_as_well(confined: Agent):
    code = "PID = os.getppid()\nprint(libc.ptrace(16, PID, 0, 0), ctypes.get_errno())" + HIDDEN
    assert attempt(confined, code) == "-1 1"


@pytest.mark.parametrize("number", [s for s in signal.Signals if s.name not in ("SIGCHLD",)])
def test_no_signal_ends_it(confined: Agent, number: int):
    assert attempt(confined, f"os.kill(1, {int(number)})") == ""


def test_no_queued_signal_ends_it(confined: Agent):
    # rt_sigqueueinfo with a forged sender: nobody, as from outside of the namespace.
    code = (
        "info = (ctypes.c_int * 32)(15, 0, -1, 0, 0, 0)\n"
        "print(libc.syscall(129, 1, 15, info))\n"
        "info = (ctypes.c_int * 32)(15, 0, 0, 0, 0, 0)\n"
        "print(libc.syscall(129, 1, 15, info))"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the system call is that of x86_64")
    assert attempt(confined, code) == "0\n-1"


@pytest.mark.parametrize("limit", ["RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_FSIZE"])
def test_its_limits_cannot_be_changed(confined: Agent, limit: str):
    code = (
        f"try: resource.prlimit(1, resource.{limit}, (1, 1)); print('changed')\n"
        "except PermissionError: print('denied')"
    )
    assert attempt(confined, code) == "denied"


def test_code_of_another_user_cannot_either(confined: Agent):
    ran = confined.run(["sh", "-c", "ls /proc/1/fd; kill -9 1; kill -9 $PPID"], user=b"1234:1234")
    assert ran.stdout == b""
    assert b"denied" in ran.stderr.lower() or b"not permitted" in ran.stderr.lower()
    assert not ran.exit.lost
    assert confined.run(["echo", "here"]).stdout == b"here\n"
