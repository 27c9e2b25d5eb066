"""`HangGuard`: ends a process whose interpreter lock is held for ever, and tells its successor.

Native code that keeps the lock (a regular expression that backtracks, a C extension) stops every Python
thread of the process, so no watchdog written in Python can run. `faulthandler`'s timer can: it is a
thread in C that needs no lock. It is set to some seconds after the last deadline of the running calls,
pushed on while Python still runs, and if it goes off it writes the stacks of all threads to a file and
ends the process. What the calls were stands in a second, memory-mapped file, so that the actor's next
process (Ray starts it on the same node) can say which of them ran out of time, and where.

The timer is the process's only one: user code that calls `faulthandler.dump_traceback_later` itself
takes this protection away, not the ordinary time limits.
"""

from __future__ import annotations

import faulthandler
import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HANG_GRACE_S", "HangGuard", "HungCall", "read_hang"]

HANG_GRACE_S = 4.0
"""Seconds past a deadline after which an interpreter that runs no Python is given up."""

_SLOT = struct.Struct("<dd24s")
_MAX_SLOTS = 1024  # calls at once that are told apart
_MAX_TRACE_CHARS = 4000


@dataclass(frozen=True)
class HungCall:
    """A call that ran when its process was ended.

    Attributes:
        task_id: in hex, as the caller's reference has it.
        timeout_s: its limit.
        overdue: its time was up; otherwise it only ran beside the one that hung.
    """

    task_id: str
    timeout_s: float
    overdue: bool


class HangGuard:
    """The timer of one process, and its note of what is running."""

    def __init__(self, base: Path, slots: int, timeout_s: float) -> None:
        """Prepare the files ``base.calls`` and ``base.stacks``; the timer is set by `cover`."""
        base.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = open(base.with_suffix(".stacks"), "w+b")  # noqa: SIM115 - kept open
        size = _SLOT.size * min(slots, _MAX_SLOTS)
        with open(base.with_suffix(".calls"), "w+b") as file:
            file.truncate(size)
            self._slots = mmap.mmap(file.fileno(), size)
        self._paths = (base.with_suffix(".calls"), base.with_suffix(".stacks"))
        self._free = list(range(size // _SLOT.size))
        # Setting the timer starts a thread: once for many calls, not for each.
        self._slack_s = min(1.0, max(0.05, timeout_s / 20))
        self.fires_at = 0.0
        """When the timer goes off, on the monotonic clock; 0 when it is not set."""

    def cover(self, deadline: float, *, alone: bool) -> None:
        """See to it that the timer is not sooner than a deadline needs, nor much later.

        Args:
            deadline: of a call that begins, on the monotonic clock.
            alone: no other call runs, so that a timer set for a longer one may be drawn in.
        """
        wanted = deadline + HANG_GRACE_S
        if self.fires_at < wanted or (alone and self.fires_at > wanted + self._slack_s):
            self.fires_at = wanted + self._slack_s
            faulthandler.dump_traceback_later(
                max(0.1, self.fires_at - time.monotonic()), file=self._stacks, exit=True
            )

    def rest(self) -> None:
        """Take the timer back: nothing runs."""
        faulthandler.cancel_dump_traceback_later()
        self.fires_at = 0.0

    def note(self, task_id: bytes, deadline: float, timeout_s: float) -> int:
        """Write down a running call; give its slot, or -1 when there are more than can be noted."""
        if not self._free:
            return -1
        slot = self._free.pop()
        _SLOT.pack_into(self._slots, slot * _SLOT.size, deadline, timeout_s, task_id)
        return slot

    def forget(self, slot: int) -> None:
        """Strike a call out."""
        if slot >= 0:
            _SLOT.pack_into(self._slots, slot * _SLOT.size, 0.0, 0.0, b"")
            self._free.append(slot)

    def close(self) -> None:
        """Take the timer back and remove the files."""
        self.rest()
        for path in self._paths:
            path.unlink(missing_ok=True)


def read_hang(base: Path) -> tuple[list[HungCall], str] | None:
    """Tell what ran in the process before this one if its guard ended it, and the stacks; else None.

    What is found is removed, so that it is told once.
    """
    calls, stacks = base.with_suffix(".calls"), base.with_suffix(".stacks")
    try:
        trace = stacks.read_bytes().decode(errors="replace").strip()
        slots = calls.read_bytes()
    except FileNotFoundError:
        return None
    for path in (calls, stacks):
        path.unlink(missing_ok=True)
    if not trace:
        return None
    now = time.monotonic()  # one clock for all processes since the machine was started
    found = [
        HungCall(task_id.hex(), timeout_s, overdue=deadline < now)
        for deadline, timeout_s, task_id in _SLOT.iter_unpack(slots)
        if deadline
    ]
    return found, trace[-_MAX_TRACE_CHARS:]
