"""Counting a session's unfinished verbs: whose they are, and that nothing is kept for it."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Hashable
from typing import Any

import pytest
from typing_extensions import override

from apothic import session_calls
from apothic.backend import CallRef, ItemStream, SandboxRef
from apothic.errors import PendingTasksExceededError
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo
from apothic.session_calls import SessionCalls
from apothic.values import CloseReport


class Ref(SandboxRef):
    """A reference to a session of nothing."""

    @property
    @override
    def handle(self) -> SandboxHandle:
        raise NotImplementedError

    @property
    @override
    def native(self) -> Any:
        raise NotImplementedError

    @override
    def call(self, verb: str, *args: Any) -> CallRef:
        raise NotImplementedError

    @override
    def stream(self, verb: str, *args: Any) -> ItemStream:
        raise NotImplementedError

    @override
    def wait_ready(self) -> None:
        raise NotImplementedError

    @override
    def inspect(self) -> SandboxSessionInfo:
        raise NotImplementedError

    @override
    def close(self) -> CloseReport:
        raise NotImplementedError

    @override
    def release(self) -> None:
        raise NotImplementedError


class Known(Ref):
    """One that is equal to others of its identity."""

    def __init__(self, identity: Hashable) -> None:
        self._identity = identity

    @property
    @override
    def identity(self) -> Hashable:
        return self._identity


def calls(ref: SandboxRef, limit: int = 1) -> SessionCalls:
    return SessionCalls(ref, label="the session", max_pending=limit)


def is_refused(some: SessionCalls) -> bool:
    try:
        some.enter()
    except PendingTasksExceededError:
        return True
    some.leave()
    return False


def test_whose_verbs_count_together() -> None:
    one, same, other = calls(Known(1)), calls(Known(1)), calls(Known(2))
    plain, alike = Ref(), Ref()
    unknown, again, another = calls(plain), calls(plain), calls(alike)
    one.enter()
    unknown.enter()
    assert [is_refused(each) for each in (one, same, other)] == [True, True, False]
    assert [is_refused(each) for each in (unknown, again, another)] == [True, True, False]
    same.leave()  # a stream may be ended by whoever has it
    assert not is_refused(one)


def test_each_object_has_the_limit_of_its_definition() -> None:
    narrow, wide = calls(Known("s"), 1), calls(Known("s"), 3)
    for _ in range(2):
        wide.enter()
    with pytest.raises(PendingTasksExceededError, match="has 2 unfinished verbs"):
        narrow.enter()
    assert not is_refused(wide)


def test_nothing_is_kept_of_a_session_that_nobody_has() -> None:
    before = len(session_calls._pending)
    ref = Ref()
    some, more = calls(ref), calls(ref)
    some.enter()
    assert len(session_calls._pending) == before + 1
    gone = weakref.ref(ref)
    gc.disable()
    try:
        del ref, some
        assert gone() is not None
        del more
        assert gone() is None
    finally:
        gc.enable()
    assert len(session_calls._pending) == before


def test_a_count_outlives_the_object_that_began_it() -> None:
    first, second = calls(Known("kept")), calls(Known("kept"))
    first.enter()
    del first
    assert is_refused(second)
    assert is_refused(calls(Known("kept")))


def test_a_fork_counts_on_its_own() -> None:
    inherited = calls(Known("forked"))
    inherited.enter()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with session_calls._pending_lock, inherited._pending._lock:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            made = calls(Known("forked"))
            inherited.leave()  # of the parent's, as a collection would
            made.enter()
            status = 0 if is_refused(inherited) else 2
        finally:
            os._exit(status)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        holder.join()
    assert is_refused(inherited)
