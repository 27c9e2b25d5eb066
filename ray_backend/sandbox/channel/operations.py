"""What is under way on a channel: each takes the events of one stream, on the channel's loop.

Whoever waits on one gets `AgentRequestError` when the agent refuses and `ChannelClosedError` when the
channel ends, whenever that is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from ray_backend.sandbox.agent.constants import Channel
from ray_backend.sandbox.channel.errors import AgentRequestError, ChannelClosedError
from ray_backend.sandbox.protocol import (
    AgentConnection,
    Done,
    Event,
    Exited,
    Failed,
    FileStat,
    Granted,
    Listed,
    Opened,
    Output,
)

__all__ = [
    "AgentProcess",
    "AgentReader",
    "AgentWriter",
    "EndError",
    "Incoming",
    "Operation",
    "Reply",
    "Sender",
]

ANSWER_LIMIT_S = 120.0
"""Seconds of silence in answer to a request after which the agent is given up; it takes milliseconds.
What programs take has no such limit: an exec waits, and so does the input that one does not read."""
KILL_OUTPUT_MAX_BYTES = 4 * 1024 * 1024
"""More than a program can have left in its pipes and the agent when it dies."""
PIPE_BYTES = 64 * 1024
"""What a pipe holds, unless a program has made it larger or pages have more than 4 KiB (pipe(7))."""

T = TypeVar("T")
EndError = Callable[[], Exception]
"""Makes a new error for each who waits: one object raised twice would mix up their tracebacks."""


class Sender(Protocol):
    """What an operation needs of its channel."""

    connection: AgentConnection

    def send(self, data: bytes) -> None:
        """Send now; raises ChannelClosedError."""

    async def drain(self) -> None:
        """Wait until more can be sent; raises ChannelClosedError."""

    async def kill(
        self, stream: int, grace_ms: int, discard_output: bool, held_up: Callable[[], bool]
    ) -> None:
        """Kill an exec and wait until it is dead; raises ChannelClosedError.

        ``held_up`` tells whether it is for us that the agent waits.
        """

    async def wait_served(self) -> None:
        """Wait until the agent has had a turn at every stream; raises ChannelClosedError."""

    def give_up(self) -> None:
        """End the channel, as the agent has been silent for too long."""


class Operation(Protocol):
    """Something that events of one stream are for."""

    def on_event(self, event: Event) -> None:
        """Take an event, the last of which is Done, Failed or Exited."""

    def on_lost(self, error: EndError) -> None:
        """Take the end of the channel."""


class Signal:
    """Wakes the one task that waits; who waits looks before, and again after."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self, late: Callable[[], None] | None = None) -> None:
        """Wait for the next `wake`; call ``late`` when it does not come in time."""
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for one stream of the sandbox agent")
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if late is None else loop.call_later(ANSWER_LIMIT_S, late)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Wake who waits, if anybody does."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Inbox(Generic[T]):
    """Items that have come and have not been taken; credit bounds how many there can be."""

    def __init__(self, late: Callable[[], None] | None = None) -> None:
        self._late = late
        self._items: deque[T] = deque()
        self._signal = Signal()
        self._ended = False
        self._error: EndError | None = None

    def put(self, item: T) -> None:
        """Add one."""
        self._items.append(item)
        self._signal.wake()

    def end(self, error: EndError | None = None) -> None:
        """Say that no more comes, and why if that is an error; the first end counts."""
        if not self._ended:
            self._ended, self._error = True, error
            self._signal.wake()

    @property
    def ended(self) -> bool:
        """Whether no more comes."""
        return self._ended

    @property
    def empty(self) -> bool:
        """Whether all that has come was taken."""
        return not self._items

    def clear(self) -> None:
        """Drop what has come."""
        self._items.clear()

    async def take(self) -> T | None:
        """Give the next; None at the end, or its error."""
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error()
                return None
            await self._signal.wait(self._late)
        return self._items.popleft()


def refusal(event: Failed) -> EndError:
    """Make the error of a request that failed."""
    return lambda: AgentRequestError(event)


class Reply:
    """A request with one answer."""

    def __init__(self, late: Callable[[], None]) -> None:
        self._late = late
        self._signal = Signal()
        self._done: Done | None = None
        self._error: EndError | None = None

    async def done(self) -> Done:
        """Wait for the answer."""
        while self._done is None:
            if self._error is not None:
                raise self._error()
            await self._signal.wait(self._late)
        return self._done

    def on_event(self, event: Event) -> None:
        """Take the answer."""
        if isinstance(event, Failed):
            self.on_lost(refusal(event))
        elif isinstance(event, Done):
            self._done = event
            self._signal.wake()

    def on_lost(self, error: EndError) -> None:
        """Fail who waits; the first error counts."""
        self._error = self._error or error
        self._signal.wake()


class Credit:
    """Gives credit back once enough was taken, so that frames of credit are few."""

    def __init__(self, sender: Sender, stream: int, channel: Channel, window: int) -> None:
        self._sender = sender
        self._stream = stream
        self._channel = channel
        self._step = max(1, window // 4)
        self._taken = 0

    def taken(self, size: int) -> None:
        """Note that so much was taken."""
        self._taken += size
        if self._taken >= self._step:
            amount, self._taken = self._taken, 0
            # Nothing when the stream has ended meanwhile.
            with suppress(ChannelClosedError):  # what has come before the end is given all the same
                credit = self._sender.connection.credit(self._stream, self._channel, amount)
                self._sender.send(credit)


class Incoming:
    """A file, the blob, the environment or a directory as it comes."""

    def __init__(self, sender: Sender, stream: int, window: int) -> None:
        self._sender = sender
        self._stream = stream
        self._credit = Credit(sender, stream, Channel.STDOUT, window)
        self._inbox: Inbox[Opened | Output | Listed] = Inbox(sender.give_up)
        self._unwanted = False

    async def take(self) -> Opened | Output | Listed | None:
        """Give the next event; None at the end."""
        event = await self._inbox.take()
        if isinstance(event, Output):
            self._credit.taken(len(event.data))
        elif isinstance(event, Listed):
            self._credit.taken(event.cost)
        return event

    def cancel(self) -> None:
        """Want no more; idempotent, nothing after the end."""
        if not self._unwanted and not self._inbox.ended:
            self._unwanted = True
            self._inbox.clear()
            with suppress(ChannelClosedError):
                self._sender.send(self._sender.connection.cancel(self._stream))

    def on_event(self, event: Event) -> None:
        """Take a piece, or the end."""
        if isinstance(event, Opened | Output | Listed):
            if not self._unwanted:
                self._inbox.put(event)
        else:
            self._inbox.end(refusal(event) if isinstance(event, Failed) else None)

    def on_lost(self, error: EndError) -> None:
        """Fail who waits."""
        self._inbox.end(error)


class AgentReader:
    """A file, or what reads like one, that is open for reading. One task may wait on it."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming
        self._stat: FileStat | None = None
        self._rest = memoryview(b"")

    async def stat(self) -> FileStat:
        """Wait until it is open; give what it was then.

        Raises:
            AgentRequestError: it cannot be opened.
            ChannelClosedError: the channel ended.
        """
        if self._stat is None:
            event = await self._incoming.take()
            assert isinstance(event, Opened)  # the codec sees to it
            self._stat = event.stat
        return self._stat

    async def read(self, limit: int) -> bytes:
        """Give ``limit`` bytes more, or less at the end, and then nothing.

        Raises:
            AgentRequestError: it cannot be opened, or not be read.
            ChannelClosedError: the channel ended.
        """
        await self.stat()
        pieces: list[memoryview] = []
        while limit > 0:
            if not self._rest:
                event = await self._incoming.take()
                if not isinstance(event, Output):
                    break
                self._rest = memoryview(event.data)
            pieces.append(self._rest[:limit])
            limit -= len(pieces[-1])
            self._rest = self._rest[len(pieces[-1]) :]
        return b"".join(pieces)

    def close(self) -> None:
        """Let go of it; idempotent. One that is not closed is kept open until its end is read."""
        self._incoming.cancel()


class _Input:
    """What is sent on a stream, as far as its window goes."""

    def __init__(
        self,
        sender: Sender,
        stream: int,
        *,
        closed: bool = False,
        late: Callable[[], None] | None = None,
    ) -> None:
        self._sender = sender
        self._late = late
        self._stream = stream
        self._signal = Signal()
        self._closed = closed
        self.ended = False

    async def write(self, data: bytes | memoryview) -> bool:
        """Send all of it; gives False when the stream has ended before."""
        rest = memoryview(data).cast("B")
        connection = self._sender.connection
        while rest and not self.ended:
            size = min(len(rest), connection.window(self._stream))
            if not size and not self._closed:
                await self._signal.wait(self._late)
                continue
            self._sender.send(connection.send(self._stream, rest[: max(size, 1)]))
            rest = rest[size:]
            await self._sender.drain()
        return not rest

    def close(self) -> None:
        """Say that no more comes; idempotent."""
        if not self.ended and not self._closed:
            self._closed = True
            self._sender.send(self._sender.connection.end(self._stream))

    def more(self) -> None:
        """Wake who waits for the window."""
        self._signal.wake()

    def end(self) -> None:
        """Stop who writes: the stream has ended."""
        self.ended = True
        self._signal.wake()


class AgentWriter:
    """A file that is being written; see `AgentConnection.write` for what becomes of an old one."""

    def __init__(self, sender: Sender, stream: int) -> None:
        self._sender = sender
        self._stream = stream
        self._input = _Input(sender, stream, late=sender.give_up)
        self._reply = Reply(sender.give_up)
        self._aborted = False

    async def write(self, data: bytes | memoryview) -> None:
        """Write after what was written. One task may wait.

        Raises:
            AgentRequestError: it failed, now or earlier.
            ChannelClosedError: the channel ended.
            ValueError: after `finish` or `abort`.
        """
        if not await self._input.write(data):
            await self._reply.done()  # raises, as a file ends well only after `finish`
            raise ValueError("a file was written to after its end")

    async def finish(self) -> FileStat:
        """End well; give what became of the file.

        Raises:
            AgentRequestError: it failed, now or earlier.
            ChannelClosedError: the channel ended.
        """
        if not self._aborted:
            self._input.close()
        done = await self._reply.done()
        assert done.stat is not None  # the codec sees to it
        return done.stat

    def abort(self) -> bool:
        """End badly: a file that it created is removed. Idempotent, nothing after the end.

        Whatever is asked of the agent after this finds it done; before, it need not have come there.

        Returns:
            Whether the agent had to be told.
        """
        if self._input.ended or self._aborted:
            return False
        self._aborted = True
        with suppress(ChannelClosedError):
            self._sender.send(self._sender.connection.cancel(self._stream))
        return True

    def on_event(self, event: Event) -> None:
        """Take a grant, or the end."""
        if isinstance(event, Granted):
            self._input.more()
            return
        self._reply.on_event(event)
        self._input.end()

    def on_lost(self, error: EndError) -> None:
        """Fail who waits."""
        self._reply.on_lost(error)
        self._input.end()


class AgentProcess:
    """A program that was started, with all that descends from it."""

    def __init__(self, sender: Sender, stream: int, window: int, *, stdin: bool) -> None:
        self._sender = sender
        self._stream = stream
        self._credits = {each: Credit(sender, stream, each, window) for each in Channel}
        self._inbox: Inbox[Output] = Inbox()
        self._input = _Input(sender, stream, closed=not stdin)
        self._discarding = False
        self._pipes_granted = False
        self._taken_bytes = 0
        self._lost: EndError | None = None
        self._exited: Exited | None = None

    @property
    def exited(self) -> Exited | None:
        """How it ended; None while it runs, or if it never ran."""
        return self._exited

    async def next_output(self) -> tuple[Channel, bytes] | None:
        """Give the next piece of output; None at the end. One task may wait.

        A program whose output nobody takes is held up once 2 windows of it have come.

        Raises:
            AgentRequestError: it never ran.
            ChannelClosedError: the channel ended.
        """
        event = await self._inbox.take()
        if event is None:
            return None
        self._credits[event.channel].taken(len(event.data))
        self._taken_bytes += len(event.data)
        return event.channel, event.data

    async def write(self, data: bytes | memoryview) -> bool:
        """Write to its stdin as fast as it reads; False when it ended before all of it had gone.

        Once nobody can read any more, what is written counts as gone, as if it were in the pipe.

        Raises:
            ChannelClosedError: the channel ended.
            ValueError: it was started without stdin, or that is closed.
        """
        whole = await self._input.write(data)
        if self._lost is not None:
            raise self._lost()
        return whole

    def close_stdin(self) -> None:
        """Close its stdin; idempotent, nothing if it has ended."""
        self._input.close()

    async def has_ended(self) -> bool:
        """Tell whether the program has ended, also while nobody takes its output.

        The agent tells of the end when it has sent the output. So that it can, it is allowed once to
        send what the pipes of an ended program hold, whoever takes that when. The end stays untold
        only of one that had made its pipes larger and left them fuller.

        Raises:
            ChannelClosedError: the channel ended.
        """
        # With nothing left to take there is credit, and no end waits for any.
        if not self._inbox.ended and not self._inbox.empty:
            if not self._pipes_granted:
                self._pipes_granted = True
                for each in Channel:
                    grant = self._sender.connection.credit(self._stream, each, PIPE_BYTES)
                    self._sender.send(grant)
            # A turn for what is in each pipe, and one for the end.
            for _ in range(len(Channel) + 1):
                if not self._inbox.ended:
                    await self._sender.wait_served()
        return self._inbox.ended

    def signal(self, number: int) -> None:
        """Send a signal to the process group of the program; nothing if it has ended."""
        if not self._input.ended:
            self._sender.send(self._sender.connection.signal(self._stream, number))

    async def kill(self, grace_s: float = 0.0, *, discard_output: bool = False) -> None:
        """End the whole tree: SIGTERM, so much time, SIGKILL; also what it left behind at its end.

        Returns when nothing of it is alive. Output has to be taken meanwhile, beside this call,
        unless it is to be discarded.

        Raises:
            ChannelClosedError: the channel ended.
        """
        if discard_output:
            self._discarding = True
            self._inbox.clear()
        begin = seen = self._taken_bytes

        def held_up() -> bool:
            nonlocal seen
            before, seen = seen, self._taken_bytes
            slow = not self._inbox.empty or seen > before
            return slow and seen - begin < KILL_OUTPUT_MAX_BYTES

        await self._sender.kill(self._stream, round(grace_s * 1000), discard_output, held_up)

    def on_event(self, event: Event) -> None:
        """Take output, a grant, or the end."""
        if isinstance(event, Output):
            if not self._discarding:
                self._inbox.put(event)
        elif isinstance(event, Granted):
            self._input.more()
        elif isinstance(event, Exited):
            self._exited = event
            self._input.end()
            self._inbox.end()
        elif isinstance(event, Failed):
            self._input.end()
            self._inbox.end(refusal(event))

    def on_lost(self, error: EndError) -> None:
        """Fail who waits."""
        self._lost = error
        self._input.end()
        self._inbox.end(error)
