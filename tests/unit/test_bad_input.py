"""What is refused where it is written: each message holds the value, the rule and the remedy.

What needs an engine to be refused is in `tests.conformance.refusals`, which runs on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apothic import App, Cls, Image, Retries, Secret, Volume, method
from apothic.backend import connect
from apothic.errors import HandleError, InvalidOptionError
from apothic.testing import FakeControlPlane, fake_engine
from apothic.values import ClassInstanceHandle


@pytest.fixture(autouse=True)
def engine() -> Iterator[FakeControlPlane]:
    """Have an engine in place in which, afterwards, there must be nothing."""
    with fake_engine() as engine:
        yield engine
        assert engine.list_instances() == []
        assert engine.list_apps() == []
        assert engine.list_secrets() == []
        assert engine.list_volumes() == []


def check(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    """Check that the message holds every part, and ends as a sentence does."""
    text = str(error.value)
    for part in parts:
        assert part in text
    assert text.endswith((".", "?"))


def yields(self: object) -> Iterator[int]:
    """Stand for a generator method."""
    yield 1


# -- options -----------------------------------------------------------------------------------------

NAN, INFINITE = float("nan"), float("inf")

RULES = {
    "cpu": ("whole number of at least 0", "Give whole CPU cores"),
    "memory_mb": ("whole number of at least 1", "Give megabytes"),
    "timeout_s": ("finite number of seconds above 0", "Give seconds as a number"),
    "concurrent_requests": ("whole number of at least 1", "Use 1"),
    "max_pending_tasks": ("whole number of at least 1", "Use 1"),
    "max_containers": ("whole number of at least 1", "Use 1"),
    "tasks_per_container": ("whole number of at least 1", "Use 1"),
    "max_retries": ("whole number from 0 to 1000", "Use 0 for no retries"),
    "image": ("it takes an apothic.Image", "Write Image.debian_slim()"),
    "gpu": ("it takes", "Write gpu='A100'"),
    "gpu_count": ("whole number of at least 1", "Leave it out"),
    "geolocation": ("it takes", "Write geolocation="),
    "min_vram_gb": ("finite number above 0", "Leave it out"),
    "min_total_flops": ("finite number above 0", "Leave it out"),
    "min_cpu_cores": ("finite number above 0", "Leave it out"),
    "disk_gb": ("finite number above 0", "Leave it out"),
    "max_cost_per_hour_usd": ("finite number of at least 0", "Leave it out"),
    "secure_cloud_only": ("True or False", "Leave it out"),
    "tags": ("several strings", "Write tags=["),
    "metadata": ("dict with string keys", "Write metadata={"),
    "volumes": ("{'/path': volume}", "Write {'/data': "),
}
VALUES: list[tuple[str, object]] = [
    *(("cpu", value) for value in (-1, 1.5, True, "2")),
    *(("memory_mb", value) for value in (0, -5, 0.5, "1GB")),
    *(("timeout_s", value) for value in (0, -1, NAN, INFINITE, "10", True, None)),
    *(("concurrent_requests", value) for value in (0, -2, 1.0, None)),
    *(("max_pending_tasks", value) for value in (0, -1, "many")),
    *(("max_containers", value) for value in (0, -1, "many")),
    *(("tasks_per_container", value) for value in (0, -1, False)),
    *(("max_retries", value) for value in (-1, 1001, 0.5, True)),
    *(("image", value) for value in ("python:3.11", 3)),
    *(("gpu", value) for value in ("", " ", 8, ["A100", ""])),
    *(("gpu_count", value) for value in (0, -1, 1.5, True)),
    *(("geolocation", value) for value in ("", {"US": 1}, [None])),
    *(("min_vram_gb", value) for value in (0, -2, NAN, "80")),
    *(("min_total_flops", value) for value in (0, INFINITE)),
    *(("min_cpu_cores", value) for value in ("four", True)),
    *(("disk_gb", value) for value in (-1, 0)),
    *(("max_cost_per_hour_usd", value) for value in (-1.0, NAN, "cheap")),
    *(("secure_cloud_only", value) for value in ("yes", 1)),
    *(("tags", value) for value in ("one",)),
    ("metadata", []),
    ("metadata", {1: 2}),
    ("metadata", "m"),
    *(("volumes", value) for value in ("v", 3)),
]


@pytest.mark.parametrize(("name", "value"), VALUES, ids=repr)
def test_a_value_of_one_option(name: str, value: object) -> None:
    app = App("bad")
    with pytest.raises(InvalidOptionError) as caught:
        app.cls(**{name: value})
    check(caught, f"{name}={value!r}", *RULES[name])
    assert app.classes == {}


OPTIONS: list[tuple[dict[str, object], tuple[str, str, str]]] = [
    ({"retries": -1}, ("max_retries=-1", "whole number from 0 to 1000", "Use 0")),
    ({"retries": True}, ("max_retries=True", "whole number from 0 to 1000", "Use 0")),
    ({"retries": 2, "max_retries": 3}, ("retries=2 and max_retries=3", "differ", "Give one")),
    (
        {"retries": Retries(2), "max_retries": 1},
        ("Retries(max_retries=2", "differ", "Give one of them"),
    ),
    ({"secrets": ["TOKEN"]}, ("holds a str", "apothic.Secret", "Secret.create")),
    ({"secrets": "TOKEN"}, ("given a str", "list of apothic.Secret", "Secret.from_name")),
    ({"volumes": {"data": Volume.cloud("v")}}, ("'data'", "absolute path", "Write '/data'")),
    ({"volumes": {"/": Volume.cloud("v")}}, ("'/'", "hide the whole file system", "Write")),
    ({"volumes": [Volume.cloud("v")]}, ("'v'", "without mount_path", "Give mount_path")),
    ({"volumes": {"/d": "v"}}, ("'v'", "is no Volume", "Volume.from_name")),
    (
        {"volumes": [Volume.cloud("a", mount_path="/d"), Volume.cloud("b", mount_path="/d/")]},
        ("'/d'", "two volumes, 'a' and 'b'", "another path"),
    ),
    ({"tags": [""]}, ("tag ''", "non-empty string", "Leave it out")),
    ({"tags": ["a", 1]}, ("tag 1", "non-empty string", "Leave it out")),
    ({"metadata": {"a": {1}}}, ("{'a': {1}}", "must be JSON", "Convert them")),
    ({"metadata": {"a": NAN}}, ("nan", "must be JSON", "Convert them")),
    ({"gpu": "A10000"}, ("gpu='A10000'", "no GPU named", "Did you mean A100")),
    ({"gpu": []}, ("gpu=[]", "names nothing", "Name at least one")),
    ({"geolocation": []}, ("geolocation=[]", "names nothing", "Name at least one")),
    (
        {"gpu": "T4", "min_vram_gb": 80},
        ("min_vram_gb=80", "contradicts gpu=['T4']", "lower it to at most 16"),
    ),
    ({"offer_filters": {"gpu_rams": {"gte": 1}}}, ("'gpu_rams'", "no field", "Did you mean")),
    ({"offer_filters": {"gpu_ram": {"atleast": 1}}}, ("'atleast'", "no operator", "Known are")),
]


BAD_OPTIONS: list[tuple[dict[str, object], tuple[str, ...]]] = [
    *(({name: value}, (f"{name}={value!r}", *RULES[name])) for name, value in VALUES),
    *OPTIONS,
]
"""All of them, with what their messages say; sandboxes refuse the same."""


@pytest.mark.parametrize(("options", "parts"), OPTIONS, ids=repr)
def test_options(options: dict[str, object], parts: tuple[str, ...]) -> None:
    app = App("bad")
    with pytest.raises(InvalidOptionError) as caught:
        app.cls(**options)
    check(caught, *parts)
    assert app.classes == {}


def test_generators_alone_are_never_retried() -> None:
    app = App("bad")
    decorate = app.cls(retries=2)
    with pytest.raises(InvalidOptionError) as caught:
        decorate(type("Yields", (), {"items": method()(yields)}))
    check(caught, "Yields", "retries", "generator")
    assert app.classes == {}


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "9a", None, 3, "a/b", "a:b", "ü", "x" * 64], ids=repr
)
def test_names(name: str) -> None:
    makes: dict[str, Callable[[str], object]] = {
        "app": App,
        "secret": Secret.from_name,
        "volume": Volume.from_name,
        "class": lambda name: App("bad").cls(name=name)(type("It", (), {"m": method()(yields)})),
    }
    for kind, make in makes.items():
        if kind == "class" and name is None:
            continue  # the class's own name
        with pytest.raises(InvalidOptionError) as caught:
            make(name)
        check(caught, f"{kind} name {name!r}", "1 to 63 letters", "Choose such a name")


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("not a variable", "v", ("'not a variable'", "is not valid", "Choose such a name")),
        ("a-b", "v", ("'a-b'", "letters, digits and '_'", "Rename it")),
        ("TOKEN", {"1ST": "v"}, ("'1ST'", "does not start with a digit", "Rename it")),
        ("TOKEN", {}, ("'TOKEN' is a dict", "non-empty mapping", "Convert it")),
        ("TOKEN", 5, ("'TOKEN' is a int", "takes a string", "Convert it")),
        ("TOKEN", {"A": 5}, ("variable A of secret 'TOKEN'", "no string", "base64")),
        ("TOKEN", "hunter2\0", ("variable TOKEN", "NUL characters", "base64")),
        ("TOKEN", {"A": "x", "B": b"hunter2"}, ("variable B", "no string", "base64")),
    ],
    ids=repr,
)
def test_secrets(name: str, value: str, parts: tuple[str, ...]) -> None:
    for store in (Secret.create, Secret.set):
        with pytest.raises(InvalidOptionError) as caught:
            store(name, value)
        check(caught, *parts)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Volume("v", backend="tape"), ("'tape'", "is one of", "Use Volume.cloud")),
        (lambda: Volume.vast_local("v", size_gb=0), ("size_gb=0", "GB above 0", "Leave it out")),
        (
            lambda: Volume.vast_local("v", size_gb="1"),
            ("size_gb='1'", "GB above 0", "Leave it out"),
        ),
        (lambda: Volume.cloud("v", mount_path="d"), ("'d'", "absolute path", "Write '/data'")),
        (lambda: Retries(1, 0.5), ("backoff_coefficient=0.5", "at least 1", "Leave it out for 2")),
        (lambda: Retries(1, 2, -1), ("initial_delay=-1", "at least 0", "Leave it out for 1")),
        (lambda: Retries(1, 2, 1, NAN), ("max_delay=nan", "finite", "Leave it out for 60")),
        (lambda: Retries(1, 2, 5, 1), ("max_delay=1", "shorter than the first", "Raise max_delay")),
        (lambda: connect("ray://x"), ("client='ray://x'", "takes an", "Leave it out")),
        (lambda: connect(base_url=5), ("base_url=5", "it takes 'ray://", "Leave it out")),
        (lambda: connect(base_url=" "), ("base_url=' '", "it takes 'ray://", "Leave it out")),
    ],
)
def test_values(make: Callable[[], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        make()
    check(caught, *parts)


def test_two_connections(engine: FakeControlPlane) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        connect(engine, "auto")
    check(caught, "base_url='auto'", "connected already", "Give one of them")


# -- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda path: Image.debian_slim(python_version="3"),
        lambda path: Image.debian_slim(python_version=3.11),
        lambda path: Image.from_registry("a b"),
        lambda path: Image.from_registry(""),
        lambda path: Image.from_dockerfile(path / "missing"),
        lambda path: Image.debian_slim().pip_install(),
        lambda path: Image.debian_slim().pip_install(""),
        lambda path: Image.debian_slim().env({"1A": "x"}),
        lambda path: Image.debian_slim().env_file(path / "bad-env"),
        lambda path: Image.debian_slim().pip_install_from_requirements(path / "bad-req"),
        lambda path: Image.debian_slim().pip_install_from_pyproject(path / "bad.toml"),
        lambda path: Image.debian_slim().workdir("\0"),
        lambda path: Image.debian_slim().add_local_file(path),
        lambda path: Image.debian_slim().add_local_dir(path / "bad-env"),
        lambda path: Image.debian_slim().add_local_python_source("no_such_module_here"),
        lambda path: Image.debian_slim().add_local_python_source("sys"),
    ],
)
def test_steps_of_images(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "bad-env").write_text("no equals sign\n")
    (tmp_path / "bad-req").write_text("-r other.txt\n")
    (tmp_path / "bad.toml").write_text("[project\n")
    with pytest.raises(InvalidOptionError) as caught:
        make(tmp_path)
    check(caught)


# -- handles -----------------------------------------------------------------------------------------

HANDLE = ClassInstanceHandle(
    cluster_id="c", app="a", cls="B", instance_id="i", spec_digest="d", named=True
).model_dump_json()


@pytest.mark.parametrize(
    "handle",
    ["", "{", "[]", "{}", '{"app": 1}', HANDLE[:-1], HANDLE * 2, "x" * 10_000, {"app": "x"}, {}],
    ids=lambda handle: repr(handle)[:40],
)
def test_malformed_handles(handle: str) -> None:
    for reach in (ClassInstanceHandle.parse, Cls.from_handle):
        with pytest.raises(HandleError) as caught:
            reach(handle)
        check(caught, repr(handle)[:100], "is malformed", "`.handle_json`", "unaltered")
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("handle", [5, None, b"x", [HANDLE], ("a", "b")], ids=repr)
def test_what_is_no_handle(handle: str) -> None:
    with pytest.raises(HandleError) as caught:
        Cls.from_handle(handle)
    check(caught, repr(handle)[:100], f"is a {type(handle).__name__}", "Pass `.handle`")
