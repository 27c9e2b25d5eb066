"""The session itself: its state, its end, and for those that can be shared, its name and handle."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from apothic import Sandbox, SandboxHandle, SandboxSession
from apothic.errors import (
    ArgumentError,
    HandleError,
    InvalidOptionError,
    PendingTasksExceededError,
    SandboxClosedError,
    SandboxFileError,
    SandboxLimitError,
    SandboxSessionNotFoundError,
)
from apothic.session_calls import PART_BYTES, PARTS_IN_FLIGHT
from tests.conformance.sandboxes.base import SandboxSuite
from tests.support import eventually


class SessionConformance(SandboxSuite):
    def test_properties(self, sandbox: Sandbox, session: SandboxSession) -> None:
        assert session.sandbox is sandbox
        assert session.closed is False
        assert session.id
        assert session.id == session.handle.sandbox_id
        assert json.loads(session.handle_json)["sandbox"] == sandbox.name
        assert session.method_names == sandbox.method_names
        assert all(callable(getattr(session, name)) for name in session.method_names)
        assert session.has_method("exec")
        assert not session.has_method("id")
        assert session.id in repr(session)

    def test_inspecting(self, session: SandboxSession) -> None:
        info = session.inspect()
        assert (info.sandbox_id, info.state, info.local) == (session.id, "ready", session.local)
        assert info.cwd == session.pwd()
        with session.exec_stream("sleep 100"):
            eventually(lambda: session.inspect().running_calls == 1)
        eventually(lambda: session.inspect().running_calls == 0)

    def test_first_directory_and_variables(self, sandbox: Sandbox) -> None:
        with self.open(sandbox) as first:
            base = first.mkdir("below")
            with self.open(sandbox, cwd=f"{base}/made/here", env={"N": 1, "S": "a b"}) as session:
                assert session.pwd() == f"{base}/made/here"
                assert session.listdir() == []
                assert session.exec('echo "$N $S"', shell=True).stdout == "1 a b\n"

    def test_a_first_directory_that_cannot_be(self, sandbox: Sandbox) -> None:
        for bad in ("", "a\0", None, 5):
            with pytest.raises(InvalidOptionError, match="cwd"):
                self.open(sandbox, cwd=bad)
        for bad_env in ({"1A": ""}, {"A": "\0"}, ["A"], {"A": b"x"}):
            with pytest.raises(InvalidOptionError):
                self.open(sandbox, env=bad_env)
        with pytest.raises(SandboxFileError):
            self.open(sandbox, cwd="/dev/null/below")

    def test_variables(self, session: SandboxSession) -> None:
        before = session.get_env()
        assert "PATH" in before
        after = session.update_env({"A": 1, "B": 2.5, "C": None}, D="d")
        assert after == {**before, "A": "1", "B": "2.5", "D": "d"} == session.get_env()
        assert session.set_env(A="new\nline")["A"] == "new\nline"
        assert "D" not in session.unset_env("D", "ABSENT")
        assert "PATH" not in session.update_env({"PATH": None})
        assert session.exec("/bin/sh -c 'echo ${D-none}'").stdout == "none\n"
        shown = session.exec(["/usr/bin/env"]).stdout
        assert "A=new\nline\n" in shown
        assert not [line for line in shown.splitlines() if line.startswith("PATH=")]
        for bad in ({"A B": "x"}, {"": "x"}, {"A": "\0"}):
            with pytest.raises(InvalidOptionError):
                session.update_env(bad)
        assert session.update_env() == session.get_env()

    def test_an_execs_variables_are_what_get_env_gives(self, session: SandboxSession) -> None:
        session.set_env(ONE="1")
        shown = session.exec(["env", "-0"]).stdout.split("\0")[:-1]
        assert dict(pair.split("=", 1) for pair in shown) == session.get_env()

    def test_close(self, sandbox: Sandbox) -> None:
        session = self.open(sandbox)
        assert session.close().closed is True
        assert session.closed is True
        assert session.close().closed is False
        calls: list[Callable[[], object]] = [
            session.pwd, session.get_env, session.listdir, session.exists, session.inspect,
            lambda: session.exec("true"), lambda: session.exec_stream("true"),
            lambda: session.write_text("x", ""), lambda: session.read_bytes("x"),
            lambda: session.write_bytes("x", b"x" * 10_000_000), lambda: session.chdir("/"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(SandboxClosedError, match="closed"):
                call()
        assert "closed" in repr(session)

    def test_close_during_an_upload(self, sandbox: Sandbox) -> None:
        session = self.open(sandbox)
        sizes = [PART_BYTES] * (PARTS_IN_FLIGHT + 2)

        def parts() -> Iterator[bytes]:
            for number, size in enumerate(sizes):
                if number == PARTS_IN_FLIGHT + 1:  # of which one at least has arrived
                    assert session.close().closed
                yield bytes(size)

        with pytest.raises(SandboxClosedError, match="closed"):
            session._upload(b"file", parts(), sum(sizes), False)

    def test_with_closes(self, sandbox: Sandbox) -> None:
        with self.open(sandbox) as session:
            assert session.exec("true").ok
        assert session.closed

        async def work() -> None:
            async with self.open(sandbox) as inner:
                assert (await inner.aio.exec("true")).ok
            assert inner.closed

        asyncio.run(work())

    def test_sessions_are_apart(self, sandbox: Sandbox) -> None:
        with self.open(sandbox) as one, self.open(sandbox) as two:
            assert one.id != two.id
            one.set_env(ONLY="one")
            assert "ONLY" not in two.get_env()
            one.chdir(one.mkdir("one"))
            assert two.pwd() != one.pwd()


class SharedSessionConformance(SandboxSuite):
    """What only sessions on a cluster have: names, handles, a cap."""

    def test_attaching(self, sandbox: Sandbox, session: SandboxSession) -> None:
        for handle in (session.handle, session.handle_json, session.handle.model_dump()):
            other = sandbox.attach(handle)
            assert other.id == session.id
            other.chdir(other.mkdir(f"{session.pwd()}/deeper"))
            other.set_env(SHARED="yes")
            assert session.pwd() == other.pwd()
            assert session.get_env()["SHARED"] == "yes"
            session.chdir("..")

    def test_a_session_travels_as_its_handle(
        self, sandbox: Sandbox, session: SandboxSession
    ) -> None:
        session.write_text("file", "text")
        other = pickle.loads(pickle.dumps(session))
        assert other.read_text("file") == "text"
        assert other.sandbox.name == sandbox.name

    def test_bad_handles(self, define: Callable[..., Sandbox], session: SandboxSession) -> None:
        sandbox = session.sandbox
        for bad in ("", "{}", {"app": "x"}, 5, None, b"x"):
            with pytest.raises(HandleError):
                sandbox.attach(bad)
        with pytest.raises(HandleError, match="not of"):
            define().attach(session.handle)
        foreign = session.handle.model_copy(update={"cluster_id": "another"})
        with pytest.raises(HandleError, match="another"):
            sandbox.attach(foreign)
        absent = session.handle.model_copy(update={"sandbox_id": "absent"})
        with pytest.raises(SandboxSessionNotFoundError):
            sandbox.attach(absent)

    def test_closed_from_elsewhere(self, sandbox: Sandbox) -> None:
        session = self.open(sandbox)
        assert sandbox.close_handle(session.handle).closed is True
        assert sandbox.close_handle(session.handle).closed is False
        with pytest.raises(SandboxClosedError):
            session.exec("true")
        with pytest.raises(SandboxSessionNotFoundError):
            sandbox.attach(session.handle)

    def test_named(self, sandbox: Sandbox) -> None:
        one = sandbox.named("a b/ü", cwd="/tmp", env={"A": 1})
        try:
            two = sandbox.named("a b/ü", cwd="/elsewhere", env={"A": 2})
            assert one.handle == two.handle
            assert one.handle.named
            assert two.get_env()["A"] == "1"
            two.chdir("/")
            assert one.pwd() == "/"
            with pytest.raises(ArgumentError):
                sandbox.close_named("a b/ü", cwd="/other")
            assert one.pwd() == "/"
        finally:
            assert sandbox.close_named("a b/ü", cwd="/tmp", env={"A": 1}).closed is True
        assert sandbox.close_named("a b/ü").closed is False
        for bad in ("", " a", "x" * 200, None, "a\n"):
            with pytest.raises(InvalidOptionError):
                sandbox.named(bad)

    def test_named_is_free_of_races(self, sandbox: Sandbox) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: sandbox.named("same"), range(8)))
        try:
            found[0].set_env(MARK="1")
            assert all(session.get_env()["MARK"] == "1" for session in found)
        finally:
            sandbox.close_named("same")

    def test_all_objects_of_a_session_share_its_limit_of_pending_verbs(
        self, define: Callable[..., Sandbox]
    ) -> None:
        sandbox = define(max_pending_tasks=2)
        first = sandbox.named("shared")
        try:
            with ThreadPoolExecutor(1) as pool:
                objects = [
                    first,
                    sandbox.named("shared"),
                    sandbox.attach(first.handle),
                    pickle.loads(pickle.dumps(first)),
                    pool.submit(sandbox.named, "shared").result(),
                    asyncio.run(sandbox.aio.attach(first.handle_json)),
                ]
            for one, two in zip(objects, objects[1:] + objects[:1], strict=True):
                with one.exec_stream("sleep 100"), two.exec_stream("sleep 100"):
                    for each in objects:
                        with pytest.raises(PendingTasksExceededError, match="max_pending_tasks=2"):
                            each.pwd()
                assert all(each.pwd() for each in objects)
            del one, two, each
            with first.exec_stream("sleep 100"), first.exec_stream("sleep 100"):
                objects.clear()  # the others' end, and a new one, change nothing
                with pytest.raises(PendingTasksExceededError):
                    sandbox.named("shared").pwd()
        finally:
            sandbox.close_named("shared")

    def test_a_later_session_of_the_name_has_its_own_limit_of_pending_verbs(
        self, define: Callable[..., Sandbox]
    ) -> None:
        sandbox = define(max_pending_tasks=1)
        first = sandbox.named("again")
        with first.exec_stream("sleep 100"):
            with pytest.raises(PendingTasksExceededError):
                first.pwd()
            assert sandbox.close_named("again").closed
            later = sandbox.named("again")
            try:
                assert later.pwd()
                with later.exec_stream("sleep 100"), pytest.raises(PendingTasksExceededError):
                    sandbox.attach(later.handle).pwd()
            finally:
                later.close()

    def test_cap_on_live_sessions(self, define: Callable[..., Sandbox]) -> None:
        sandbox = define(max_containers=2, tasks_per_container=1)
        with (
            sandbox.create(),
            sandbox.create(),
            pytest.raises(SandboxLimitError, match="max_containers"),
        ):
            sandbox.create()
        with sandbox.create() as again:
            assert again.exec("true").ok

    def test_handle_values(self, session: SandboxSession) -> None:
        handle = SandboxHandle.parse(session.handle_json)
        assert handle == session.handle
        assert handle.spec_digest == session.sandbox.spec.digest
        assert "env" not in session.handle_json
