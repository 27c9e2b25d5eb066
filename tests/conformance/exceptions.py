"""The exceptions that the suites raise, and how each arrives."""

from __future__ import annotations

import builtins
import sys
import threading
from typing import Any

from apothic.errors import ConflictError


class OddError(Exception):
    """Its constructor takes other arguments than it passes on."""

    def __init__(self, left: int, *, right: int) -> None:
        super().__init__(f"{left} against {right}")
        self.left = left
        self.right = right


class NoTextError(Exception):
    """It cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class ShyError(Exception):
    """It pickles, and cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


class Trap:
    """A value that pickles, and fails where it arrives."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def fail(how: str) -> None:
    """Raise one of the exceptions of `FAILURES` or `STAND_INS`."""
    if how == "plain":
        raise KeyError("plain")
    if how == "odd":
        raise OddError(1, right=2)
    if how == "os":
        raise FileNotFoundError(2, "No such file", "lost.txt")
    if how == "unicode":
        b"\xff".decode()
    if how == "surrogate":
        raise ValueError("half an emoji, \ud83d")
    if how == "cause":
        try:
            raise OddError(3, right=4)
        except OddError as error:
            raise ValueError("on top") from error
    if how == "note":
        noted = ValueError("noted")
        noted.__notes__ = ["look here"]  # type: ignore[attr-defined]  # as add_note does, on 3.10 too
        raise noted
    if how == "group":
        raise getattr(builtins, "ExceptionGroup")(  # noqa: B009 - new in 3.11
            "many", [ValueError("one"), OddError(5, right=6)]
        )
    if how == "ours":
        raise ConflictError("raised by user code")
    if how == "lock":
        locked = ValueError("holds a lock")
        locked.lock = threading.Lock()  # type: ignore[attr-defined]
        raise locked
    if how == "no text":
        raise NoTextError
    if how == "local":

        class LocalError(ValueError):
            """Nobody can import it."""

            def __init__(self, code: int) -> None:
                super().__init__(f"code {code}")
                self.code = code

        raise LocalError(7)
    if how == "unpickled":
        raise ShyError("stays")
    raise {
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt("now"),
        "stop": StopIteration("over"),
        "generator exit": GeneratorExit("gone"),
        "base": BaseException("bare"),
        "base surrogate": BaseException("half an emoji, \ud83d"),
    }[how]


FAILURES = [
    ("plain", "builtins.KeyError", "'plain'"),
    ("odd", f"{__name__}.OddError", "1 against 2"),
    ("local", f"{__name__}.fail.<locals>.LocalError", "code 7"),
    ("os", "builtins.FileNotFoundError", "[Errno 2] No such file: 'lost.txt'"),
    ("unicode", "builtins.UnicodeDecodeError", "invalid start byte"),
    ("surrogate", "builtins.ValueError", "half an emoji"),
    ("cause", "builtins.ValueError", "on top"),
    ("note", "builtins.ValueError", "noted"),
    ("ours", "apothic.errors.ConflictError", "raised by user code"),
]
if sys.version_info >= (3, 11):
    FAILURES.append(("group", "builtins.ExceptionGroup", "many (2 sub-exceptions)"))
"""Exceptions that arrive as themselves: name, type, a part of their text."""

STAND_INS = [
    ("exit", "builtins.SystemExit", "3"),
    ("interrupt", "builtins.KeyboardInterrupt", "now"),
    ("stop", "builtins.StopIteration", "over"),
    ("generator exit", "builtins.GeneratorExit", "gone"),
    ("base", "builtins.BaseException", "bare"),
    ("base surrogate", "builtins.BaseException", r"half an emoji, \ud83d"),
    ("lock", "builtins.ValueError", "holds a lock"),
    ("no text", f"{__name__}.NoTextError", "<its __str__ raised RuntimeError>"),
    ("unpickled", f"{__name__}.ShyError", "stays"),
]
"""Exceptions that arrive as `RemoteError`: name, ``type_name``, ``message``."""

HOWS = [how for how, _, _ in (*FAILURES, *STAND_INS)]

ENDS = ["odd", "exit", "interrupt", "stop", "generator exit", "base"]
"""Those that would end a thread, a coroutine or the process, and one that would not."""
