"""Pickles: the same bytes in every process, the same classes on their way back."""

from __future__ import annotations

import inspect
import linecache
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apothic import App, ClassInstanceHandle, method
from apothic.definition import signature_from
from apothic.errors import SerializationError
from apothic.packing import arguments_digest, dumps, loads, local_modules, pack_class
from apothic.values import ParameterInfo
from tests.conformance.exceptions import NoTextError

COUNTER = [0]


class Color(Enum):
    RED = 1

    def count(self) -> int:
        COUNTER[0] += 1
        return COUNTER[0]


class Point:
    shared: list[int] = []  # noqa: RUF012 - that it is shared is the point

    def __init__(self, x: int) -> None:
        self.x = x

    def count(self) -> int:
        COUNTER[0] += 1
        return COUNTER[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    def __hash__(self) -> int:
        return hash(self.x)


class Node:
    others: set[Node]


class TwoArgumentsError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")
        self.a, self.b = a, b


class KeywordError(Exception):
    def __init__(self, *, code: int) -> None:
        self.code = code


class MixedError(KeyError, AttributeError):
    def __init__(self, name: str, hint: str) -> None:
        super().__init__(name)
        self.hint = hint


class NewError(ValueError):
    def __new__(cls, *args: object) -> NewError:
        made = super().__new__(cls, *args)
        made.made = True
        return made

    made: bool


class PathError(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "missing", path)


class PluginError(ImportError):
    def __init__(self, plugin: str) -> None:
        super().__init__(f"no plugin {plugin}", name=plugin)
        self.plugin = plugin


@dataclass(frozen=True)
class Tagged:
    tags: frozenset[str]
    words: tuple[str, ...] = ()


# -- the same bytes --------------------------------------------------------------------------------


PROGRAM = """
import hashlib, sys
from apothic import App, Cls, method
from apothic.packing import dumps, pack_class
from helper import Helper, LIMITS

app = App("same")

class Base:
    kinds = {"b", "a", "c"}

@app.cls()
class Box(Base):
    names = frozenset({"one", "two", "three", "four"})

    @method()
    def m(self, x, default=("x", "y")):
        def inner(y):
            return y in {"p", "q", "r", "s"} and y not in LIMITS
        return x in {"a", "b", "c", "d", "e"}, inner(x), Helper(x), [z for z in self.names]

    @method()
    async def n(self, items=None):
        return {k: v for k, v in (items or {}).items()}

if "use" in sys.argv:
    Box.local().m("a")
    dumps(Box.local_cls(), by_value=True)
print(hashlib.sha256(pack_class(Box.local_cls)).hexdigest(), app.manifest().deployment_id)
"""

HELPER = """
LIMITS = ("a", "b")

class Helper:
    def __init__(self, x):
        self.x = x in {"u", "v", "w"}
"""


def run_program(directory: Path, seed: int, *args: str) -> str:
    (directory / "helper.py").write_text(HELPER)
    script = directory / "program.py"
    script.write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, str(script), *args],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_equal_code_gives_equal_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    assert len({run_program(tmp_path, seed) for seed in (1, 2, 3)}) == 1


def test_a_class_that_is_used_has_the_bytes_of_a_fresh_one(tmp_path: Path) -> None:
    plain = run_program(tmp_path, 1)
    used = run_program(tmp_path, 3, "use")
    assert plain == used


def test_packing_twice_gives_equal_bytes() -> None:
    assert pack_class(Point) == pack_class(Point)
    assert dumps(Point(1)) == dumps(Point(1))


# -- identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: Point(3), lambda: Color.RED, lambda: TwoArgumentsError(1, 2)]
)
def test_a_class_comes_back_as_itself_and_untouched(make: Callable[[], Any]) -> None:
    value = make()
    cls = type(value)
    members = dict(vars(cls))
    back = loads(dumps(value))
    assert type(back) is cls
    assert dict(vars(cls)) == members  # its own functions, which see the module's own globals
    if hasattr(value, "count"):
        before = COUNTER[0]
        assert back.count() == before + 1 == COUNTER[0]
    if cls is Color:
        assert back is value


def test_a_class_of_another_process_is_one_class(tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        "import sys\n"
        "from apothic.packing import dumps\n"
        "class Thing:\n"
        "    def __init__(self, n):\n        self.n = n\n"
        "    def get(self):\n        return self.n\n"
        "    class Inner:\n        pass\n"
        "for n in (1, 2):\n"
        "    sys.stdout.write(dumps(Thing(n)).hex() + '\\n')\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    one, two = (loads(bytes.fromhex(line)) for line in run.stdout.split())
    assert type(one) is type(two)
    assert (one.get(), two.get()) == (1, 2)
    assert loads(dumps(one)).get() == 1
    assert one.Inner.__qualname__ == "Thing.Inner"


def test_classes_of_one_factory_are_told_apart() -> None:
    def make(n: int) -> type:
        class Made:
            number = n

        return Made

    one, two = make(1), make(2)
    assert [loads(dumps(cls)).number for cls in (one, two)] == [1, 2]
    assert loads(dumps(one)) is one


def test_modules_of_the_user_travel_by_value_and_only_then() -> None:
    assert __name__ in local_modules()
    assert not {"apothic", "ray_backend", "pydantic", "json"} & {
        name.partition(".")[0] for name in local_modules()
    }
    dumps(Point(1))
    assert __name__ not in cloudpickle.list_registry_pickle_by_value()
    assert len(dumps(Point, by_value=False)) < len(dumps(Point))


def test_what_the_user_registered_stays_registered() -> None:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        dumps(Point(1))
        assert __name__ in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_threads_pickle_side_by_side() -> None:
    expected = dumps([Point(n) for n in range(50)])
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: dumps([Point(n) for n in range(50)]), range(100)))
    assert set(results) == {expected}


# -- exceptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        TwoArgumentsError(1, 2),
        KeywordError(code=7),
        MixedError("name", "try another"),
        NewError("a"),
        PathError("lost.txt"),
        PluginError("fast"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        KeyError("a"),
        StopIteration(5),
        FileNotFoundError(2, "missing", "f"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_with_any_constructor(error: BaseException) -> None:
    error.__notes__ = ["a note"]  # type: ignore[attr-defined]  # as add_note does, on 3.10 too
    back = loads(dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert vars(back) == vars(error)
    for name in ("filename", "errno", "reason", "value", "name"):
        assert getattr(back, name, None) == getattr(error, name, None)


# -- what cannot be pickled --------------------------------------------------------------------------


LOCK = threading.Lock()


def test_a_class_that_holds_a_lock_is_named() -> None:
    class NeedsLock:
        @method()
        def m(self) -> bool:
            return LOCK.locked()

    service = App("locked").cls()(NeedsLock)
    with pytest.raises(SerializationError, match=r"NeedsLock.*lock.*enter hook") as caught:
        service.new()
    assert isinstance(caught.value.__cause__, TypeError)


def test_sources_come_along() -> None:
    cls, classes, sources = loads(pack_class(Point))
    assert cls is Point
    assert classes[__name__]["Point"] is Point
    assert sources[__file__] == "".join(linecache.getlines(__file__))


# -- digests of arguments ------------------------------------------------------------------------------


def signature(a: object, b: object = 1, *rest: object, c: object = None, **more: object) -> None:
    """Stand for a constructor."""


SIGNATURE = inspect.signature(signature)
TEXT_SIGNATURE = signature_from(
    tuple(
        ParameterInfo(
            name=p.name,
            kind=p.kind.name,
            default=None if p.default is p.empty else repr(p.default),
        )
        for p in SIGNATURE.parameters.values()
    )
)


def digest(*args: object, **kwargs: object) -> str:
    found = arguments_digest(SIGNATURE.bind(*args, **kwargs))
    # Whoever looked the class up by name knows its signature as text.
    assert arguments_digest(TEXT_SIGNATURE.bind(*args, **kwargs)) == found
    return found


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(plain, plain)
def test_digests_are_equal_exactly_for_equal_plain_arguments(one: object, two: object) -> None:
    same = type(one) is type(two) and repr(one) == repr(two)
    assert digest(one) == digest(a=one)
    if same:
        assert digest(one) == digest(two)
    elif one != two:
        assert digest(one) != digest(two)


@given(st.dictionaries(st.text(), st.integers()), st.sets(st.text()))
def test_digests_ignore_the_order_of_insertion(mapping: dict[str, int], items: set[str]) -> None:
    turned = dict(reversed(list(mapping.items())))
    assert digest(mapping) == digest(turned)
    assert digest(items) == digest({*list(items)[::-1]})
    assert digest(1, **{f"k{n}": n for n in range(3)}) == digest(
        1, **{f"k{n}": n for n in reversed(range(3))}
    )


def test_defaults_count_as_given() -> None:
    assert digest(5) == digest(5, 1) == digest(a=5, b=1, c=None)
    assert digest(5) != digest(5, 2)
    assert digest(5, True) != digest(5, 1)


def test_arguments_are_told_apart() -> None:
    different = [
        digest(1), digest(True), digest(1.0), digest("1"), digest(b"1"), digest((1,)), digest([1]),
        digest({1}), digest(frozenset({1})), digest({1: None}), digest(["ab"]), digest(["a", "b"]),
        digest(1, 1, 2), digest(1, c=2), digest(1, d=2), digest(Point(1)), digest(Point(2)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert digest(Point(1)) == digest(Point(1))
    assert digest([Point(1)]) != digest([Point(2)])


def test_objects_are_compared_by_content() -> None:
    words = [f"word {number}" for number in range(50)]
    turned = frozenset(words[::-1])
    assert digest(Tagged(frozenset(words))) == digest(Tagged(turned))
    # Whether two equal strings are one object must not count.
    one = words[0]
    assert digest(Tagged(turned, (one, one))) == digest(Tagged(turned, (one, "".join(list(one)))))


def test_what_refers_to_itself_comes_back_so() -> None:
    node = Node()
    node.others = {node}
    back = loads(dumps(node, reproducibly=True))
    assert back.others == {back}
    deep: list[object] = []
    for _ in range(300):  # deeper than a pickler in Python goes, not than one in C
        deep = [Point(1), deep]
    assert loads(dumps(deep, reproducibly=True)) == deep


def test_handles_as_arguments() -> None:
    handle = ClassInstanceHandle(
        cluster_id="c", app="a", cls="B", instance_id="i", spec_digest="d", named=True
    )
    assert digest(handle) == digest(handle.model_copy())


@pytest.mark.parametrize("error", [NoTextError(), ValueError("\ud83d")], ids=["none", "odd"])
def test_an_error_without_a_proper_text_can_be_told(error: Exception) -> None:
    class Reluctant:
        def __reduce__(self) -> str:
            raise error

    with pytest.raises(
        SerializationError, match=r"NoTextError: <its|ValueError: \\ud83d"
    ) as caught:
        dumps(Reluctant())
    str(caught.value).encode()
