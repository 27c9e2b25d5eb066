"""An engine for tests: classes in this process, sandboxes on this machine, no Ray and no Docker.

::

    from apothic.testing import fake_engine

    def test_counter():
        with fake_engine():
            counter = Counter.named("a")
            assert counter.add.remote(2) == 2

or, for the tests that ask for it, as a pytest fixture::

    @pytest.fixture
    def engine():
        with fake_engine() as engine:
            yield engine

What holds on Ray holds here as far as one process can: arguments, results and exceptions are pickled
both ways, each instance has threads of its own, and limits of time, retries, hooks, names and leases
work alike. What one process cannot do:

- Instances share this process: its memory (module globals), its working directory and ``os.environ``.
  Secrets and `Image.env` are set in ``os.environ`` while an instance that has them lives.
- There is one job, this process, which holds every lease; what ends with another job's end cannot be
  seen here. `FakeControlPlane.kill` stands for ``kill -9`` of an instance's process.
- Nothing is placed: constraints, ``cpu`` and ``memory_mb`` are checked and otherwise ignored. Of an
  image only its variables take effect.
- A volume is a temporary directory behind a link at its mount path; it ends with the engine.
- Sandbox sessions are as `Sandbox.local` gives them, with no isolation; see `apothic.testing.sandboxes`.
- A call that is stuck in native code keeps its thread, though its instance is replaced. For calls
  ``time.sleep`` is made interruptible while an engine is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apothic.backend import use_client
from apothic.testing.control_plane import FakeControlPlane

__all__ = ["FakeControlPlane", "fake_engine"]


@contextmanager
def fake_engine() -> Iterator[FakeControlPlane]:
    """Run everything in this process until the end of the ``with``, which closes all instances."""
    engine = FakeControlPlane()
    previous = use_client(engine)
    try:
        yield engine
    finally:
        try:
            engine.disconnect()  # first: exit hooks may still use other instances
        finally:
            use_client(previous)
