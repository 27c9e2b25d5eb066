"""Classes that raise everything from everywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from apothic import App, enter, exit, method
from tests.conformance.exceptions import HOWS, fail
from tests.conformance.subjects import SMALL, app


@app.cls(**SMALL)
class Raises:
    """Raises something somewhere."""

    def __init__(self, where: str = "", how: str = "") -> None:
        self.where = where
        self.how = how
        self.at("construction")

    def at(self, where: str) -> None:
        if where == self.where:
            fail(self.how)

    @enter()
    def up(self) -> None:
        self.at("enter")

    @method()
    def plain(self, how: str) -> None:
        fail(how)

    @method()
    def generator(self, how: str, after: int) -> Iterator[int]:
        yield from range(after)
        fail(how)

    @method()
    def fine(self) -> str:
        return "fine"


@app.cls(**SMALL)
class RaisesAsync:
    """Does so in coroutines; construction is never one."""

    def __init__(self, where: str = "", how: str = "") -> None:
        self.where = where
        self.how = how
        self.at("construction")

    def at(self, where: str) -> None:
        if where == self.where:
            fail(self.how)

    @enter()
    async def up(self) -> None:
        self.at("enter")

    @method()
    async def plain(self, how: str) -> None:
        fail(how)

    @method()
    def sync_plain(self, how: str) -> None:
        fail(how)

    @method()
    async def generator(self, how: str, after: int) -> AsyncIterator[int]:
        for number in range(after):
            yield number
        fail(how)

    @method()
    def sync_generator(self, how: str, after: int) -> Iterator[int]:
        yield from range(after)
        fail(how)

    @method()
    async def fine(self) -> str:
        return "fine"


def _failing_hooks(is_async: bool) -> type:
    """Make a class with an exit hook for every exception."""

    def hook(how: str) -> Any:
        def sync_hook(self: object) -> None:
            fail(how)

        async def async_hook(self: object) -> None:
            fail(how)

        return exit()(async_hook if is_async else sync_hook)

    base = RaisesAsync if is_async else Raises
    hooks = {f"down_{number}": hook(how) for number, how in enumerate(HOWS)}
    made: type = type("FailsToStop", (base.local_cls,), {"__module__": __name__, **hooks})
    return made


FAILS_TO_STOP = [
    App("conformance").cls(**SMALL, name=f"FailsToStop{is_async}")(_failing_hooks(is_async))
    for is_async in (False, True)
]
"""Classes whose exit hooks raise everything that there is, in the order of `HOWS` backwards."""
