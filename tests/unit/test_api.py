"""The front door: exports, light import, errors, bad input, reproducible pickles."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import apothic
from apothic import App, Image, Retries, Secret, Volume, enter, errors, method
from apothic.errors import ApothicError, ArgumentError, DefinitionError, InvalidOptionError
from apothic.packing import _canonical
from apothic.values import ClassInstanceHandle


def test_every_export_loads() -> None:
    for name in apothic.__all__:
        assert getattr(apothic, name) is not None


def test_import_is_light() -> None:
    code = "import sys, apothic; print([m for m in ('ray','docker','numpy') if m in sys.modules])"
    for extra in ("", "; from apothic import App, Cls, Image, Secret"):
        line = code.replace("; print", extra + "; print")
        run = subprocess.run(
            [sys.executable, "-c", line], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", list(errors.__all__))
def test_errors_survive_pickling(name: str) -> None:
    cls = getattr(errors, name)
    error = cls("a.B", "text", "trace") if name == "RemoteError" else cls("text")
    error.extra = [1]
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert str(back) == str(error)
    assert back.extra == [1]
    assert name in (errors.__doc__ or "") or name == "RemoteTraceback"


BAD_OPTIONS = [
    {"cpu": -1}, {"cpu": 1.5}, {"cpu": True}, {"cpu": "2"},
    {"memory_mb": 0}, {"memory_mb": -5}, {"memory_mb": "1GB"},
    {"timeout_s": 0}, {"timeout_s": -1}, {"timeout_s": float("inf")}, {"timeout_s": float("nan")},
    {"timeout_s": "10"}, {"timeout_s": True},
    {"retries": -1}, {"retries": True}, {"retries": 2.5}, {"retries": 5000}, {"max_retries": -1},
    {"retries": 2, "max_retries": 3},
    {"concurrent_requests": 0}, {"concurrent_requests": -2}, {"concurrent_requests": 1.0},
    {"max_pending_tasks": 0}, {"max_pending_tasks": 2, "concurrent_requests": 3},
    {"max_containers": 0}, {"max_containers": "many"},
    {"tasks_per_container": 0}, {"tasks_per_container": -1},
    {"image": "python:3.11"}, {"secrets": ["TOKEN"]}, {"secrets": "TOKEN"},
    {"volumes": {"data": Volume.cloud("v")}}, {"volumes": {"/": Volume.cloud("v")}},
    {"volumes": [Volume.cloud("v")]}, {"volumes": {"/d": "v"}}, {"volumes": "v"},
    {"volumes": [Volume.cloud("a", mount_path="/d"), Volume.cloud("b", mount_path="/d/")]},
    {"tags": "one"}, {"tags": [""]}, {"tags": [1]}, {"metadata": []}, {"metadata": {1: 2}},
    {"metadata": {"a": object()}}, {"metadata": {"a": float("nan")}},
    {"name": ""}, {"name": "a b"}, {"name": "1st"}, {"name": "x" * 64}, {"name": "a:b"},
    {"gpu": "A10000"}, {"gpu": ""}, {"gpu": []}, {"gpu_count": 0}, {"gpu_count": -1},
    {"min_vram_gb": 0}, {"min_vram_gb": -2}, {"gpu": "T4", "min_vram_gb": 80},
    {"max_cost_per_hour_usd": -1.0}, {"min_total_flops": float("nan")}, {"min_cpu_cores": "four"},
    {"offer_filters": {"gpu_rams": {"gte": 1}}}, {"offer_filters": {"gpu_ram": {"atleast": 1}}},
    {"geolocation": []}, {"disk_gb": -1}, {"secure_cloud_only": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=repr)
def test_bad_options_are_refused_where_they_stand(options: dict[str, object]) -> None:
    app = App("bad")
    with pytest.raises(InvalidOptionError) as caught:
        app.cls(**options)
    text = str(caught.value)
    assert text.rstrip().endswith((".", ")", "]", "?"))
    assert len(text) > 40
    assert app.classes == {}


@pytest.mark.parametrize("name", ["", " ", "a b", "9a", None, 3, "a/b", "ü"])
def test_bad_names(name: object) -> None:
    for make in (App, Secret.from_name, Volume.from_name):
        with pytest.raises(InvalidOptionError, match="name"):
            make(name)


def test_secret_value_is_in_no_text() -> None:
    with pytest.raises(InvalidOptionError) as caught:
        Secret.create("NAME", {"A": 5, "hunter2 ": "x"})  # type: ignore[dict-item]
    assert "5" not in str(caught.value)
    assert repr(Secret("TOKEN")) == "Secret('TOKEN')"


def test_classes_that_cannot_be_services() -> None:
    app = App("bad")

    class NoMethod:
        pass

    class Needs:
        @enter()
        def up(self, what: int) -> None: ...

        @method()
        def m(self) -> None: ...

    for cls in (NoMethod, Needs):
        with pytest.raises(DefinitionError):
            app.cls()(cls)
    with pytest.raises(DefinitionError, match="staticmethod"):
        method()(staticmethod(len))
    with pytest.raises(DefinitionError, match="two marks"):
        enter()(method()(lambda self: None))


def test_arguments_are_checked_at_the_call_site() -> None:
    app = App("args")

    @app.cls()
    class Box:
        def __init__(self, a: int, *, b: int = 0) -> None: ...

        @method()
        def m(self) -> None: ...

    for call in (Box.bind, Box.new, lambda: Box.bind(1, 2), lambda: Box.partial(c=1)):
        with pytest.raises(ArgumentError, match="signature"):
            call()
    with pytest.raises(errors.UsageError, match=r"Box\.bind"):
        Box.m.remote()
    with pytest.raises(errors.UsageError, match=r"\.new"):
        Box(1)


@pytest.mark.parametrize(
    "handle", ["", "{", "[]", "{}", '{"app": 1}', {"app": "x"}, 5, None, b"x", {"extra": 1}]
)
def test_malformed_handles(handle: object) -> None:
    with pytest.raises(errors.HandleError, match="handle"):
        ClassInstanceHandle.parse(handle)


def test_retry_delays() -> None:
    policy = Retries(5, initial_delay=1, backoff_coefficient=3, max_delay=10)
    assert [policy.delay_s(n) for n in (1, 2, 3, 4)] == [1, 3, 9, 10]
    assert Retries(1).delay_s(100000) == 60


def test_images_are_immutable() -> None:
    base = Image.debian_slim()
    assert base.pip_install("a").env(X=1) != base
    assert base.steps == ()
    assert base.apt_install("git").needs_container


def test_canonical_arguments() -> None:
    assert _canonical({"a": 1, "b": {2, 3}}) == _canonical({"b": {3, 2}, "a": 1})
    assert _canonical(["ab"]) != _canonical(["a", "b"])
    assert _canonical(1) != _canonical(True)
    assert _canonical((1,)) != _canonical([1])


def test_equal_code_has_equal_bytes_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "code.py"
    script.write_text(
        "from apothic import App, method\n"
        "app = App('same')\n"
        "class Base:\n    kind = 'b'\n"
        "@app.cls()\n"
        "class Box(Base):\n"
        "    @method()\n"
        "    def m(self, x):\n        return x in {'a', 'b', 'c', 'd', 'e'}\n"
        "print(app.manifest().deployment_id)\n"
    )
    ids = {
        subprocess.run(
            [sys.executable, str(script)],
            env={"PYTHONHASHSEED": str(seed), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(ids) == 1


def test_every_error_of_ours_has_the_root() -> None:
    for name, value in inspect.getmembers(errors, inspect.isclass):
        if value.__module__ == errors.__name__ and name != "RemoteTraceback":
            assert issubclass(value, ApothicError)
