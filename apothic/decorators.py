"""`@method`, `@enter` and `@exit`: marks on the functions of a class, read by `@app.cls`."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from apothic.errors import DefinitionError, InvalidOptionError

__all__ = ["Mark", "check_metadata", "check_tags", "enter", "exit", "mark_of", "method"]

_F = TypeVar("_F", bound=Callable[..., object])
_ATTRIBUTE = "__apothic_mark__"


@dataclass(frozen=True)
class Mark:
    """What a decorator noted on a function; a plain value, so that it pickles with the class.

    ``order`` counts decorations: pickling sorts a class's attributes by name, so that their order in
    a class that came along in a pickle says nothing of the order of their definition.
    """

    kind: str
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    order: int = field(default_factory=itertools.count().__next__)


def check_tags(tags: Iterable[str] | None) -> tuple[str, ...]:
    """Return tags as a tuple without repetitions.

    Raises:
        InvalidOptionError: when one is no non-empty string, or a single string was given.
    """
    if tags is None:
        return ()
    if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable):
        raise InvalidOptionError(
            f"tags={tags!r} is not valid: it takes several strings. Write tags=[{tags!r}]."
        )
    found = tuple(dict.fromkeys(tags))
    for tag in found:
        if not isinstance(tag, str) or not tag.strip():
            raise InvalidOptionError(
                f"tag {tag!r} is not valid: a tag is a non-empty string. Leave it out or name it."
            )
    return found


def check_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Return a copy of ``metadata`` as JSON gives it back.

    Raises:
        InvalidOptionError: when it is no mapping with string keys, or a value is not JSON.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise InvalidOptionError(
            f"metadata={metadata!r} is not valid: it takes a dict with string keys. "
            f"Write metadata={{'key': 'value'}}."
        )
    try:
        copy: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(
            f"metadata={metadata!r} is not valid: its values must be JSON ({error}). Convert them."
        ) from None
    return copy


def _marker(name: str, mark: Mark) -> Callable[[_F], _F]:
    def apply(function: _F) -> _F:
        if isinstance(function, (staticmethod, classmethod, property)):
            raise DefinitionError(
                f"@{name}() cannot stand on a {type(function).__name__}: an instance runs it with "
                f"its own state. Make it a plain method with `self`."
            )
        if not inspect.isfunction(function):
            raise DefinitionError(
                f"@{name}() stands on {function!r}, which is no function. "
                f"Write it with parentheses on the line above a `def`."
            )
        previous = mark_of(function)
        if previous is not None:
            raise DefinitionError(
                f"{function.__qualname__} has two marks, @{previous.kind} and @{name}: one function "
                f"is one of method, enter hook or exit hook. Split it."
            )
        setattr(function, _ATTRIBUTE, mark)
        return function

    return apply


def method(
    *,
    tags: Iterable[str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Callable[[_F], _F]:
    """Make a function of a class callable from afar: plain, async, generator or async generator.

    Args:
        tags: words to find it by, shown in `Cls.method_infos`.
        metadata: JSON values shown beside them.

    Raises:
        InvalidOptionError: when tags or metadata are malformed.
        DefinitionError: when it stands on something that is no plain method.
    """
    return _marker("method", Mark("method", check_tags(tags), check_metadata(metadata)))


def enter() -> Callable[[_F], _F]:
    """Run a function when an instance starts, after construction, before the first call.

    Several run in the order of their definition, those of base classes first. It takes no argument
    but ``self`` and may be async. A failure ends the instance with `InstanceStartError`.
    """
    return _marker("enter", Mark("enter"))


def exit() -> Callable[[_F], _F]:
    """Run a function when an instance stops, once, after its last call.

    Several run in reverse order of their definition, each even if another failed. They run on
    close, lease end, driver end, scale-down and SIGTERM; ``kill -9`` and node loss leave no process
    to run them in.
    """
    return _marker("exit", Mark("exit"))


def mark_of(function: object) -> Mark | None:
    """Give the mark on ``function``, or None."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Mark) else None
