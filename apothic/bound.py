"""`BoundCls`: a class with some arguments kept."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from apothic.errors import ArgumentError
from apothic.twins import Twin, twin
from apothic.values import ClassInstanceHandle, CloseReport

if TYPE_CHECKING:
    from apothic.cls import Cls
    from apothic.instance import ClassInstance, LocalClassInstance

__all__ = ["BoundCls", "BoundClsAio"]


class BoundCls:
    """A class with some arguments kept: later ones are appended, later keywords win."""

    def __init__(self, cls: Cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep arguments; made by `Cls.partial`.

        Raises:
            ArgumentError: when no later arguments could make them fit.
        """
        self._cls = cls
        self._args = args
        self._kwargs = kwargs
        if cls.signature is not None:
            try:
                cls.signature.bind_partial(*args, **kwargs)
            except TypeError as error:
                raise ArgumentError(
                    f"{cls.name}.partial: {error}. Its signature is {cls.signature}; pass arguments "
                    f"that fit."
                ) from None

    @property
    def cls(self) -> Cls:
        """The class."""
        return self._cls

    @property
    def signature(self) -> inspect.Signature | None:
        """The constructor's signature, the kept arguments included."""
        return self._cls.signature

    @property
    def init_args(self) -> tuple[Any, ...]:
        """The kept positional arguments."""
        return self._args

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The kept keyword arguments."""
        return dict(self._kwargs)

    @property
    def aio(self) -> BoundClsAio:
        """The async twins of the verbs."""
        return BoundClsAio(self)

    def bind(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Do what `Cls.bind` does, with the kept arguments first."""
        return self._cls.bind(*self._args, *args, **{**self._kwargs, **kwargs})

    def remote(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Do what `Cls.remote` does, with the kept arguments first."""
        return self._cls.remote(*self._args, *args, **{**self._kwargs, **kwargs})

    def local(self, *args: Any, **kwargs: Any) -> LocalClassInstance:
        """Do what `Cls.local` does, with the kept arguments first."""
        return self._cls.local(*self._args, *args, **{**self._kwargs, **kwargs})

    def new(self, *args: Any, **kwargs: Any) -> ClassInstance:
        """Do what `Cls.new` does, with the kept arguments first."""
        return self._cls.new(*self._args, *args, **{**self._kwargs, **kwargs})

    def named(self, instance_id: str, *args: Any, **kwargs: Any) -> ClassInstance:
        """Do what `Cls.named` does, with the kept arguments first."""
        return self._cls.named(instance_id, *self._args, *args, **{**self._kwargs, **kwargs})

    def partial(self, *args: Any, **kwargs: Any) -> BoundCls:
        """Keep more arguments."""
        return BoundCls(self._cls, (*self._args, *args), {**self._kwargs, **kwargs})

    def close_handle(self, handle: ClassInstanceHandle | dict[str, Any] | str) -> CloseReport:
        """Do what `Cls.close_handle` does."""
        return self._cls.close_handle(handle)

    def close_named(self, instance_id: str, *args: Any, **kwargs: Any) -> CloseReport:
        """Do what `Cls.close_named` does, with the kept arguments first."""
        return self._cls.close_named(instance_id, *self._args, *args, **{**self._kwargs, **kwargs})

    def __repr__(self) -> str:
        """Name the class; arguments may be private."""
        return f"<apothic.BoundCls {self._cls._label}>"


class BoundClsAio(Twin[BoundCls]):
    """Async twins of `BoundCls`."""

    __slots__ = ()

    bind: Final = twin(BoundCls.bind)
    remote: Final = twin(BoundCls.remote)
    new: Final = twin(BoundCls.new, undo=lambda made: made.close())
    named: Final = twin(BoundCls.named)
    close_handle: Final = twin(BoundCls.close_handle)
    close_named: Final = twin(BoundCls.close_named)

    async def local(self, *args: Any, **kwargs: Any) -> LocalClassInstance:
        """Do what `BoundCls.local` does on the calling thread, and await the async hooks."""
        bound = self._target
        return await bound._cls.aio.local(*bound._args, *args, **{**bound._kwargs, **kwargs})
