"""The process that starts and ends the programs of one local session. Run as a file, without apothic.

For each exec it forks a keeper, which becomes a subreaper and starts the program: whatever descends
from it, however far it has gone, stays below its keeper. When the control socket ends, because the
session was closed or its process has died in whatever way, everything is killed and the session's
temporary directory removed.

A request is a length (u32) with four file descriptors beside it (report, stdin, stdout, stderr), then
``marshal`` of ``(argv, cwd, env, user)``. A report is a byte and two numbers (`REPORT`):

=======  ====================================================================
STARTED  process ids of keeper and program; the program may yet fail to start
FAILED   what failed (a letter), errno
EXITED   wait status, duration in ns
=======  ====================================================================

The end of the report's pipe says that nothing of the exec is alive.
"""

from __future__ import annotations

import contextlib
import grp
import marshal
import os
import pwd
import signal
import socket
import struct
import sys
import time

REPORT = struct.Struct("<cqq")
STARTED, FAILED, EXITED = b"S", b"F", b"X"
CWD, USER, PROGRAM, OTHER = map(ord, "cupo")
LENGTH = struct.Struct("<I")
FDS = 4

_PR_SET_CHILD_SUBREAPER = 36
_ROUND_S = 0.01


def main(control_fd: int, directory: str) -> None:
    """Serve until the control socket ends, then end everything."""
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGCHLD, _reap)
    become_subreaper()
    try:
        while (request := _receive(control)) is not None:
            payload, fds = request
            if os.fork() == 0:
                control.close()
                _keep(payload, fds)
            for fd in fds:
                os.close(fd)
    finally:
        kill_below(os.getpid())
        if directory:
            import shutil

            shutil.rmtree(directory, ignore_errors=True)


def become_subreaper() -> None:
    """Have orphans among our descendants become our children; does nothing but on Linux."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """List the live descendants of a process, itself excluded; empty where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except FileNotFoundError:
        return []
    for name in names:
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The name in parentheses may hold anything, the last parenthesis ends it.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if state not in (b"Z", b"X"):
            children.setdefault(int(parent), []).append(int(name))
        else:
            # A dead one may not have been reaped, with children that go to their reaper just now.
            children.setdefault(int(parent), [])
    found: list[int] = []
    rest = [root]
    while rest:
        for pid in children.get(rest.pop(), ()):
            found.append(pid)
            rest.append(pid)
    return found


def send_signal(pids: list[int], number: int) -> None:
    """Send a signal to those that still live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill_below(root: int) -> None:
    """Kill all descendants of a process, until there are none."""
    while pids := descendants(root):
        # Stopped first, so that none starts another while the others die.
        send_signal(pids, signal.SIGSTOP)
        send_signal(pids, signal.SIGKILL)
        time.sleep(_ROUND_S)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _receive(control: socket.socket) -> tuple[bytes, list[int]] | None:
    try:
        head, fds, _, _ = socket.recv_fds(control, LENGTH.size, FDS)
        if not head:
            return None
        head += _receive_exactly(control, LENGTH.size - len(head))
        return _receive_exactly(control, LENGTH.unpack(head)[0]), fds
    except (ConnectionError, EOFError):
        return None


def _receive_exactly(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _keep(payload: bytes, fds: list[int]) -> None:
    """Be the keeper of one exec: start it, reap all that comes of it, tell how it ended; no return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        become_subreaper()
        report, *stdio = fds
        begin = time.monotonic_ns()
        program = os.fork()
        if program == 0:
            _run(payload, report, stdio)
        for fd in stdio:
            os.close(fd)
        os.write(report, REPORT.pack(STARTED, os.getpid(), program))
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == program:
                os.write(report, REPORT.pack(EXITED, status, time.monotonic_ns() - begin))
    except (ChildProcessError, BrokenPipeError):
        pass
    finally:
        os._exit(0)


def _run(payload: bytes, report: int, stdio: list[int]) -> None:
    """Become the program; no return."""
    stage = OTHER
    try:
        argv, cwd, env, user = marshal.loads(payload)
        os.setsid()
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        for fd in (report, *stdio):
            os.set_inheritable(fd, False)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        stage = USER
        if user:
            _become(user, env)
        stage = CWD
        os.chdir(cwd)
        stage = PROGRAM
        _execute(argv, env)
    except OSError as error:
        os.write(report, REPORT.pack(FAILED, stage, error.errno or 0))
    except BaseException:
        os.write(report, REPORT.pack(FAILED, stage, 22))
    finally:
        os._exit(127)


def _execute(argv: list[bytes], env: dict[bytes, bytes]) -> None:
    """Execute a program, looked up in its own PATH. `os.execvpe` imports modules for that.

    What was imported before is all there is here: another user may not be able to read Python's files.
    """
    program = argv[0]
    if b"/" in program:
        os.execve(program, argv, env)
    denied: OSError | None = None
    for directory in env.get(b"PATH", os.defpath.encode()).split(b":"):
        try:
            os.execve(b"/".join((directory or b".", program)), argv, env)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError as error:
            denied = error
    raise denied or FileNotFoundError(2, "")


def _become(user: bytes, env: dict[bytes, bytes]) -> None:
    """Become ``name``, ``uid``, ``name:group`` or ``uid:gid``; set HOME where there is none."""
    name, _, group = user.decode().partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid, home = entry.pw_uid, entry.pw_gid, entry.pw_dir
        login: str | None = entry.pw_name
    except KeyError:
        if not name.isdigit():
            raise OSError(22, "no such user") from None
        uid, gid, home, login = int(name), int(name), "/", None
    if group:
        try:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise OSError(22, "no such group") from None
        os.setgroups([])
    elif login is not None:
        os.initgroups(login, gid)
    else:
        os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    env.setdefault(b"HOME", os.fsencode(home))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
