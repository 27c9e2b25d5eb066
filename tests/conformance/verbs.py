"""The verbs that give instances, and what is known of them."""

from __future__ import annotations

import asyncio
import pickle
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apothic import (
    App,
    ClassInstance,
    Cls,
)
from apothic.errors import (
    AppNotFoundError,
    ArgumentError,
    ClassNotFoundError,
    ConflictError,
    HandleError,
    InstanceNotFoundError,
    InvalidOptionError,
    MethodNotFoundError,
    UsageError,
)
from tests.conformance.subjects import (
    HOOKED_LIFE,
    SMALL,
    AsyncBox,
    Box,
    Conformance,
    Hasty,
    Hooked,
    Plain,
    Pool,
    lines,
)
from tests.support import eventually


class Verbs(Conformance):
    """The verbs that give instances, and what is known of them."""

    # -- bind, remote --------------------------------------------------------------------------

    def test_bind_starts_at_first_use(self, log: Path) -> None:
        box = Box.bind(1, str(log))
        assert lines(log) == []
        with box:
            assert box.add.remote(2) == 3
            assert lines(log) == ["init", "enter"]

    def test_equal_arguments_are_one_bound_instance(self, log: Path) -> None:
        with Box.bind(0, str(log)) as one, Box.bind(log=str(log)) as same:
            assert one.add.remote(5) == 5
            assert same.add.remote(1) == 6
            assert one.id == same.id
            with Box.bind(1, str(log)) as other:
                assert other.id != one.id
                assert other.add.remote() == 2

    def test_remote_returns_when_enter_has_finished(self, log: Path) -> None:
        with Box.remote(log=str(log)) as box:
            assert lines(log) == ["init", "enter"]
            assert box.add.remote() == 1

    def test_closed_elsewhere_a_bound_instance_starts_again(self, log: Path) -> None:
        with Box.bind(log=str(log)) as box:
            assert box.add.remote() == 1
            assert Box.close_handle(box.handle).closed
            assert box.add.remote() == 1
        assert lines(log) == ["init", "enter", "exit"] * 2

    def test_pool_grows_with_calls_in_flight(self, tmp_path: Path, log: Path) -> None:
        gate = tmp_path / "gate"
        with Pool.bind(0, str(log)) as pool:
            jobs = [pool.hold.spawn(str(gate)) for _ in range(2)]
            eventually(lambda: lines(log).count("hold") == 2)
            gate.touch()
            assert len({job.get() for job in jobs}) == 2
            assert lines(log).count("init") == 2
        assert lines(log).count("exit") == 2

    # -- new, named ----------------------------------------------------------------------------

    def test_new_is_fresh_every_time(self) -> None:
        with Box.new(1) as one, Box.new(1) as two:
            assert one.add.remote() == 2
            assert two.add.remote() == 2
            assert one.id != two.id

    def test_named_is_the_same_for_all(self, name: str) -> None:
        one = Box.named(name, 3)
        two = Box.named(name)
        assert one.id == two.id == name
        assert one.add.remote() == 4
        assert two.add.remote() == 5
        assert Box.named(name, value=3).add.remote() == 6
        assert one.handle.named
        assert one.close().closed
        with Box.named(name, 3) as again:
            assert again.add.remote() == 4

    def test_named_refuses_other_arguments(self, name: str) -> None:
        with Box.named(name, 3) as box:
            with pytest.raises(ConflictError, match="other constructor arguments"):
                Box.named(name, 4)
            with pytest.raises(InvalidOptionError, match="instance id"):
                Box.named(" ")
            assert box.add.remote() == 4

    def test_named_constructs_once_under_a_race(self, name: str, log: Path) -> None:
        with ThreadPoolExecutor(8) as threads:
            boxes = list(threads.map(lambda _: Box.named(name, 0, str(log)), range(16)))
            assert len({box.who.remote() for box in boxes}) == 1
        assert lines(log).count("init") == 1
        boxes[0].close()

    def test_close_named(self, name: str, log: Path) -> None:
        Box.named(name, 1, str(log))
        with pytest.raises(ArgumentError, match="other arguments"):
            Box.close_named(name, 2)
        assert lines(log) == ["init", "enter"]
        report = Box.close_named(name, 1, str(log))
        assert report.closed
        assert [hook.name for hook in report.hooks] == ["down"]
        assert not Box.close_named(name).closed
        assert lines(log) == ["init", "enter", "exit"]

    # -- partial, local ------------------------------------------------------------------------

    def test_partial(self, log: Path, name: str) -> None:
        bound = Box.partial(5).partial(log=str(log))
        assert bound.init_args == (5,)
        assert bound.init_kwargs == {"log": str(log)}
        with bound.new() as box, bound.named(name) as named, bound.remote() as shared:
            assert box.add.remote() == named.add.remote() == shared.add.remote() == 6
        assert not bound.close_named(name).closed
        with Box.partial(log=str(log)).new(7, log=None) as later:
            assert later.add.remote() == 8
        with pytest.raises(ArgumentError, match="signature"):
            Box.partial(1, 2, 3)

    def test_local(self, log: Path) -> None:
        with Hooked.local(str(log)) as box:
            assert box.ping() == box.ping.remote() == "child of base"
            assert box.obj.log == box.log == str(log)
        assert lines(log) == HOOKED_LIFE
        assert not box.close().closed
        with AsyncBox.local() as async_box:
            assert async_box.double.remote(2) == 4
            assert list(async_box.count.remote_gen(3)) == [0, 1, 2]
            assert asyncio.run(async_box.double(3)) == 6

    # -- handles -------------------------------------------------------------------------------

    def test_attach_takes_every_form_of_a_handle(self) -> None:
        with Box.new(1) as box:
            handle = box.handle
            for form in (handle, handle.model_dump(), box.handle_json, handle.model_dump_json()):
                assert Box.attach(form).add.remote(0) == 1
                assert Cls.from_handle(form).add.remote(0) == 1
            assert pickle.loads(pickle.dumps(handle)) == handle

    def test_instances_travel_as_arguments_and_results(self) -> None:
        with Box.new(1) as one, Box.new(10) as two:
            assert one.call_other.remote(two, 1) == 11
            assert one.call_other.remote(two.handle, 1) == 12
            assert one.call_other.remote(two.handle_json, 1) == 13
            assert two.add.remote(0) == 13
            with one.make.remote(4) as made:
                assert made.add.remote() == 5
            assert pickle.loads(pickle.dumps(two)).add.remote(0) == 13

    def test_what_is_gone_comes_out_of_a_pickle_and_says_so_at_first_use(self) -> None:
        with Box.new(1) as box:
            data = pickle.dumps({"box": box, "rest": [1]})
            handle = box.handle
            assert not pickle.loads(data)["box"].closed
        back = pickle.loads(data)["box"]
        assert isinstance(back, ClassInstance)
        assert back.handle == handle
        assert back.id == handle.instance_id
        assert not back.closed
        assert handle.instance_id in repr(back)
        assert "inspect" in dir(back)
        assert pickle.loads(pickle.dumps(back)).handle == handle
        assert not back.close().closed
        for use in (lambda: back.add, back.inspect, back.__enter__):
            with pytest.raises(InstanceNotFoundError, match="was closed"):
                use()

    def test_functions_of_an_instance_say_what_their_class_says(self) -> None:
        with Box.new() as box:
            for function in (box.add, Box.methods["add"], Box.local().add):
                assert function.options == Box.options.model_dump(mode="json")
            box.add.options["cpu"] = 7
            assert box.who.options["cpu"] == Box.options.cpu

    def test_handles_of_what_is_gone_or_foreign(self) -> None:
        with Box.new() as box:
            handle = box.handle
            with pytest.raises(HandleError, match=r"conformance\.Box"):
                Plain.attach(handle)
            foreign = handle.model_copy(update={"cluster_id": "elsewhere"})
            for reach in (Box.attach, Box.close_handle, Cls.from_handle):
                with pytest.raises(HandleError, match="'elsewhere'"):
                    reach(foreign)
        with pytest.raises(InstanceNotFoundError, match="does not live"):
            Box.attach(handle)
        assert not Box.close_handle(handle).closed

    def test_close_function(self, log: Path) -> None:
        box = Box.new(0, str(log))
        close = Box.close_function
        assert close is not None
        assert close.remote(box.handle_json).closed
        assert lines(log)[-1] == "exit"
        assert Plain.close_function is None

    # -- deployed apps -------------------------------------------------------------------------

    def test_look_up_by_name(self, name: str) -> None:
        deployed = App(f"deployed-{uuid.uuid4().hex}")
        box_cls = deployed.cls(**SMALL)(Box.local_cls)
        deployment_id = deployed.deploy()
        assert deployed.deploy() == deployment_id == deployed.deployment_id
        found = Cls.from_name(deployed.name, "Box")
        assert found.remote_only
        assert found.parameter_names == ("value", "log")
        assert str(found.signature) == str(Box.signature).replace("'", "")
        assert found.method_info("add").kind == "sync"
        assert found.method_info("add").doc == "Add up."
        assert found.__doc__ == "A box of numbers."
        remote_app = App.lookup(deployed.name)
        assert remote_app.deployment_id == deployment_id
        assert remote_app.Box.name == "Box"
        with box_cls.named(name, 1) as mine:
            assert found.named(name).add.remote() == 2
            assert found.attach(mine.handle_json).add.remote() == 3
            assert name in found.inspect().instances
        with found.bind(7) as theirs, box_cls.bind(7) as ours:
            assert theirs.add.remote() == 8
            assert ours.add.remote() == 9
        with pytest.raises(UsageError, match="looked up"):
            found.local()
        with pytest.raises(ClassNotFoundError, match="it has Box"):
            Cls.from_name(deployed.name, "Bix")
        with pytest.raises(AppNotFoundError, match=r"no app 'nowhere-"):
            App.lookup(f"nowhere-{name}")

    def test_redeploying_can_close_what_is_outdated(self, name: str, log: Path) -> None:
        app_name = f"deployed-{uuid.uuid4().hex}"
        old = App(app_name)
        old_cls = old.cls(**SMALL, name="It")(Box.local_cls)
        old.deploy()
        old_cls.named(name, 0, str(log))
        new = App(app_name)
        new.cls(**SMALL, name="It")(Hasty.local_cls)
        new.deploy()
        assert lines(log)[-1] == "enter"
        new.deploy(close_outdated=True)
        eventually(lambda: lines(log)[-1] == "exit")
        assert not old_cls.close_named(name).closed

    def test_a_method_that_a_running_version_lacks(self, name: str) -> None:
        app_name = f"versions-{uuid.uuid4().hex}"
        old = App(app_name).cls(**SMALL, name="It")(Plain.local_cls).named(name)
        new_cls = App(app_name).cls(**SMALL, name="It")(Box.local_cls)
        new = new_cls.named(name)
        uses: list[Callable[[], object]] = [
            new.add.remote,
            new.add.spawn,
            lambda: new.add.map([1]),
            lambda: asyncio.run(new.add.aio.remote()),
            lambda: new.count.remote_gen(1),
        ]
        for use in uses:
            with pytest.raises(
                MethodNotFoundError, match=r"runs version \w+ .*close_outdated=True"
            ):
                use()
        assert old.one.remote() == 1
        assert new.close().closed
        with new_cls.named(name) as newer:
            assert newer.add.remote() == 1

    # -- looking -------------------------------------------------------------------------------

    def test_inspect(self, tmp_path: Path, name: str) -> None:
        gate = tmp_path / "gate"
        with Box.named(name) as box:
            box.add.remote()
            job = box.hold.spawn(str(gate))
            eventually(lambda: box.inspect().running_calls == 1)
            info = box.inspect()
            assert (info.app, info.cls, info.instance_id) == ("conformance", "Box", name)
            assert info.named
            assert info.state == "ready"
            assert info.finished_calls == 1
            assert info.restarts == 0
            assert info.tags == ("t",)
            assert info.metadata == {"m": 1}
            assert info.started_unix_s is not None
            gate.touch()
            job.get()
