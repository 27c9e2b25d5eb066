"""Giving a name and its lease from one actor to another; and following it there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import ray

from ray_backend.launch import Launched
from ray_backend.manager import remove_actor
from ray_backend.manager_link import ManagerLink
from ray_backend.names import NAMESPACE
from ray_backend.placement.live import Placement

__all__ = ["Movable", "find_other_actor", "move", "take_over"]

SUCCESSOR_WAIT_S = 5.0
"""Seconds to wait for the actor that takes a name over from one that was removed for it."""


class Movable(Protocol):
    """What may be moved while it waits for room: an instance or a session, by its actor."""

    @property
    def name(self) -> str:
        """The actor's name."""

    @property
    def actor_id(self) -> str:
        """The actor's id, in hex."""

    def go_to(self, actor: Any, placement: Placement | None) -> None:
        """Go on with another actor, which was asked for there."""


def move(manager: ManagerLink, moved: Movable, make: Callable[[], Launched]) -> bool:
    """Replace what still waits for room, as `take_over` does, and go on with what took its place.

    Returns:
        False when there was nothing to move.
    """
    launched = take_over(manager, moved.name, moved.actor_id, make)
    if launched is None:
        return False
    moved.go_to(launched.actor, launched.placement)
    return True


def take_over(
    manager: ManagerLink,
    name: str,
    actor_id: str,
    make: Callable[[], Launched],
    *,
    has_room: bool = False,
) -> Launched | None:
    """Replace an actor that still waits for room; its name and its lease stay.

    Args:
        manager: which keeps the name free meanwhile.
        name: the actor's.
        actor_id: the actor's.
        make: makes the new one under the same name.
        has_room: replace it also when it has its room by now.

    Returns:
        The new actor; None when the old one has its room by now, was replaced by somebody else, or
        is being stopped.

    Raises:
        BaseException: what ``make`` raises; then the name is free and the lease gone.
    """
    if not manager.ask(lambda each: each.begin_move.remote(name, actor_id, has_room)):
        return None
    try:
        launched = make()
    except BaseException:
        manager.ask(lambda each: each.forget.remote(name))
        raise
    if not manager.ask(lambda each: each.end_move.remote(name)):
        remove_actor(name)
        return None
    return launched


def find_other_actor(name: str, actor_id: str) -> Any:
    """Wait for the actor that has a name after another one; None when none comes."""
    deadline = time.monotonic() + SUCCESSOR_WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            actor = ray.get_actor(name, namespace=NAMESPACE)
            if actor._actor_id.hex() != actor_id:
                return actor
        time.sleep(0.02)
    return None
