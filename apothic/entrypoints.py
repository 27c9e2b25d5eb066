"""`Entrypoints`: the local programs of an app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from apothic.errors import ConflictError, DefinitionError, NotFoundError
from apothic.names import check_name

__all__ = ["Entrypoints"]

_F = TypeVar("_F", bound=Callable[..., Any])


class Entrypoints:
    """Functions by name."""

    def __init__(self, app_name: str) -> None:
        """Start with none."""
        self._app_name = app_name
        self._functions: dict[str, Callable[..., Any]] = {}

    @property
    def all(self) -> dict[str, Callable[..., Any]]:
        """The functions by name."""
        return dict(self._functions)

    def decorator(self, name: str | None) -> Callable[[_F], _F]:
        """Give a decorator that adds a function under a name, its own by default.

        Raises:
            InvalidOptionError: when the name is not valid.
            ConflictError: when there is another of this name.
        """
        if name is not None:
            check_name("entry point", name)

        def decorate(function: _F) -> _F:
            if not callable(function):
                raise DefinitionError(
                    f"@app.local_entrypoint() stands on {function!r}, which cannot be called."
                )
            entry = check_name("entry point", name or function.__name__)
            known = self._functions.get(entry)
            if known is not None and known.__qualname__ != function.__qualname__:
                raise ConflictError(
                    f"app {self._app_name!r} has an entry point {entry!r} already. Name one of them "
                    f"with @app.local_entrypoint(name=…)."
                )
            self._functions[entry] = function
            return function

        return decorate

    def get(self, name: str | None) -> Callable[..., Any]:
        """Give one; without a name the only one.

        Raises:
            NotFoundError: when there is none of this name, or the name is needed.
        """
        known = ", ".join(self._functions) or "none"
        if name is None:
            if len(self._functions) == 1:
                return next(iter(self._functions.values()))
            raise NotFoundError(
                f"app {self._app_name!r} has {len(self._functions)} entry points ({known}): name the "
                f"one that is meant."
            )
        if name not in self._functions:
            raise NotFoundError(
                f"app {self._app_name!r} has no entry point {name!r}: it has {known}. Check the name."
            )
        return self._functions[name]
