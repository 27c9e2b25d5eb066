"""Creation interrupted at every step: nothing remains, whoever has to clean up."""

from __future__ import annotations

import asyncio

import pytest

from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import OwnerLabels
from ray_backend.sandbox.engine.launch import launch
from ray_backend.sandbox.engine.sweep import sweep
from tests.docker.support import left_of, spec_of, start_python

STEPS = ("create", "created", "attached", "started")


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_failure(engine: Engine, owner: OwnerLabels, step: str, keep: bool):
    seen = []

    def at(name: str) -> None:
        seen.append(name)
        if name == step:
            raise InterruptedHereError

    with pytest.raises(InterruptedHereError):
        asyncio.run(launch(engine, spec_of(owner, keep=keep), at=at))
    assert tuple(seen) == STEPS[: STEPS.index(step) + 1]
    assert left_of(engine, owner.cluster) == []


@pytest.mark.parametrize("step", STEPS)
def test_cancelled(engine: Engine, owner: OwnerLabels, step: str):
    """Cancelled while the next step is under way, in a thread that cannot be stopped."""

    async def run() -> None:
        reached = asyncio.Event()
        launching = asyncio.ensure_future(
            launch(
                engine,
                spec_of(owner, keep=True),
                at=lambda name: reached.set() if name == step else None,
            )
        )
        await reached.wait()
        for _ in range(3):  # more than once, also while it cleans up
            launching.cancel()
            await asyncio.sleep(0)
        if step == "started":
            launched = await launching  # it was done already
            await launched.stream.close()
            engine.remove(launched.id)
            return
        with pytest.raises(asyncio.CancelledError):
            await launching

    asyncio.run(run())
    assert left_of(engine, owner.cluster) == []


@pytest.mark.parametrize("step", STEPS)
def test_killed(engine: Engine, owner: OwnerLabels, step: str):
    """SIGKILL: the sweep of the node removes what is there."""
    process = start_python(
        """
        import asyncio, os, signal, sys
        from ray_backend.sandbox.engine.connection import Engine
        from ray_backend.sandbox.engine.launch import launch
        from tests.docker.support import new_owner, spec_of

        def at(step):
            if step == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)

        spec = spec_of(new_owner(cluster=sys.argv[1]), keep=True)
        asyncio.run(launch(Engine.connect(), spec, at=at))
        """,
        owner.cluster,
        step,
    )
    _, errors = process.communicate()
    assert process.returncode == -9, errors
    assert len(left_of(engine, owner.cluster)) == (step != "create")
    sweep(engine, lambda: ["session-1"], owner.cluster, "tests")
    assert len(left_of(engine, owner.cluster)) == (step != "create")  # its lease lives
    swept = sweep(engine, list, owner.cluster, "tests")
    assert len(swept.containers) == (step != "create")
    assert left_of(engine, owner.cluster) == []
