"""The tree of errors: as it is drawn, and through pickling."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from apothic import SandboxExecResult, errors
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


RESULT = SandboxExecResult(command=("false",), returncode=3, duration_s=0.5)

ARGUMENTS: dict[str, tuple[object, ...]] = {
    "RemoteError": ("a.B", "text", "trace"),
    "ImageBuildError": ("text", "RUN false", "log"),
    "ExecTimeoutError": ("text", RESULT),
    "SandboxExecError": ("text", RESULT),
    "ExecStartError": ("text", 7),
    **{
        name: ("text", 2, "/lost.txt")
        for name, cls in CLASSES.items()
        if issubclass(cls, errors.SandboxFileError)
    },
}
"""What constructors take that is more than a message."""


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_pickles_with_its_attributes(name: str) -> None:
    cls = CLASSES[name]
    error = cls(*ARGUMENTS.get(name, ("text",)))
    parameters = inspect.signature(cls.__init__).parameters
    attributes = {key for key in parameters if hasattr(error, key)}
    attributes |= {"errno", "strerror", "filename"} if isinstance(error, OSError) else set()
    error.extra = {"a": [1]}  # type: ignore[attr-defined]
    error.__notes__ = ["a note"]  # type: ignore[attr-defined]  # as add_note does, on 3.10 too
    if cls is FunctionTimeoutError:
        error.state_lost = True  # type: ignore[attr-defined]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is cls
        assert back.args == error.args
        assert vars(back) == vars(error)
        assert str(back) == str(error)
        for attribute in attributes:
            assert getattr(back, attribute) == getattr(error, attribute)
    copied = copy.copy(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_remote_error_reads_as_a_traceback_does() -> None:
    assert str(RemoteError("builtins.SystemExit", "3", "Traceback…\n")) == (
        "builtins.SystemExit: 3\n\nTraceback…"
    )
    assert str(RemoteError("a.B", "", "")) == "a.B"
    assert str(RemoteTraceback("text\n")) == "\ntext\n"


def test_every_class_says_what_it_is() -> None:
    for cls in CLASSES.values():
        assert (cls.__doc__ or "").rstrip().split("\n")[0].endswith((".", ";")), cls
