"""Many sandboxes side by side on one image, as reinforcement learning and evaluations need them.

    python examples/rollouts.py [--sessions 16] [--parallel 8]

Each rollout is a session of its own: it gets a task, tries several programs for it, scores each by what
it prints, and goes. A progress bar counts the sessions that are done, a table has the results.

It needs a Docker engine where Ray runs. ``APOTHIC_EXAMPLE_IMAGE`` names another image with a shell and
awk than Docker Hub's busybox.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from typing import NamedTuple

from apothic import App, Image

app = App("rollouts")

# cpu=0 sets no quota, so that more sessions run side by side than there are cores.
rollout = app.sandbox(
    name="rollout",
    image=Image.from_registry(os.environ.get("APOTHIC_EXAMPLE_IMAGE", "busybox:stable")),
    cpu=0,
    memory_mb=64,
    timeout_s=1,
)

# What a policy might try when it is asked how many different numbers a file holds.
ATTEMPTS = {
    "sort -u": "sort -u task.txt | wc -l",
    "awk": "awk '!seen[$1]++ { n++ } END { print n }' task.txt",
    "uniq": "uniq task.txt | wc -l",  # counts repetitions that are not adjacent
    "no such file": "wc -l < tasks.txt",
    "too slow": "sleep 60 & sleep 60",  # both are killed when the time is over
}


class Score(NamedTuple):
    attempt: str
    reward: int
    took_s: float


async def run_one(number: int, limit: asyncio.Semaphore) -> list[Score]:
    """One rollout: every attempt in turn, in a session of its own."""
    chance = random.Random(number)
    numbers = [chance.randrange(400) for _ in range(500)]
    scores = []
    async with limit, await rollout.aio.create(cwd="/task") as session:
        await session.aio.write_text("task.txt", "".join(f"{each}\n" for each in numbers))
        for attempt, command in ATTEMPTS.items():
            began = time.perf_counter()
            try:
                result = await session.aio.exec(command, shell=True)
                right = result.ok and result.stdout.strip() == str(len(set(numbers)))
            except TimeoutError:
                right = False
            scores.append(Score(attempt, int(right), time.perf_counter() - began))
    return scores


async def with_progress(rollouts: list[asyncio.Task[list[Score]]]) -> list[Score]:
    """Wait for all; draw a bar where standard error is a terminal."""
    scores: list[Score] = []
    for count, finished in enumerate(asyncio.as_completed(rollouts), 1):
        scores += await finished
        if sys.stderr.isatty():
            filled = 40 * count // len(rollouts)
            bar = "#" * filled + "." * (40 - filled)
            end = "\n" if count == len(rollouts) else ""
            print(f"\r[{bar}] {count}/{len(rollouts)}", end=end, file=sys.stderr, flush=True)
    return scores


def table(scores: list[Score]) -> str:
    """Lay out the mean reward and the median time of each attempt."""
    rows = [f"{'attempt':14}{'reward':>8}{'median s':>10}"]
    for attempt in ATTEMPTS:
        of_it = [score for score in scores if score.attempt == attempt]
        reward = statistics.mean(score.reward for score in of_it)
        took_s = statistics.median(score.took_s for score in of_it)
        rows.append(f"{attempt:14}{reward:8.2f}{took_s:10.3f}")
    return "\n".join(rows)


async def run(sessions: int, parallel: int) -> None:
    """Run the rollouts and print their results."""
    began = time.perf_counter()
    limit = asyncio.Semaphore(parallel)
    rollouts = [asyncio.create_task(run_one(number, limit)) for number in range(sessions)]
    scores = await with_progress(rollouts)
    took_s = time.perf_counter() - began
    print(f"{sessions} sessions, {parallel} at once, in {took_s:.1f} s")
    print(table(scores))


def main() -> None:
    """Connect, then run the rollouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--parallel", type=int, default=8, help="sessions that live at once")
    given = parser.parse_args()
    print(f"connected to cluster {app.client.cluster_id[:8]}")  # not part of what is measured
    asyncio.run(run(given.sessions, given.parallel))


if __name__ == "__main__":
    main()
