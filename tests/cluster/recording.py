"""What nodes ask of the Docker engine: a socket between them and it, which writes down what they create.

It takes the GPUs out of the requests that it passes on, since the engine has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from ray_backend.sandbox.engine.connection import Engine

_CREATE = b"/containers/create"
_LIMIT = 2**20


class RecordingEngine:
    """Listens at `url` from `start` to `stop`.

    Attributes:
        takes_gpus: whether it grants GPUs, as an engine with the driver would.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._directory = Path(tempfile.mkdtemp(prefix="apothic-"))
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._serving: set[asyncio.Task[Any]] = set()
        self._created: dict[str, dict[str, Any]] = {}
        self.takes_gpus = True

    @property
    def url(self) -> str:
        """The value for ``DOCKER_HOST``."""
        return f"unix://{self._directory}/docker.sock"

    def devices_of(self, container_id: str | None) -> list[dict[str, Any]] | None:
        """Give the device requests with which a live container was asked for; None without any."""
        assert container_id is not None
        engine = Engine.connect()
        try:
            found = engine.inspect(container_id)
        finally:
            engine.close()
        assert found is not None
        asked: list[dict[str, Any]] | None = self._created[found.name]["HostConfig"].get(
            "DeviceRequests"
        )
        return asked

    def start(self) -> None:
        """Listen."""
        ready = threading.Event()

        async def listen() -> None:
            path = self.url.removeprefix("unix://")
            async with await asyncio.start_unix_server(self._serve, path, limit=_LIMIT):
                ready.set()
                await self._stopped.wait()
                connections = asyncio.all_tasks() - {asyncio.current_task()}
                for task in connections:
                    task.cancel()
                await asyncio.gather(*connections, return_exceptions=True)
                for _ in range(3):  # what they closed ends in the loop's next rounds
                    await asyncio.sleep(0)

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(listen(),))
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        """Stop listening, and drop the connections."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._directory)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        self._serving.add(me)  # the loop itself holds no task
        there, back = await asyncio.open_unix_connection(self._target, limit=_LIMIT)
        answers = asyncio.ensure_future(_pass_on(there, writer))
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while not await self._pass_request(reader, back):
                    pass
                await _pass_on(reader, back)
            _end(back)
            await answers
        except asyncio.CancelledError:
            answers.cancel()
        finally:
            writer.close()
            back.close()
            self._serving.discard(me)

    async def _pass_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Pass one request on; True where the connection is no longer HTTP after it."""
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().rstrip("\r\n").split("\r\n")
        fields = {key.lower(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        if _CREATE in first.encode():
            body = self._record(first, body)
            kept = [line for line in lines if not line.lower().startswith("content-length:")]
            head = "\r\n".join([first, *kept, f"Content-Length: {len(body)}", "", ""]).encode()
        writer.write(head + body)
        while fields.get("transfer-encoding") == "chunked":
            size = await reader.readuntil(b"\r\n")
            writer.write(size + await reader.readexactly(int(size, 16) + 2))
            await writer.drain()
            if int(size, 16) == 0:
                break
        await writer.drain()
        return "upgrade" in fields

    def _record(self, first: str, body: bytes) -> bytes:
        asked = json.loads(body)
        name = first.partition("name=")[2].partition("&")[0].partition(" ")[0]
        self._created[name] = json.loads(body)
        if self.takes_gpus:
            asked["HostConfig"].pop("DeviceRequests", None)
        return json.dumps(asked).encode()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(_LIMIT):
            writer.write(piece)
            await writer.drain()
    _end(writer)


def _end(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
