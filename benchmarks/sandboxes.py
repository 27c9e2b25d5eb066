"""Sessions against docker-py, SWE-ReX in the container, and raw Ray actors."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import docker.errors
import ray

from apothic import App, Image, SandboxSession
from benchmarks.measure import Row, compare, row_of
from benchmarks.subjects import RawAsync, pss_mib
from benchmarks.swe_rex import NotInstallableError, SweRex, swe_rex
from ray_backend.sandbox.engine.connection import Engine

__all__ = ["measure"]

IMAGE = "apothic-test-debian"
MEMORY_MB = 256
KIB = 1024
MIB = 1024 * KIB
AT_ONCE = 20
CREATED_AT_ONCE = 10
IN_A_ROW = 10
"""Calls before it is the other's turn, where one alone would tell of the other as well: see
`benchmarks.measure.compare`."""
TRUE = ["/bin/true"]

sandbox = App("benchmarks").sandbox(
    name="session",
    image=Image.from_registry(IMAGE),
    cpu=0,
    memory_mb=MEMORY_MB,
    max_containers=100,
)


def measure(quick: bool, notes: list[str]) -> Iterator[Row]:
    """Measure on the cluster that this process is connected to; nothing where there is no engine.

    Args:
        quick: a tenth of the rounds.
        notes: takes what could not be measured, and why.
    """
    try:
        client = docker.from_env()
        client.ping()
        client.images.get(IMAGE)
    except docker.errors.ImageNotFound:
        notes.append(f"sandboxes: not measured: no image {IMAGE}: make docker-images")
        return
    except docker.errors.DockerException as error:
        notes.append(f"sandboxes: not measured: no Docker engine: {error}")
        return
    with contextlib.ExitStack() as undo:
        undo.callback(client.close)
        try:
            rex: SweRex | None = undo.enter_context(swe_rex(client, IMAGE))
        except NotInstallableError as error:
            notes.append(f"SWE-ReX: not measured: {error}")
            rex = None
        yield from _Measurement(client, rex, 10 if quick else 1).rows(undo)


class _Measurement:
    """What the rows share: one session, one container of docker-py, one raw actor."""

    def __init__(self, client: Any, rex: SweRex | None, part: int) -> None:
        self._client = client
        self._rex = rex
        self._part = part
        self._undo: list[Callable[[], object]] = []

    def rows(self, undo: contextlib.ExitStack) -> Iterator[Row]:
        session = undo.enter_context(sandbox.create())
        container = self._container()
        undo.callback(container.remove, force=True)
        yield from self._execs(undo, session, container)
        yield from self._small_files(session, container)
        yield from self._large_files(undo, session, container)
        yield from self._creation()
        yield self._memory()

    # -- execs -----------------------------------------------------------------------------------

    def _execs(
        self, undo: contextlib.ExitStack, session: SandboxSession, container: Any
    ) -> Iterator[Row]:
        rex = self._rex
        raw = RawAsync.options(max_concurrency=1000).remote()
        undo.callback(ray.kill, raw)
        for _ in range(100):
            session.exec(TRUE)
            ray.get(raw.nothing.remote())
        yield self._compare(
            "exec",
            lambda: session.exec(TRUE),
            lambda: container.exec_run(TRUE),
            200,
            "docker-py",
            0.08,
            block=IN_A_ROW,
        )
        yield self._compare(
            "exec",
            lambda: session.exec(TRUE),
            rex and rex.execute,
            500,
            "SWE-ReX",
            0.8,
            block=IN_A_ROW,
        )
        yield self._compare(
            "exec, in turn", lambda: session.exec(TRUE), rex and rex.execute, 500, "SWE-ReX", None
        )
        yield self._compare(
            "exec",
            lambda: session.exec(TRUE),
            lambda: ray.get(raw.nothing.remote()),
            2000,
            "empty call on a raw async actor",
            2.5,
        )
        loop = asyncio.new_event_loop()
        undo.callback(loop.close)
        threads = undo.enter_context(ThreadPoolExecutor(AT_ONCE))

        def ours_at_once() -> None:
            async def all_of_them() -> None:
                await asyncio.gather(*(session.aio.exec(TRUE) for _ in range(AT_ONCE)))

            loop.run_until_complete(all_of_them())

        def others_at_once() -> None:
            list(threads.map(lambda _: container.exec_run(TRUE), range(AT_ONCE)))

        name = f"{AT_ONCE} execs at once"
        yield self._compare(name, ours_at_once, others_at_once, 20, "docker-py", 0.06)
        yield self._compare(
            name, ours_at_once, rex and (lambda: rex.execute_at_once(AT_ONCE)), 100, "SWE-ReX", 1.0
        )

    # -- files -----------------------------------------------------------------------------------

    def _small_files(self, session: SandboxSession, container: Any) -> Iterator[Row]:
        rex, path, text = self._rex, "/tmp/small", os.urandom(KIB // 2).hex()
        content, packed = text.encode(), _packed("small", text.encode())

        def write() -> None:
            session.write_bytes(path, content)

        def read() -> None:
            assert session.read_bytes(path) == content

        def read_archive() -> None:
            chunks, _ = container.get_archive(path)
            with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
                file = archive.extractfile("small")
                assert file is not None
                assert file.read() == content

        yield self._compare(
            "1 KiB write",
            write,
            lambda: container.put_archive("/tmp", packed),
            100,
            "put_archive",
            0.07,
            block=IN_A_ROW,
        )
        yield self._compare(
            "1 KiB read", read, read_archive, 100, "get_archive", 0.07, block=IN_A_ROW
        )
        yield self._compare(
            "1 KiB write", write, rex and (lambda: rex.write(path, text)), 300, "SWE-ReX", None
        )
        yield self._compare(
            "1 KiB read", read, rex and (lambda: rex.read(path)), 300, "SWE-ReX", None
        )

    def _large_files(
        self, undo: contextlib.ExitStack, session: SandboxSession, container: Any
    ) -> Iterator[Row]:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        rex, path = self._rex, "/tmp/large"
        local, back, packed = directory / "large", directory / "back", directory / "large.tar"
        content = os.urandom(32 * MIB).hex().encode()
        local.write_bytes(content)
        packed.write_bytes(_packed("large", content))

        def up() -> None:
            session.upload_file(local, path)

        def put_archive() -> None:
            with packed.open("rb") as archive:
                container.put_archive("/tmp", archive)

        def down() -> None:
            session.download_file(path, back)

        def get_archive() -> None:
            chunks, _ = container.get_archive(path)
            with back.open("wb") as sink:
                for chunk in chunks:
                    sink.write(chunk)

        yield self._compare("64 MiB up", up, put_archive, 20, "put_archive, packed before", 1.0)
        yield self._compare("64 MiB down", down, get_archive, 20, "get_archive, not unpacked", 1.0)
        yield self._compare(
            "64 MiB up", up, rex and (lambda: rex.upload(str(local), path)), 10, "SWE-ReX", None
        )
        yield self._compare(
            "64 MiB down", down, rex and (lambda: rex.read(path)), 10, "SWE-ReX", None
        )

    # -- creation and memory ---------------------------------------------------------------------

    def _creation(self) -> Iterator[Row]:
        against = "raw named detached actor, then docker-py"
        yield self._compare(
            "create() to first exec", self._open, self._open_raw, 20, against, 0.95, self._close
        )
        with ThreadPoolExecutor(CREATED_AT_ONCE) as threads:
            yield self._compare(
                f"{CREATED_AT_ONCE} at once",
                lambda: list(threads.map(lambda _: self._open(), range(CREATED_AT_ONCE))),
                lambda: list(threads.map(lambda _: self._open_raw(), range(CREATED_AT_ONCE))),
                6,
                against,
                0.95,
                self._close,
            )

    def _memory(self) -> Row:
        """Compare the memory of idle sessions with that of empty actors and idle containers."""
        sessions = [self._open() for _ in range(3)]
        raws = [self._open_raw() for _ in range(3)]
        engine = Engine.connect()
        try:
            ours = [
                pss_mib(ray.get(session.actor.apothic_status.remote())["pid"])
                + _container_mib(engine, session.inspect().container_id or "")
                for session in sessions
            ]
            other = [
                pss_mib(ray.get(actor.pid.remote())) + _container_mib(engine, container.id)
                for actor, container in raws
            ]
        finally:
            engine.close()
            self._close()
        return row_of(
            "memory of an idle session",
            ours,
            other,
            against="empty raw actor and idle container",
            limit=1.15,
            unit="MiB",
        )

    def _open(self) -> SandboxSession:
        session = sandbox.create()
        self._undo.append(session.close)
        session.exec(TRUE)
        return session

    def _open_raw(self) -> tuple[Any, Any]:
        name = f"raw-{time.perf_counter_ns()}"
        actor = RawAsync.options(name=name, lifetime="detached").remote()
        self._undo.append(lambda: ray.kill(actor))
        ray.get(actor.nothing.remote())
        container = self._container()
        self._undo.append(lambda: container.remove(force=True))
        container.exec_run(TRUE)
        return actor, container

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _container(self) -> Any:
        container = self._client.containers.create(
            IMAGE, ["sleep", "infinity"], network_mode="none", mem_limit=MEMORY_MB * MIB
        )
        container.start()
        return container

    def _compare(
        self,
        name: str,
        ours: Callable[[], object],
        other: Callable[[], object] | None,
        rounds: int,
        against: str,
        limit: float | None,
        after: Callable[[], object] = lambda: None,
        block: int = 1,
    ) -> Row:
        return compare(
            name,
            ours,
            other,
            max(4, rounds // self._part),
            against=against,
            limit=limit,
            after=after,
            block=block,
        )


def _packed(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _container_mib(engine: Engine, container_id: str) -> float:
    used = engine.memory(container_id)
    assert used is not None
    return used.used_bytes / MIB
