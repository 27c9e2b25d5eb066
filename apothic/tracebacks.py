"""Exceptions as text, whatever the user's own code in them does.

The text is fit for UTF-8: a lone surrogate in it could be neither sent nor logged.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

__all__ = ["format_error", "text_of"]


def text_of(error: BaseException) -> str:
    """Give its text, whatever its ``__str__`` does."""
    try:
        return _encodable(str(error))
    except Exception as broken:
        return f"<its __str__ raised {type(broken).__name__}>"


def format_error(error: BaseException, is_ours: Callable[[str], bool]) -> str:
    """Format an exception with causes, groups and notes, without the frames that lead to it.

    Args:
        error: the exception; those frames are taken off it.
        is_ours: tells by a frame's file whether it only leads to the user's code.
    """
    trace = error.__traceback__
    while trace is not None and is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    if trace is not None:
        error.__traceback__ = trace
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception as broken:  # a __str__, __cause__ or note of the user's may itself be broken
        head = "".join(traceback.format_tb(error.__traceback__))
        text = f"{head}{type(error).__qualname__}: <formatting raised {type(broken).__name__}>\n"
    return _encodable(text)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
