"""Named instances whose nodes are gone are made again on others that qualify.

Ray restarts an actor by itself, with the demand that it was made with: on any node of its offer or
with its GPU, or on those that were named. When none of them lives any more, an actor that asked for an
offer waits for ever, and one that named its nodes is dead. The manager then makes it again: same name,
same lease, same constructor arguments, wherever there is room that qualifies, also on nodes that joined
later. The actor is another one, so that who holds its handle is told `InstanceLostError` once.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable

from apothic.errors import NoMatchingOfferError
from ray_backend import ray_api
from ray_backend.launch import relaunch
from ray_backend.leases import LeaseBook
from ray_backend.names import NAMESPACE
from ray_backend.placement.catalogue import Catalogue
from ray_backend.placement.live import ClusterView
from ray_backend.placement.seats import may_be_starting
from ray_backend.registry import Registry

__all__ = ["Reviver"]

REVIVE_AFTER_S = 2.0
"""Seconds that a restart queues before it is moved to where there is room."""

SETUP_WAIT_S = 30.0
"""The same, where its node may have given it room already and is preparing its process."""


class Reviver:
    """Looks after the named instances that wait for a node."""

    def __init__(
        self,
        registry: Registry,
        book: LeaseBook,
        begin_move: Callable[[str, str], bool],
        end_move: Callable[[str], bool],
        remove: Callable[[str], None],
    ) -> None:
        """Take the manager's ways to free a name and to give it back."""
        self._registry = registry
        self._book = book
        self._begin_move = begin_move
        self._end_move = end_move
        self._remove = remove
        self._catalogue = Catalogue(registry)
        self._since: dict[str, float] = {}

    def sweep(self, alive: Iterable[str]) -> None:
        """Look once; ``alive`` names the instance actors that exist. Costs two requests as a rule."""
        names = self._registry.list_revivals()
        if not names:
            self._since.clear()
            return
        waiting = {
            seat.name: seat
            for seat in ray_api.actor_seats("RESTARTING")
            if seat.namespace == NAMESPACE and seat.waits
        }
        known = set(alive)
        lost = [name for name in names if name not in known]
        self._since = {name: at for name, at in self._since.items() if name in waiting}
        for name in names:
            seat = waiting.get(name)
            if seat is not None:
                since = self._since.setdefault(name, time.monotonic())
                self._try(self._move, name, seat, time.monotonic() - since)
        if lost:
            dead = self._dead(lost)
            for name, seat in dead.items():
                if self._book.keep(name):
                    self._try(self._remake, name, seat)

    @staticmethod
    def _dead(names: list[str]) -> dict[str, ray_api.ActorSeat]:
        """Find the instances whose last actor died because the nodes that it named are gone."""
        last: dict[str, ray_api.ActorSeat] = {}
        for seat in sorted(ray_api.actor_seats("DEAD"), key=lambda each: each.end_unix_ms):
            if seat.namespace == NAMESPACE and seat.name in names:
                last[seat.name] = seat
        return {name: seat for name, seat in last.items() if seat.unschedulable}

    def _try(self, act: Callable[..., None], name: str, *args: object) -> None:
        try:
            act(name, *args)
        except NoMatchingOfferError:
            pass  # until a node joins
        except Exception:
            print(f"apothic manager: {name} was not made again", file=sys.stderr)
            traceback.print_exc()

    def _view(self) -> ClusterView:
        return ClusterView(ray_api.live_nodes(), ray_api.free_resources(), self._catalogue.offers())

    def _move(self, name: str, seat: ray_api.ActorSeat, queued_s: float) -> None:
        record = self._registry.get_revival(name)
        if record is None or queued_s < REVIVE_AFTER_S:
            return
        view = self._view()
        placement, make = relaunch(self._registry, record, view, seat.runtime_env)
        demand = placement.choice.demand
        same = demand.resources.items() <= seat.resources.items() and dict(
            demand.label_selector
        ) == dict(seat.label_selector)
        if not placement.plan.has_room or same:
            return
        if queued_s < SETUP_WAIT_S and may_be_starting(seat, view, ray_api.actor_seats()):
            return
        if self._begin_move(name, seat.actor_id):
            self._finish(name, make)

    def _remake(self, name: str, seat: ray_api.ActorSeat) -> None:
        record = self._registry.get_revival(name)
        if record is None:
            return
        _, make = relaunch(self._registry, record, self._view(), seat.runtime_env)
        if self._book.pause(name):
            self._finish(name, make)

    def _finish(self, name: str, make: Callable[[], None]) -> None:
        try:
            make()
        finally:
            if not self._end_move(name):
                self._remove(name)
