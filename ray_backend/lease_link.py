"""`LeaseLink`: how a process takes leases from the manager, and gives them up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from apothic.errors import BackendError
from ray_backend.launch import find_actor
from ray_backend.readiness import STOPPING_WAIT_S

if TYPE_CHECKING:
    from ray_backend.client import RayClient

__all__ = ["LeaseLink"]

_RETRY_STEP_S = 0.01


class LeaseLink:
    """The leases of one client, by actor name."""

    def __init__(self, client: RayClient) -> None:
        """Hold none yet."""
        self._client = client

    @contextlib.contextmanager
    def creating(
        self, name: str, label: str, attempt: Callable[[], bool], *, shared: bool
    ) -> Iterator[None]:
        """Hold a lease of what is made inside; when that fails or is interrupted, nothing is left.

        Args:
            name: the actor's.
            label: of what is leased, for the error.
            attempt: asks the manager once; False where its name is being stopped, so that it is to be
                asked again.
            shared: others may be making the same, or have it: then only a lease that has no actor,
                and that nobody else has asked for, is dropped.

        Raises:
            BackendError: when the name does not come free.
        """
        leased = False
        try:
            self._acquire(label, attempt)
            leased = True
            yield
        except BaseException:
            with contextlib.suppress(BackendError):  # what went wrong first is of more use
                if not shared:
                    self.release(name)
                elif leased and find_actor(name) is None:
                    self._client.manager.ask(lambda manager: manager.abandon.remote(name))
            raise

    def join(self, name: str) -> bool:
        """Take a lease of something that lives; False when it does not, or is being stopped."""
        self._client.note_lease()
        holder = self._client.holder
        return bool(self._client.manager.ask(lambda manager: manager.join.remote(name, holder)))

    def release(self, name: str) -> None:
        """Give up a lease, if it is held; with the connection they have all ended."""
        if self._client.is_live:  # asking Ray without one would start a cluster
            holder = self._client.holder
            self._client.manager.ask(lambda manager: manager.release.remote(name, holder))

    def _acquire(self, label: str, attempt: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STOPPING_WAIT_S
        while True:
            self._client.note_lease()
            if attempt():
                return
            if time.monotonic() > deadline:
                raise BackendError(
                    f"{label} is still being closed after {STOPPING_WAIT_S:g} s. Try again, or use "
                    f"another id."
                )
            time.sleep(_RETRY_STEP_S)
