"""How a container ended, and whether memory ran out in it.

Three sources, since none is always there. From inside, the kernel's own counter: exact, and the
container cannot forge it, for its cgroup files are read-only. From the engine's events, of which it
keeps the last 256, also of containers that it has removed. And from the engine's record of a stopped
container (of a live one Docker 20.10 says nothing).
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import datetime

from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.translate import translated

__all__ = ["OOM_COUNTER_FILES", "Outcome", "ask_outcome", "count_oom_events", "parse_oom_kills"]

OOM_COUNTER_FILES = (
    "/sys/fs/cgroup/memory.events",  # cgroup v2
    "/sys/fs/cgroup/memory/memory.oom_control",  # cgroup v1, Linux 4.13 and later
)
"""Files inside the container; the first that exists holds the counter."""

_KILLED = 128 + 9
_OOM_LATE_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """How a container is, or how it ended.

    Attributes:
        running: whether it still runs.
        exit_code: PID 1's exit status, or None when it is not known.
        oom_killed: whether a process in it was killed for memory.
    """

    running: bool
    exit_code: int | None
    oom_killed: bool


def parse_oom_kills(text: str) -> int | None:
    """Read how many processes were killed for memory; None when the text does not say.

    Compare before and after: the count is that of the container's life.
    """
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdigit():
            return int(value)
    return None


def ask_outcome(engine: Engine, container_id: str, *, timeout_s: float = 10.0) -> Outcome:
    """Ask the engine once the stream has ended, a moment before the container itself does.

    Works after the container was removed, too, while the engine remembers its events.

    Args:
        engine: where it ran.
        container_id: the engine's id.
        timeout_s: how long to wait for its end; after that it counts as running.
    """
    try:
        exit_code = engine.wait(container_id, timeout_s)
    except TimeoutError:
        found = engine.inspect(container_id)
        return Outcome(True, None, found is not None and found.oom_killed)
    outcome = _ended(engine, container_id, exit_code)
    deadline = time.monotonic() + _OOM_LATE_S
    # Killed, by whom? The engine may hear of the end before it hears of the memory.
    while outcome.exit_code == _KILLED and not outcome.oom_killed and time.monotonic() < deadline:
        time.sleep(_OOM_LATE_S / 5)
        outcome = _ended(engine, container_id, exit_code)
    return outcome


def _ended(engine: Engine, container_id: str, exit_code: int | None) -> Outcome:
    found = engine.inspect(container_id)
    running = found is not None and found.running
    oom_killed = found is not None and found.oom_killed
    if found is not None:
        exit_code = found.exit_code or exit_code
    for action, attributes in _events(engine, container_id):
        if action == "oom":
            oom_killed = True
        elif action == "die" and exit_code is None and attributes.get("exitCode", "").isdigit():
            exit_code = int(attributes["exitCode"])
    return Outcome(running, exit_code, oom_killed)


def count_oom_events(engine: Engine, container_id: str) -> int:
    """Count the events of memory having run out in a container, live or not: about 15 ms."""
    return sum(action == "oom" for action, _ in _events(engine, container_id))


def _events(engine: Engine, container_id: str) -> list[tuple[str, dict[str, str]]]:
    with translated("give its events"):
        # Its own clock, which may differ from ours; with an end in the past the answer ends at once.
        until = _unix_time(engine.api.info()["SystemTime"])
        stream = engine.api.events(
            since="1",  # type: ignore[call-overload]
            until=until,
            filters={"container": container_id, "event": ["oom", "die"]},
        )
        text = b"".join(
            chunk if isinstance(chunk, bytes) else chunk.encode() for chunk in stream
        ).decode()
    events, decoder, at = [], json.JSONDecoder(), 0
    while (at := len(text) - len(text[at:].lstrip())) < len(text):
        event, at = decoder.raw_decode(text, at)
        events.append((event["Action"], event["Actor"]["Attributes"]))
    return events


def _unix_time(text: str) -> str:
    """Turn an RFC 3339 time with up to nine digits of a second into what ``/events`` takes."""
    whole, fraction = re.sub(r"\.\d+", "", text), re.search(r"\.(\d+)", text)
    seconds = datetime.fromisoformat(whole.replace("Z", "+00:00")).timestamp()
    return f"{int(seconds)}.{fraction[1] if fraction else '0':0<9}"
