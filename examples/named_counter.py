"""A counter that goes on where it stood: run it twice against one cluster.

    ray start --head
    RAY_ADDRESS=127.0.0.1:6379 python examples/named_counter.py          # counted 1
    RAY_ADDRESS=127.0.0.1:6379 python examples/named_counter.py          # counted 2
    RAY_ADDRESS=127.0.0.1:6379 python examples/named_counter.py --close

The second run is another process and another Ray job; the instance, and its state, is the same.
"""

from __future__ import annotations

import argparse
import os
import time

from apothic import App, method

app = App("named-counter")


@app.cls(cpu=0, memory_mb=100)
class Counter:
    """Counts, and knows where and since when it lives."""

    def __init__(self) -> None:
        self.count = 0
        self.began_s = time.monotonic()

    @method()
    def add(self, by: int = 1) -> int:
        self.count += by
        return self.count

    @method()
    def age_s(self) -> float:
        return time.monotonic() - self.began_s


def main() -> None:
    """Count, or close the counter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--close", action="store_true", help="close the counter")
    if parser.parse_args().close:
        closed = Counter.close_named("visits").closed
        print("closed" if closed else "there was no counter to close")
        return
    counter = Counter.named("visits")
    count = counter.add.remote()
    where = f"process {counter.inspect().pid}, {counter.age_s.remote():.0f} s old"
    print(f"process {os.getpid()} counted {count} in {where}")
    if "RAY_ADDRESS" not in os.environ:
        print("this Ray ends with this process, and the counter too: set RAY_ADDRESS to keep it")


if __name__ == "__main__":
    main()
