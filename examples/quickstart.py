"""Search the standard library's sources: a class on Ray from definition to exit hooks.

Run it with ``make quickstart``. It starts Ray in this process unless ``RAY_ADDRESS`` names a cluster.
"""

from __future__ import annotations

import os
import sqlite3
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from apothic import App, enter, exit, method

app = App("quickstart")


@app.cls(cpu=0, memory_mb=200, max_containers=2, tasks_per_container=1)
class Library:
    """A full-text index over some of the Python sources of this installation."""

    def __init__(self, limit: int = 150) -> None:
        self.limit = limit

    @enter()
    def build(self) -> None:
        # The connection is bound to its thread: all methods and hooks run on that one.
        self.index = sqlite3.connect(":memory:")
        self.index.execute("create virtual table sources using fts5(name, text)")
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: self.limit]
        rows = [(file.stem, file.read_text(errors="replace")) for file in files]
        self.index.executemany("insert into sources values (?, ?)", rows)

    @method()
    def search(self, words: str, most: int = 3) -> list[str]:
        query = "select name from sources where sources match ? order by rank limit ?"
        return [name for (name,) in self.index.execute(query, (words, most))]

    @method()
    def names(self) -> Iterator[str]:
        for (name,) in self.index.execute("select name from sources order by name"):
            yield name

    @method()
    def pid(self) -> int:
        return os.getpid()

    @exit()
    def close_index(self) -> None:
        self.index.close()


def main() -> None:
    """Show the verbs one after the other."""
    library = Library.bind()
    for words in ("socket timeout", "heap queue", "regular expression"):
        print(f"{words!r:24} -> {', '.join(library.search.remote(words))}")
    jobs = [library.pid.spawn() for _ in range(4)]
    print(f"four calls at once ran in {len({job.get() for job in jobs})} containers")

    with Library.remote().names.remote_gen() as names:
        print("streamed:", ", ".join(name for name, _ in zip(names, range(5), strict=False)), "…")

    try:
        library.search.remote('"unbalanced')
    except sqlite3.OperationalError as error:
        print(f"remote {type(error).__name__}: {error}")
        lines = [line.strip() for line in str(error.__cause__).splitlines()]
        print("  remote traceback:", next(line for line in reversed(lines) if line[:4] == "File"))

    named = Library.named("shared", limit=20)
    again = Library.from_handle(named.handle_json)
    print("attached by handle, same process:", again.pid.remote() == named.pid.remote())
    for instance in (named, library):
        report = instance.close()
        print("closed; exit hooks that ran:", [hook.name for hook in report.hooks])


if __name__ == "__main__":
    main()
