"""The tree of errors: as it is drawn, and through pickling."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from apothic import errors
from apothic.errors import ApothicError, FunctionTimeoutError, RemoteError, RemoteTraceback

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, ApothicError)
}


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Read name, parent and builtin base of each class from the module's docstring."""
    found: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(
            r"    ((?:[│ ]   )*)(?:[├└]── )?([A-Z]\w+Error|ApothicError)(?: \((\w+)\))?", line
        )
        if match is None:
            continue
        depth = len(match[1]) // 4 + ("──" in line)
        path[depth:] = [match[2]]
        found[match[2]] = (path[depth - 1] if depth else None, match[3])
    return found


def test_the_tree_is_drawn_as_it_is() -> None:
    actual = {}
    for name, cls in CLASSES.items():
        ours = [base.__name__ for base in cls.__bases__ if issubclass(base, ApothicError)]
        others = [base.__name__ for base in cls.__bases__ if base.__name__ not in ours]
        parent = ours[0] if ours else None
        actual[name] = (parent, others[0] if others and ours else None)
    assert drawn_tree() == actual


def test_everything_is_exported() -> None:
    assert sorted([*CLASSES, "RemoteTraceback"]) == errors.__all__


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_pickles_with_its_attributes(name: str) -> None:
    cls = CLASSES[name]
    error = cls("a.B", "text", "trace") if cls is RemoteError else cls("text")
    error.extra = {"a": [1]}  # type: ignore[attr-defined]
    if cls is FunctionTimeoutError:
        error.state_lost = True  # type: ignore[attr-defined]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is cls
        assert back.args == error.args
        assert vars(back) == vars(error)
        assert str(back) == str(error)
    assert str(copy.copy(error)) == str(error)


def test_remote_error_reads_as_a_traceback_does() -> None:
    assert str(RemoteError("builtins.SystemExit", "3", "Traceback…\n")) == (
        "builtins.SystemExit: 3\n\nTraceback…"
    )
    assert str(RemoteError("a.B", "", "")) == "a.B"
    assert str(RemoteTraceback("text\n")) == "\ntext\n"


def test_every_class_says_what_it_is() -> None:
    for cls in CLASSES.values():
        assert (cls.__doc__ or "").rstrip().split("\n")[0].endswith((".", ";")), cls
