"""The book of leases: while an instance moves, and when one was never made."""

from __future__ import annotations

from typing import Any

import pytest

from ray_backend.leases import CREATION_GRACE_S, PINNED, SANDBOX, LeaseBook


class Store(dict[str, Any]):
    def put_lease(self, actor_name: str, record: dict[str, Any]) -> None:
        self[actor_name] = record

    def get_lease(self, actor_name: str) -> dict[str, Any] | None:
        return self.get(actor_name)

    def list_leases(self) -> list[str]:
        return list(self)

    def forget_lease(self, actor_name: str) -> None:
        self.pop(actor_name, None)


class Outside:
    """A cluster with jobs, and without actors at first."""

    def __init__(self) -> None:
        self.jobs = {"1"}
        self.names: list[str] = []
        self.now = 0.0

    def live_jobs(self) -> set[str]:
        return self.jobs

    def actor_is_alive(self, actor_id: str) -> bool:
        return False

    def instance_names(self) -> list[str]:
        return self.names

    def stop(self, actor_name: str) -> None:
        raise AssertionError(actor_name)


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def book(outside: Outside) -> LeaseBook:
    found = LeaseBook(Store(), outside, clock=lambda: outside.now)
    assert found.acquire("a", PINNED, {"app": "x"})
    return found


def test_nobody_gets_the_name_before_it_is_given_back(book: LeaseBook) -> None:
    assert book.pause("a")
    assert not book.pause("a")
    assert not book.acquire("a", "job:1", {})
    assert not book.join("a", "job:1")
    assert not book.keep("a")
    assert book.resume("a")
    assert book.join("a", "job:1")
    assert book.records()["a"]["app"] == "x"


def test_one_that_is_closed_meanwhile_must_go(book: LeaseBook) -> None:
    assert book.pause("a")
    book.forget("a")
    assert not book.resume("a")
    assert not book.pause("a")


def test_one_whose_last_holder_went_meanwhile_must_go(book: LeaseBook, outside: Outside) -> None:
    assert book.acquire("b", "job:1", {})
    assert book.pause("b")
    outside.jobs.clear()
    assert book.sweep() == ["b"]
    assert not book.resume("b")


def test_a_name_whose_mover_died_comes_free(book: LeaseBook, outside: Outside) -> None:
    assert book.pause("a")
    outside.now = CREATION_GRACE_S + 1
    assert book.sweep() == []
    assert book.acquire("a", PINNED, {})


def test_one_that_is_to_be_made_again_keeps_its_lease(book: LeaseBook, outside: Outside) -> None:
    for _ in range(3):
        outside.now += CREATION_GRACE_S - 1
        assert book.keep("a")
        assert book.sweep() == []
    assert "a" in book.records()
    outside.now += CREATION_GRACE_S + 1
    book.sweep()
    assert not book.keep("a")


def test_a_session_made_again_after_it_was_lost_has_a_lease_of_its_own(
    book: LeaseBook, outside: Outside
) -> None:
    record = {"kind": SANDBOX, "app": "x", "sandbox": "s", "named": True}
    old, new = {**record, "spec_digest": "old"}, {**record, "spec_digest": "new"}

    def gone() -> bool:
        return False

    assert book.acquire_sandbox("b", PINNED, old, 1, gone) == (True, 0)
    # Two ask for it at once: neither has an actor yet, and the first lease stays.
    assert book.acquire_sandbox("b", PINNED, new, 1, gone) == (True, 0)
    assert book.records()["b"]["spec_digest"] == "old"
    outside.names = ["b"]
    book.sweep()
    assert book.acquire_sandbox("b", PINNED, new, 1) == (True, 0)
    assert book.records()["b"]["spec_digest"] == "old"
    assert book.acquire_sandbox("b", PINNED, new, 1, gone) == (True, 0)
    assert book.records()["b"] == {**new, "holders": [PINNED]}


def test_a_session_that_died_makes_room_at_once(book: LeaseBook, outside: Outside) -> None:
    record: dict[str, Any] = {"kind": SANDBOX, "app": "x", "sandbox": "s"}
    for name, named in (("s1", False), ("s2", True)):
        holder = PINNED if named else "job:1"
        assert book.acquire_sandbox(name, holder, {**record, "named": named}, 2)[0]
    assert book.sweep() == []
    assert "s1" in book.records()  # its actor has not come yet
    outside.names = ["s1", "s2"]
    assert book.sweep() == []
    outside.names = []
    assert book.pause("s1")
    assert book.sweep() == []
    assert book.resume("s1")
    assert book.sweep() == []
    assert "s1" in book.records()  # it was moved, and is about to come
    outside.names = ["s1"]
    assert book.sweep() == []
    outside.names = []
    assert book.sweep() == []
    assert set(book.records()) == {"a", "s2"}
    assert book.acquire_sandbox("s3", "job:1", {**record, "named": False}, 2) == (True, 0)
    outside.now = CREATION_GRACE_S + 1  # a named one may be made again on another node
    assert book.sweep() == []
    assert set(book.records()) == set()


def test_one_that_was_never_made_is_dropped(book: LeaseBook) -> None:
    book.abandon("a")
    assert book.records() == {}
    book.abandon("a")
    assert book.acquire("a", PINNED, {"app": "y"})
    assert book.records()["a"]["app"] == "y"


def test_one_that_somebody_else_makes_as_well_is_kept(book: LeaseBook, outside: Outside) -> None:
    assert book.acquire("a", PINNED, {})
    book.abandon("a")
    assert "a" in book.records()
    outside.now = CREATION_GRACE_S + 1  # nobody has made it after all
    book.sweep()
    assert book.records() == {}


def test_one_that_is_being_stopped_is_not_dropped_under_it(book: LeaseBook) -> None:
    book.begin_stop("a")
    book.abandon("a")
    assert not book.acquire("a", PINNED, {})


def test_a_book_that_was_read_back_does_not_know_who_else_asked(outside: Outside) -> None:
    store = Store(a={"holders": [PINNED]})
    book = LeaseBook(store, outside, clock=lambda: outside.now)
    book.abandon("a")
    assert "a" in book.records()


def test_an_instance_made_again_after_it_was_lost_has_a_lease_of_its_own(
    book: LeaseBook, outside: Outside
) -> None:
    outside.names = ["a"]
    book.sweep()
    assert book.acquire("a", PINNED, {"app": "y"}, lambda: True)
    assert book.records()["a"]["app"] == "x"
    assert book.acquire("a", PINNED, {"app": "y"}, lambda: False)
    assert book.records()["a"]["app"] == "y"
    assert book.acquire("a", PINNED, {"app": "z"}, lambda: False)  # this one has not come yet
    assert book.records()["a"]["app"] == "y"


def test_what_is_stopped_and_moved_at_once_is_stopped(book: LeaseBook) -> None:
    assert book.pause("a")
    assert book.begin_stop("a")
    assert not book.resume("a")
    assert not book.acquire("a", PINNED, {})
    book.end_stop("a")
    assert book.acquire("a", PINNED, {})


def test_a_sweep_that_fails_midway_stops_what_it_had_found(
    book: LeaseBook, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert book.acquire("b", "job:2", {})
    assert book.acquire("c", "actor:1", {})

    def fail(actor_id: str) -> bool:
        raise ConnectionError

    stopped: list[str] = []
    monkeypatch.setattr(outside, "actor_is_alive", fail)
    monkeypatch.setattr(outside, "stop", stopped.append)
    with pytest.raises(ConnectionError):
        book.sweep()
    assert stopped == ["b"]
