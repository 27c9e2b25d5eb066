"""Definitions of sandboxes: options, names, look-ups, what needs no engine."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from apothic import App, Image, Sandbox, Secret, Volume, method
from apothic.backend import ControlPlaneClient
from apothic.errors import (
    ConflictError,
    InvalidOptionError,
    SandboxNotFoundError,
    UsageError,
)
from apothic.options import ClassOptions
from tests.unit.test_bad_input import BAD_OPTIONS


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        *BAD_OPTIONS,
        ({"network": "host"}, ("network='host'",)),
        ({"network": None}, ("network=None",)),
        ({"name": None}, ("None",)),
    ],
    ids=repr,
)
def test_bad_options_are_refused_where_they_stand(
    options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    app = App("bad")
    with pytest.raises(InvalidOptionError) as caught:
        app.sandbox(**options)
    text = str(caught.value)
    for part in parts:
        assert part in text
    assert app.sandboxes == {}


def test_every_option_reaches_the_spec() -> None:
    image = Image.debian_slim().apt_install("git")
    sandbox = App("a").sandbox(
        name="shell",
        gpu="T4",
        cpu=3,
        memory_mb=77,
        disk_gb=5,
        timeout_s=9,
        max_retries=4,
        concurrent_requests=5,
        max_pending_tasks=66,
        max_containers=7,
        tasks_per_container=8,
        image=image,
        secrets=[Secret.from_name("TOKEN")],
        volumes={"/data": Volume.cloud("v")},
        network="internet",
        tags=["x"],
        metadata={"k": 1},
    )
    spec = sandbox.spec
    options = ClassOptions.model_validate(spec.options)
    assert options.constraints.gpu == ("T4",)
    assert options.constraints.disk_gb == 5
    assert (options.cpu, options.memory_mb, options.timeout_s) == (3, 77, 9)
    assert (options.max_retries, options.concurrent_requests) == (4, 5)
    assert (options.max_pending_tasks, options.max_containers) == (66, 7)
    assert (options.tasks_per_container, options.secrets) == (8, ("TOKEN",))
    assert options.mounts[0].path == "/data"
    assert options.image == image
    assert (spec.network, spec.tags, spec.metadata) == ("internet", ("x",), {"k": 1})
    assert spec.model_validate_json(spec.model_dump_json()).digest == spec.digest


def test_defaults_are_those_of_the_reference() -> None:
    sandbox = App("a").sandbox()
    assert sandbox.name == "default"
    assert (sandbox.options.timeout_s, sandbox.options.tasks_per_container) == (3600, 1000)
    assert sandbox.network == "none"
    assert (sandbox.tags, sandbox.metadata) == ((), {})


def test_reading_a_definition() -> None:
    app = App("a")
    sandbox = app.sandbox(name="shell")
    assert app.shell is sandbox
    assert app.get_sandbox("shell") is sandbox
    assert app.sandboxes == {"shell": sandbox}
    assert app.sandbox_names == ("shell",)
    assert "shell" in dir(app)
    assert "shell" in repr(app)
    assert "exec" in sandbox.method_names
    signature = sandbox.signature
    assert signature is not None
    assert list(signature.parameters) == ["cwd", "env"]
    assert signature.parameters["cwd"].default == "/"
    info = sandbox.inspect()
    assert (info.name, info.app_name, info.deployment_id, info.sessions) == ("shell", "a", None, ())
    with pytest.raises(SandboxNotFoundError, match="shell"):
        app.get_sandbox("other")
    with pytest.raises(AttributeError, match="shell"):
        _ = app.other


def test_names_are_taken_once() -> None:
    app = App("a")
    first = app.sandbox(name="x", cpu=2)
    assert app.sandbox(name="x", cpu=2) is app.x
    assert first.spec == app.x.spec
    with pytest.raises(ConflictError, match="'x'"):
        app.sandbox(name="x", cpu=3)

    class Thing:
        @method()
        def m(self) -> None: ...

    with pytest.raises(ConflictError, match="sandbox 'x'"):
        app.cls(name="x")(Thing)
    app.cls()(Thing)
    with pytest.raises(ConflictError, match="class 'Thing'"):
        app.sandbox(name="Thing")


def test_a_definition_travels_as_its_spec() -> None:
    app = App("a")
    sandbox = app.sandbox(name="shell", network="internet")
    back = pickle.loads(pickle.dumps(sandbox))
    assert back.spec == sandbox.spec
    assert back.label == "a.shell"
    assert pickle.loads(pickle.dumps(app)).shell.spec == sandbox.spec


def test_the_manifest_holds_sandboxes() -> None:
    ids = set()
    for options in ({}, {"cpu": 2}, {"network": "internet"}):
        app = App("a")
        sandbox = app.sandbox(name="shell", **options)
        manifest = app.manifest()
        assert manifest.sandboxes == {"shell": sandbox.spec}
        assert manifest.model_validate_json(manifest.model_dump_json()) == manifest
        ids.add(manifest.deployment_id)
    assert len(ids) == 3


def test_files_of_the_image_travel_with_the_definition(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("content")
    image = Image.debian_slim().add_local_file(str(tmp_path / "file"), "/file")
    sandbox = App("a").sandbox(image=image)
    steps = ClassOptions.model_validate(sandbox.spec.options).image.steps
    assert [step.digest for step in steps] == list(sandbox.blobs())
    assert str(tmp_path) not in sandbox.spec.model_dump_json()


def test_an_engine_without_sandboxes_says_so() -> None:
    class Bare(ControlPlaneClient):
        pass

    Bare.__abstractmethods__ = frozenset()
    sandbox = Sandbox(app_name="a", client=lambda: Bare())  # type: ignore[abstract]
    for call in (sandbox.create, lambda: sandbox.named("x")):
        with pytest.raises(UsageError, match=r"Sandbox\.local"):
            call()


def test_twins_have_the_verbs_parameters() -> None:
    for name in ("create", "named", "local", "attach", "close_handle", "close_named", "inspect"):
        twin = inspect.signature(getattr(Sandbox(app_name="a").aio, name))
        assert list(twin.parameters) == list(
            inspect.signature(getattr(Sandbox(app_name="a"), name)).parameters
        )
