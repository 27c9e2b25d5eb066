"""Read a user's class: its methods, hooks and signature, or why it cannot become a service."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from apothic.decorators import mark_of
from apothic.errors import ArgumentError, DefinitionError
from apothic.packing import default_text
from apothic.values import MethodInfo, MethodKind, ParameterInfo

__all__ = [
    "ClassDefinition",
    "bind_arguments",
    "describe_class",
    "parameter_infos",
    "signature_from",
]

_RESERVED_PREFIXES = ("apothic_", "__ray_", "_ray_")
_INSTANCE_VERBS = frozenset(
    {"aio", "actor", "close", "closed", "cls", "handle", "handle_json", "id", "inspect"}
)


@dataclass(frozen=True)
class ClassDefinition:
    """What a user's class says of itself."""

    methods: dict[str, MethodInfo]
    method_signatures: dict[str, inspect.Signature]
    enter_hooks: tuple[str, ...]
    exit_hooks: tuple[str, ...]
    signature: inspect.Signature
    doc: str | None


def describe_class(cls: type[Any]) -> ClassDefinition:
    """Read the marks of ``cls`` and of its bases.

    Raises:
        DefinitionError: when a mark stands where it cannot work, or no method is marked.
    """
    if not inspect.isclass(cls):
        raise DefinitionError(
            f"@app.cls stands on {cls!r}, which is a {type(cls).__name__}: it takes a class."
        )
    methods: dict[str, MethodInfo] = {}
    signatures: dict[str, inspect.Signature] = {}
    enter: list[str] = []
    exits: list[str] = []
    for name, function in _marked_functions(cls):
        mark = mark_of(function)
        assert mark is not None  # _marked_functions yields nothing else
        if mark.kind == "method":
            _check_method_name(cls, name)
            signature = _without_self(cls, name, function)
            signatures[name] = signature
            methods[name] = MethodInfo(
                name=name,
                kind=_kind_of(function),
                parameters=parameter_infos(signature),
                tags=mark.tags,
                metadata=mark.metadata,
                doc=inspect.getdoc(function),
            )
            continue
        _check_hook(cls, name, function, mark.kind)
        (enter if mark.kind == "enter" else exits).append(name)
    if not methods:
        raise DefinitionError(
            f"class {cls.__qualname__} has no remote method: mark at least one with @method()."
        )
    own_doc = vars(cls).get("__doc__")
    doc = inspect.cleandoc(own_doc) if own_doc else None
    return ClassDefinition(
        methods, signatures, tuple(enter), tuple(exits), _constructor_signature(cls), doc
    )


def _marked_functions(cls: type[Any]) -> list[tuple[str, Any]]:
    """List marked functions in definition order, base classes first, overrides in place.

    An override without a mark keeps the mark of what it overrides: a subclass that refines a
    method should not lose it from the service.
    """
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, value in sorted(vars(base).items(), key=_definition_order):
            inner = getattr(value, "__func__", None) or getattr(value, "fget", None)
            if inner is not None and mark_of(inner) is not None:
                raise DefinitionError(
                    f"{base.__qualname__}.{name} is a {type(value).__name__} and marked with "
                    f"@{_mark_kind(inner)}: an instance runs it with its own state. "
                    f"Make it a plain method with `self`."
                )
            if inspect.isfunction(value) and mark_of(value) is not None:
                found[name] = value
            elif name in found:
                inherited = mark_of(found[name])
                if inspect.isfunction(value) and inherited is not None:
                    value.__apothic_mark__ = inherited  # type: ignore[attr-defined]
                    found[name] = value
                else:
                    del found[name]
    return list(found.items())


def _definition_order(item: tuple[str, object]) -> int:
    mark = mark_of(item[1])
    return -1 if mark is None else mark.order


def _mark_kind(function: object) -> str:
    mark = mark_of(function)
    return mark.kind if mark is not None else "?"


def _check_method_name(cls: type[Any], name: str) -> None:
    if name.startswith(_RESERVED_PREFIXES) or name in _INSTANCE_VERBS:
        raise DefinitionError(
            f"method name {name!r} of {cls.__qualname__} is taken by this package: it belongs to "
            f"every instance or to the engine. Rename the method."
        )
    if name.startswith("__") and name != "__call__":
        raise DefinitionError(
            f"{cls.__qualname__}.{name} is a special method: Python calls it on the object itself, "
            f"not from afar. Only __call__ can be remote; give others a plain name."
        )
    if name.startswith("_") and name != "__call__":
        raise DefinitionError(
            f"{cls.__qualname__}.{name} is marked @method() and private by its name: an instance "
            f"gives no name with a leading '_' to callers. Take the '_' or the mark away."
        )


def _kind_of(function: Any) -> MethodKind:
    inner = inspect.unwrap(function)
    if inspect.isasyncgenfunction(inner):
        return "async_generator"
    if inspect.iscoroutinefunction(inner):
        return "async"
    if inspect.isgeneratorfunction(inner):
        return "generator"
    return "sync"


def _without_self(cls: type[Any], name: str, function: Any) -> inspect.Signature:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameters and parameters[0].kind in positional:
        return signature.replace(parameters=parameters[1:])
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return signature
    raise DefinitionError(
        f"{cls.__qualname__}.{name}{signature} has no first parameter for the instance. Add `self`."
    )


def _check_hook(cls: type[Any], name: str, function: Any, kind: str) -> None:
    signature = _without_self(cls, name, function)
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise DefinitionError(
            f"@{kind} hook {cls.__qualname__}.{name} needs {', '.join(needed)}: hooks are called "
            f"with `self` alone. Give defaults, or take the values in the constructor."
        )
    if _kind_of(function) in ("generator", "async_generator"):
        raise DefinitionError(
            f"@{kind} hook {cls.__qualname__}.{name} yields: nobody would iterate over it. "
            f"Split it into an enter hook and an exit hook."
        )


def _constructor_signature(cls: type[Any]) -> inspect.Signature:
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        # Some C types have none; anything may be passed and the class itself decides.
        any_args = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
        any_kwargs = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        return inspect.Signature([any_args, any_kwargs])
    return signature.replace(return_annotation=inspect.Signature.empty)


class _Text(str):
    """A default or annotation of a class whose code is elsewhere: its text, printed as in the code."""

    def __repr__(self) -> str:
        return str(self)


def parameter_infos(signature: inspect.Signature) -> tuple[ParameterInfo, ...]:
    """Write a signature down as text."""
    return tuple(
        ParameterInfo(
            name=parameter.name,
            kind=parameter.kind.name,
            default=None if parameter.default is parameter.empty else default_text(parameter),
            annotation=None
            if parameter.annotation is parameter.empty
            else _annotation_text(parameter.annotation),
        )
        for parameter in signature.parameters.values()
    )


def _annotation_text(annotation: object) -> str:
    if isinstance(annotation, str):
        return annotation
    return inspect.formatannotation(annotation)


def signature_from(parameters: tuple[ParameterInfo, ...]) -> inspect.Signature:
    """Make the signature again from its text; defaults and annotations stay texts that print."""
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            inspect.Parameter(
                info.name,
                getattr(kinds, info.kind),
                default=kinds.empty if info.default is None else _Text(info.default),
                annotation=kinds.empty if info.annotation is None else _Text(info.annotation),
            )
            for info in parameters
        ]
    )


def bind_arguments(
    owner: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """Fit arguments to a signature.

    Raises:
        ArgumentError: when they do not fit; the message shows the signature.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"{owner}: {error}. Its signature is {signature}; pass arguments that fit."
        ) from None
