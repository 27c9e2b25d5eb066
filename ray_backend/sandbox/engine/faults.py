"""Named points between two steps, at which tests interrupt."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["FaultPoint", "no_fault"]

FaultPoint = Callable[[str], None]
"""Called with the name of the step just done; what it raises interrupts there."""


def no_fault(step: str) -> None:
    """Go on."""
