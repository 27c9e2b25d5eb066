"""Search the standard library's sources: a class on Ray, from its definition to its exit hooks.

``make quickstart`` runs it on a Ray of its own; with ``RAY_ADDRESS``, or in a submitted job, it runs on
your cluster. There, ``--keep`` leaves the named instance behind, and ``--attach``, in any later process,
finds it again, asks it, and closes it.

Its sandbox needs a Docker engine where Ray runs, and is left out where there is none.
``APOTHIC_EXAMPLE_IMAGE`` names another image than Docker Hub's busybox.
"""

from __future__ import annotations

import argparse
import os
import re
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import ray

from apothic import App, ClassInstance, CloseReport, Cls, Image, enter, exit, method
from apothic.errors import ImageNotFoundError, SandboxEngineError, SandboxStartError

app = App("quickstart")

QUESTIONS = (
    "heap queue",
    "temporary directory",
    "http cookies",
    "socket timeout",
    "compare sequences",
)


class Hit(NamedTuple):
    module: str
    about: str
    pid: int


@app.cls(cpu=0, memory_mb=100)
class Journal:
    """Keeps lines; here, what exit hooks have to say when their own process is about to end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @method()
    def write(self, line: str) -> None:
        self.lines.append(line)

    @method()
    def read(self) -> list[str]:
        return self.lines


# cpu=0 lets it run on any machine, however few cores it has; a class of your own would say what it uses.
@app.cls(cpu=0, memory_mb=200, max_containers=2, tasks_per_container=1, tags=["search"])
class Library:
    """A full-text index over the sources of Python's standard library."""

    def __init__(self, name: str, journal: ClassInstance) -> None:
        self.name = name
        self.journal = journal
        self.answered = 0

    @enter()
    def build(self) -> None:
        # An SQLite connection belongs to its thread: hooks and methods all run on this one.
        self.index = sqlite3.connect(":memory:")
        self.index.execute("create virtual table sources using fts5(module, source)")
        self.index.executemany("insert into sources values (?, ?)", read_sources())

    @method()
    def search(self, words: str, limit: int = 1) -> list[Hit]:
        query = """select module, source from sources where sources match ?
                   order by bm25(sources, 4.0, 1.0) limit ?"""
        found = self.index.execute(query, (words, limit)).fetchall()
        self.answered += 1
        return [Hit(module, summary(source), os.getpid()) for module, source in found]

    @method()
    def longest(self) -> Iterator[tuple[str, int]]:
        query = "select module, length(source) from sources order by 2 desc"
        yield from self.index.execute(query)

    @method()
    def size(self) -> tuple[int, float]:
        query = "select count(*), sum(length(source)) / 1e6 from sources"
        modules, megabytes = self.index.execute(query).fetchone()
        return modules, megabytes

    @exit()
    def close_index(self) -> None:
        self.index.close()
        self.journal.write.remote(
            f"{self.name}, process {os.getpid()}: index closed after {self.answered} searches"
        )


workspace = app.sandbox(
    name="workspace",
    image=Image.from_registry(os.environ.get("APOTHIC_EXAMPLE_IMAGE", "busybox:stable")),
    cpu=0,
    memory_mb=64,
)


def read_sources() -> Iterator[tuple[str, str]]:
    """Give the name and the source of every module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).with_suffix("")
        if not {"test", "tests", "site-packages", "dist-packages"}.intersection(path.parts):
            yield ".".join(path.parts).removesuffix(".__init__"), file.read_text(errors="replace")


def summary(source: str) -> str:
    """Give the first line of a module's docstring."""
    found = re.match(r'(?:\s*#[^\n]*\n|\s)*[rR]?"""\s*([^\n"]*)', source)
    return found[1].strip() if found else ""


# A program that has none of the class's code: it is given a handle, and that is enough.
VISITOR = """
import os, sys
from apothic import Cls

shared = Cls.from_handle(sys.argv[1])
[[module, about, pid]] = shared.search.remote("regular expression")
print(f"process {os.getpid()}, by its handle: process {pid} says {module!r}, {about}")
"""


def main() -> None:
    """Show the verbs one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--keep", action="store_true", help="leave the named instance behind")
    choice.add_argument("--attach", action="store_true", help="find it again, ask it, close it")
    arguments = parser.parse_args()
    if arguments.attach:
        attach()
        return

    print(f"connected to cluster {app.client.cluster_id[:8]}")  # the client connects at first use

    title("Search, in up to two processes")
    journal = Journal.named("journal")
    library = Library.bind("library", journal)
    modules, megabytes = library.size.remote()
    say(f"indexed {modules} modules, {megabytes:.0f} MB of sources")
    hits = [hits[0] for hits in library.search.map(QUESTIONS)]
    for words, hit in zip(QUESTIONS, hits, strict=True):
        say(f"{words:20} {hit.module:14} {hit.about}")
    say(f"{len(hits)} searches at once were answered by {len({hit.pid for hit in hits})} processes")

    title("Stream from a generator")
    with library.longest.remote_gen() as modules_by_size:
        for module, characters in islice(modules_by_size, 3):  # leaving early stops the producer
            say(f"{module:20} {characters:>9,} characters")

    title("See a remote exception as if it were raised here")
    try:
        library.search.remote('"unbalanced')
    except sqlite3.OperationalError as error:
        say(f"sqlite3.{type(error).__name__}: {error}; its cause is the remote traceback:")
        for line in str(error.__cause__).strip().splitlines():
            say(f"  | {line}")

    title("Share a named instance with another process")
    shared = Library.named("shared", "shared", journal)
    say(f"process {os.getpid()} made {shared.id!r}, which lives in process {shared.inspect().pid}")
    address = os.environ.get("RAY_ADDRESS") or ray.get_runtime_context().gcs_address
    visit = subprocess.run(
        [sys.executable, "-c", VISITOR, shared.handle_json],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    say(visit.stdout.strip())

    title("Run programs in a sandbox")
    show_sandbox(hits)

    title("Close, and see that the exit hooks ran")
    report("library", library.close())
    if arguments.keep and "RAY_ADDRESS" in os.environ:
        app.deploy()
        say("'shared' is kept: find it with quickstart.py --attach")
    else:
        if arguments.keep:
            say("'shared' cannot be kept: this Ray ends with this process (set RAY_ADDRESS)")
        finish(shared, journal)


def show_sandbox(hits: list[Hit]) -> None:
    """Work in a container, or say why there can be none."""
    began = time.perf_counter()
    try:
        session = workspace.create(cwd="/work")
    except (SandboxStartError, SandboxEngineError, ImageNotFoundError) as error:
        say(f"left out: {error}")
        return
    with session:
        say(f"a container without network was ready in {time.perf_counter() - began:.2f} s")
        session.write_text("hits.txt", "".join(f"{hit.module} {hit.about}\n" for hit in hits))
        result = session.exec(["wc", "-w", "hits.txt"])
        say(f"{result.command_text}: {result.stdout.strip()}, exit status {result.returncode}")
        for event in session.exec_stream("sort hits.txt | head -n 2; cat missing", shell=True):
            for line in event.text.splitlines():
                say(f"{event.kind}: {line}")
        try:
            session.exec("sleep 60 & sleep 60", shell=True, timeout_s=0.2)
        except TimeoutError:
            alive = session.exec("pidof sleep | wc -w", shell=True).stdout.strip()
            say(f"two programs were stopped after 0.2 s; of these are alive: {alive}")
        began = time.perf_counter()
        for _ in range(200):
            session.exec(["true"])
        each_ms = (time.perf_counter() - began) / 200 * 1000
        say(f"200 programs, one after the other: {each_ms:.1f} ms each")


def attach() -> None:
    """Find the named instance that an earlier run left, by its name alone, and close it."""
    title("Find the named instance of an earlier run")
    if "quickstart" not in app.client.list_apps():
        sys.exit("no earlier run left anything on this cluster: run quickstart.py --keep first")
    kept = Cls.from_name("quickstart", "Library")
    if "shared" not in kept.inspect().instances:
        sys.exit("no instance 'shared' lives on this cluster: run quickstart.py --keep first")
    shared = kept.named("shared")
    [hit] = shared.search.remote("http cookies")
    say(f"process {os.getpid()}, by its name: process {hit.pid} says {hit.module!r}, {hit.about}")
    finish(shared, Cls.from_name("quickstart", "Journal").named("journal"))


def finish(shared: ClassInstance, journal: ClassInstance) -> None:
    """Close what is named, and print what the exit hooks wrote."""
    report("shared", shared.close())
    for line in journal.read.remote():
        say(line)
    journal.close()


def report(name: str, closed: CloseReport) -> None:
    for hook in closed.hooks:
        took_ms = hook.duration_s * 1000
        say(f"{name}: ran {hook.name} in {took_ms:.0f} ms, {hook.error or 'no error'}")


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    main()
