"""What is read from a class, and which classes are refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pydantic
import pytest

from apothic import App, enter, exit, method
from apothic.definition import describe_class, parameter_infos, signature_from
from apothic.errors import DefinitionError, UsageError
from apothic.testing import fake_engine


class Base:
    @enter()
    def up(self) -> None: ...

    @method(tags=["a"], metadata={"k": [1]})
    def zeta(self, a: int, *rest: str, b: float = 1.5, **more: object) -> int:
        """Say what it does.

        At length.
        """
        return a

    @method()
    def alpha(self) -> None: ...

    @exit()
    def down(self) -> None: ...


def test_methods_come_in_the_order_of_their_definition() -> None:
    class Child(Base):
        @method()
        async def beta(self) -> None: ...

        @enter()
        def child_up(self) -> None: ...

        @exit()
        def child_down(self) -> None: ...

        def zeta(self, a: int) -> int:  # type: ignore[override]  # keeps the mark
            return -a

    found = describe_class(Child)
    assert list(found.methods) == ["zeta", "alpha", "beta"]
    assert found.enter_hooks == ("up", "child_up")
    assert found.exit_hooks == ("down", "child_down")
    assert str(found.method_signatures["zeta"]) == "(a: 'int') -> 'int'"
    assert found.methods["zeta"].tags == ("a",)
    assert list(describe_class(Base).methods) == ["zeta", "alpha"]


def test_an_override_can_take_another_mark_or_none() -> None:
    class Other(Base):
        alpha = None  # type: ignore[assignment]  # no method any more

        @exit()
        def up(self) -> None: ...

    found = describe_class(Other)
    assert list(found.methods) == ["zeta"]
    assert found.enter_hooks == ()
    assert set(found.exit_hooks) == {"up", "down"}


def test_what_is_told_of_a_method() -> None:
    info = describe_class(Base).methods["zeta"]
    assert [(p.name, p.kind, p.default, p.annotation) for p in info.parameters] == [
        ("a", "POSITIONAL_OR_KEYWORD", None, "int"),
        ("rest", "VAR_POSITIONAL", None, "str"),
        ("b", "KEYWORD_ONLY", "1.5", "float"),
        ("more", "VAR_KEYWORD", None, "object"),
    ]
    assert info.tags == ("a",)
    assert info.metadata == {"k": [1]}
    assert info.doc == "Say what it does.\n\nAt length."


def test_kinds() -> None:
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    class Kinds:
        @method()
        def a(self) -> None: ...

        @method()
        async def b(self) -> None: ...

        @method()
        def c(self) -> Iterator[int]:
            yield 1

        @method()
        async def d(self) -> AsyncIterator[int]:
            yield 1

        @method()
        @traced
        async def e(self) -> None: ...

    found = describe_class(Kinds).methods
    assert [info.kind for info in found.values()] == [
        "sync",
        "async",
        "generator",
        "async_generator",
        "async",
    ]


def test_signatures_survive_as_text() -> None:
    signature = describe_class(Base).method_signatures["zeta"]
    text = signature_from(parameter_infos(signature))
    plain = signature.replace(return_annotation=inspect.Signature.empty)
    assert str(text) == str(plain).replace("'", "")  # it shows annotations as they are written
    text.bind(1, "x", b=2, c=3)
    with pytest.raises(TypeError):
        text.bind()


class Slotted:
    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n

    @method()
    def get(self) -> int:
        return self.n


@dataclasses.dataclass
class Data:
    n: int
    more: list[int] = dataclasses.field(default_factory=list)

    @method()
    def get(self) -> int:
        return self.n + len(self.more)


class Model(pydantic.BaseModel):
    n: int

    @method()
    def get(self) -> int:
        return self.n


class WithCall:
    def __init__(self, n: int) -> None:
        self.n = n

    @property
    def twice(self) -> int:
        return 2 * self.n

    @staticmethod
    def plain(n: int) -> int:
        return n

    @classmethod
    def make(cls, n: int) -> int:
        return cls.plain(n)

    @method()
    def __call__(self, n: int = 0) -> int:
        return self.n + n

    @method()
    def get(self) -> int:
        return self.twice - self.make(self.n)


@pytest.mark.parametrize("cls", [Slotted, Data, Model, WithCall])
def test_classes_of_every_make(cls: type) -> None:
    service = App("makes").cls()(cls)
    assert "n" in service.parameter_names
    with fake_engine(), service.new(n=3) as instance:
        assert instance.get.remote() == 3
        if cls is WithCall:
            assert instance(4) == 7


def test_classes_inherit_from_decorated_ones() -> None:
    app = App("inherit")

    @app.cls()
    class One(Base):
        pass

    @app.cls()
    class Two(One):  # type: ignore[misc, valid-type]  # the decorator gives a Cls
        @method()
        def own(self) -> int:
            return int(super().zeta(5))

    assert Two.local_cls.__mro__[1] is One.local_cls
    assert list(Two.method_names) == ["zeta", "alpha", "own"]
    assert Two.local().own.remote() == 5


def test_the_decorated_name_is_a_cls_with_the_docstring() -> None:
    class Documented(Base):
        """Words."""

    service = App("doc").cls(name="other.name")(Documented)
    assert service.name == "other.name"
    assert service.__doc__ == "Words."
    assert service.local_cls is Documented
    assert not service.remote_only


def test_defining_a_class_again_replaces_it() -> None:
    app = App("again")

    def define() -> Any:
        @app.cls()
        class Cell(Base):
            pass

        return Cell

    first, second = define(), define()
    assert first is not second
    assert app.Cell is second is app.get_class("Cell")


# -- refusals --------------------------------------------------------------------------------------


def test_static_and_class_methods_are_refused() -> None:
    for wrap in (staticmethod, classmethod, property):
        with pytest.raises(DefinitionError, match=wrap.__name__):
            method()(wrap(lambda self: None))  # type: ignore[type-var]
        with pytest.raises(DefinitionError, match=wrap.__name__):
            describe_class(type("Bad", (), {"m": wrap(method()(_unmarked()))}))


def _unmarked() -> Callable[[object], None]:
    def function(self: object) -> None: ...

    return function


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "no remote method"),
        ({"close": method()(_unmarked())}, "'close'"),
        ({"inspect": method()(_unmarked())}, "'inspect'"),
        ({"apothic_x": method()(_unmarked())}, "'apothic_x'"),
        ({"__len__": method()(_unmarked())}, "__len__"),
        ({"_hidden": method()(_unmarked())}, "_hidden is marked @method.. and private"),
        ({"m": method()(lambda: None)}, "no first parameter"),
        ({"m": method()(lambda *, a: None)}, "no first parameter"),
        ({"m": method()(_unmarked()), "h": enter()(lambda self, a: None)}, "needs a"),
        ({"m": method()(_unmarked()), "h": exit()(lambda self, *, a: None)}, "needs a"),
    ],
)
def test_refused_classes(members: dict[str, object], words: str) -> None:
    app = App("refused")
    with pytest.raises(DefinitionError, match=words):
        app.cls()(type("Bad", (), members))
    assert app.classes == {}


def test_hooks_that_yield_are_refused() -> None:
    class Yields(Base):
        @enter()
        def both(self) -> Iterator[None]:
            yield

    with pytest.raises(DefinitionError, match="Split it"):
        describe_class(Yields)


def test_marks_on_what_is_no_function() -> None:
    for thing in (len, 5, Base):
        with pytest.raises(DefinitionError, match="no function"):
            method()(thing)  # type: ignore[type-var]
    with pytest.raises(TypeError):
        method(lambda self: None)  # type: ignore[misc]  # the parentheses are missing
    with pytest.raises(DefinitionError, match="two marks"):
        enter()(exit()(_unmarked()))
    with pytest.raises(DefinitionError, match="takes a class"):
        App("no").cls()(len)  # type: ignore[arg-type]
    service = App("twice").cls()(Base)
    with pytest.raises(DefinitionError, match="already"):
        App("twice").cls()(service)  # type: ignore[arg-type]


def test_a_class_is_not_called() -> None:
    service = App("call").cls()(Base)
    with pytest.raises(UsageError, match=r"\.bind.*\.remote.*\.new.*\.named.*\.local"):
        service()
