"""What an engine's users are refused: each message holds value, rule and remedy, nothing is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from apothic import App, ClassInstance, ClassInstanceHandle, Cls, Secret, Volume
from apothic.backend import ControlPlaneClient, connect
from apothic.errors import (
    ApothicError,
    AppNotFoundError,
    ArgumentError,
    ClassNotFoundError,
    ConflictError,
    HandleError,
    InstanceClosedError,
    InstanceNotFoundError,
    InvalidOptionError,
    MethodNotFoundError,
    SecretNotFoundError,
    SerializationError,
    UsageError,
    VolumeNotFoundError,
)
from tests.conformance.exceptions import Trap
from tests.conformance.subjects import SMALL, Box, Conformance, Plain


@dataclass
class World:
    """A named box that lives, and the handle of one that does not."""

    box: ClassInstance
    closed: ClassInstance
    gone: ClassInstanceHandle

    def handle(self, **changes: Any) -> str:
        """Give the box's handle as JSON, altered; None leaves a field out."""
        fields = {**self.box.handle.model_dump(), **changes}
        return json.dumps({key: value for key, value in fields.items() if value is not None})


OTHER_BOX = App("other").cls(**SMALL)(Box.local_cls)

NAMED = "'refusals'"

IDS = ["", " ", "a ", "\n", "a\0b", "x" * 129, None, 5, b"a"]

Row = tuple[str, Callable[[World], object], type[ApothicError], tuple[str, ...]]

ROWS: list[Row] = [
    # -- names and constructor arguments
    *(
        (
            f"{verb.__name__} {name!r:.20}",
            lambda world, verb=verb, name=name: verb(name),
            InvalidOptionError,
            (f"instance id {name!r}", "1 to 128 characters", "Shorten or hash"),
        )
        for name in IDS
        for verb in (Box.named, Box.close_named)
    ),
    *(
        (
            f"{verb} {args} {kwargs}",
            lambda world, verb=verb, args=args, kwargs=kwargs: getattr(Box, verb)(*args, **kwargs),
            ArgumentError,
            ("Box", f": {reason}", "Its signature is", "pass arguments that fit"),
        )
        for verb in ("bind", "remote", "new", "local", "partial")
        for args, kwargs, reason in (
            ((1, None, 3), {}, "too many positional arguments"),
            ((), {"vallue": 1}, "got an unexpected keyword argument 'vallue'"),
            ((1,), {"value": 1}, "multiple values for argument 'value'"),
        )
    ),
    (
        "named, arguments that do not fit",
        lambda world: Box.named(world.box.id, vallue=1),
        ArgumentError,
        ("'vallue'", "Its signature is", "pass arguments that fit"),
    ),
    (
        "named, other arguments",
        lambda world: Box.named(world.box.id, 4),
        ConflictError,
        (NAMED, "other constructor arguments", "use another id"),
    ),
    (
        "close_named, other arguments",
        lambda world: Box.close_named(world.box.id, 4),
        ArgumentError,
        (NAMED, "other arguments than those given", "Leave the arguments out"),
    ),
    (
        "new, an argument that cannot be pickled",
        lambda world: Box.new(c for c in ""),
        SerializationError,
        ("generator", "cannot travel", "enter hook"),
    ),
    # -- looking up
    (
        "from_name, no such app",
        lambda world: Cls.from_name("nowhere", "Box"),
        AppNotFoundError,
        ("'nowhere'", "deployed are", "Deploy it"),
    ),
    (
        "lookup, no such app",
        lambda world: App.lookup("nowhere"),
        AppNotFoundError,
        ("'nowhere'", "deployed are", "Deploy it"),
    ),
    (
        "a class that the app has not",
        lambda world: App("refusals").get_class("Bax"),
        ClassNotFoundError,
        ("'Bax'", "has no class", "Check the spelling"),
    ),
    (
        "a secret that is not there",
        lambda world: Secret("NOWHERE").delete(),
        SecretNotFoundError,
        ("'NOWHERE'", "not stored", "Secret.list()"),
    ),
    (
        "a volume that is not there",
        lambda world: Volume("nowhere").delete(),
        VolumeNotFoundError,
        ("'nowhere'", "does not exist", "Volume.list()"),
    ),
    # -- verbs in the wrong place
    (
        "calling the class",
        lambda world: Box(1),
        UsageError,
        ("Box(…)", "does not say where", "Box.bind(…)"),
    ),
    (
        "calling a method of the class",
        lambda world: Box.add.remote(1),
        UsageError,
        ("Box.add", "Box.bind"),
    ),
    (
        "calling a generator as a method",
        lambda world: world.box.count.remote(1),
        UsageError,
        ("Box.count", "yields its items", "remote_gen"),
    ),
    (
        "iterating over a method",
        lambda world: world.box.add.remote_gen(1),
        UsageError,
        ("add", ".remote"),
    ),
    (
        "a method that there is not",
        lambda world: world.box.ad,
        MethodNotFoundError,
        ("'ad'", "has no remote method", "add"),
    ),
    (
        "a property",
        lambda world: world.box.double,
        MethodNotFoundError,
        ("double", "property", "method"),
    ),
    (
        "an unmarked method",
        lambda world: world.box.helper,
        MethodNotFoundError,
        ("helper", "function of the class", "@method()"),
    ),
    # -- calls
    *(
        (
            f"{verb} {args} {kwargs}",
            lambda world, verb=verb, args=args, kwargs=kwargs: getattr(world.box.add, verb)(
                *args, **kwargs
            ),
            ArgumentError,
            (f"Box.add: {reason}", "Its signature is", "pass arguments that fit"),
        )
        for verb in ("remote", "spawn")
        for args, kwargs, reason in (
            ((1, 2), {}, "too many positional arguments"),
            ((), {"n": 1}, ""),  # positional-only
            ((), {"often": 2}, "got an unexpected keyword argument 'often'"),
        )
    ),
    (
        "starmap, arguments that do not fit",
        lambda world: world.box.add.starmap([(1, 2)]),
        ArgumentError,
        ("Box.add: too many", "Its signature is", "pass arguments that fit"),
    ),
    *(
        (
            f"timeout_s={value!r}",
            lambda world, value=value: world.box.add.remote(1, timeout_s=value),
            InvalidOptionError,
            (f"timeout_s={value!r}", "number of seconds above 0", "Give seconds"),
        )
        for value in (0, -1, float("nan"), "1", True)
    ),
    # -- handles
    *(
        (
            f"attach {field}={value!r}",
            lambda world, field=field, value=value: Box.attach(world.handle(**{field: value})),
            HandleError,
            (f"malformed: {field}: ", "unaltered"),
        )
        for field, value in (
            ("app", 1), ("cls", []), ("instance_id", {}), ("cluster_id", None), ("named", "maybe"),
            ("spec_digest", None), ("schema_version", 2), ("address", "10.0.0.1"),
        )
    ),
    *(
        (
            f"{verb}, a handle of another {what}",
            lambda world, verb=verb, change=change: getattr(Box, verb)(world.handle(**change)),
            HandleError,
            parts,
        )
        for verb in ("attach", "close_handle")
        for what, change, parts in (
            ("class", {"cls": "Plain"}, ("conformance.Plain", "not of conformance.Box", "Use")),
            ("app", {"app": "other"}, ("other.Box", "not of conformance.Box", "Use")),
            ("cluster", {"cluster_id": "elsewhere"}, ("'elsewhere'", "connected to", "base_url")),
        )
    ),
    (
        "attach by another class",
        lambda world: Plain.attach(world.box.handle),
        HandleError,
        ("conformance.Box", "not of conformance.Plain", "Cls.from_handle"),
    ),
    (
        "attach by a class of another app",
        lambda world: OTHER_BOX.attach(world.box.handle),
        HandleError,
        ("conformance.Box", "not of other.Box", "Cls.from_handle"),
    ),
    (
        "from_handle, another cluster",
        lambda world: Cls.from_handle(world.handle(cluster_id="elsewhere")),
        HandleError,
        ("'elsewhere'", "connected to", "base_url"),
    ),
    (
        "from_handle, a version that nobody knows",
        lambda world: Cls.from_handle(world.handle(spec_digest="0" * 64)),
        InstanceNotFoundError,
        (NAMED, "not known", "Start another"),
    ),
    (
        "attach, another id",
        lambda world: Box.attach(world.handle(instance_id="nobody")),
        InstanceNotFoundError,
        ("'nobody'", "does not live", "Start another"),
    ),
    *(
        (
            f"{what} of a closed instance",
            lambda world, reach=reach: reach(world.gone),
            InstanceNotFoundError,
            ("conformance.Box", "does not live", "Start another"),
        )
        for what, reach in (("attach", Box.attach), ("from_handle", Cls.from_handle))
    ),
    *(
        (
            f"{what} of a closed instance",
            lambda world, use=use: use(world.closed),
            InstanceClosedError,
            ("conformance.Box", "closed", "Make or name a new instance"),
        )
        for what, use in (
            ("remote", lambda box: box.add.remote()),
            ("spawn", lambda box: box.add.spawn()),
            ("map", lambda box: box.add.map([1])),
            ("remote_gen", lambda box: box.count.remote_gen(1)),
            ("inspect", lambda box: box.inspect()),
            ("handle", lambda box: box.handle),
            ("with", lambda box: box.__enter__()),
        )
    ),
    # -- arguments that cannot travel
    (
        "an argument that cannot be pickled",
        lambda world: world.box.echo.remote(1, (c for c in "")),
        SerializationError,
        ("argument #2", "generator", "cannot travel"),
    ),
    (
        "a keyword argument that cannot be pickled",
        lambda world: world.box.echo.spawn(a=(c for c in "")),
        SerializationError,
        ("argument a", "generator", "cannot travel"),
    ),
    (
        "an argument that cannot be unpickled",
        lambda world: world.box.echo.remote(Trap()),
        SerializationError,
        ("'no number'", "argument", "plain data"),
    ),
    (
        "a result that cannot be unpickled",
        lambda world: world.box.trap.remote(),
        SerializationError,
        ("'no number'", "result", "plain data"),
    ),
]  # fmt: skip


class Refusals(Conformance):
    """One world for the whole table: nothing in it may change."""

    def test_refusals(self, subtests: pytest.Subtests) -> None:
        client = connect()
        closed = Box.new()
        gone = closed.handle
        closed.close()
        with Box.named("refusals", 3) as box:
            world = World(box, closed, gone)
            before = contents(client)
            for name, act, kind, parts in ROWS:
                with subtests.test(name):
                    with pytest.raises(kind) as caught:
                        act(world)
                    assert type(caught.value) is kind
                    for part in parts:
                        assert part in str(caught.value)
                    assert contents(client) == before
            assert box.add.remote(0) == 3


def contents(client: ControlPlaneClient) -> dict[str, object]:
    """Tell all that there is."""
    return {
        "instances": [(info.app, info.cls, info.instance_id) for info in client.list_instances()],
        "apps": client.list_apps(),
        "secrets": client.list_secrets(),
        "volumes": client.list_volumes(),
    }
