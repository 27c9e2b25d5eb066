"""Pickle a user's class by value, so that a worker needs none of the user's own modules.

The user's modules are those that no installation provides: not the standard library, not
``site-packages``, not this project. Their classes and functions travel inside the pickle; installed
packages are imported by the worker. Pickling is reproducible: the same code gives the same bytes in
every process, which makes redeploying idempotent and keeps a class's identity on its way back.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import linecache
import pickle
import site
import sys
import sysconfig
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as internals

from apothic.errors import SerializationError
from apothic.tracebacks import text_of

__all__ = [
    "arguments_digest",
    "default_text",
    "dumps",
    "loads",
    "local_modules",
    "pack_class",
    "sources_of",
]

_OURS = ("apothic", "ray_backend")


def pack_class(cls: type[Any]) -> bytes:
    """Pickle a class with the classes of the user's modules that it draws on.

    Returns:
        A pickle of ``(cls, {module: {name: class}}, {file: source})``. The second lets the worker
        resolve references to the user's modules to these very classes; the third lets tracebacks
        show source lines that the worker has no file for.

    Raises:
        SerializationError: when something that the class refers to cannot be pickled.
    """
    modules = _reachable_modules(cls)
    sources = sources_of(modules)
    classes = {name: _classes_of(name) for name in sorted(modules)}
    try:
        return dumps((cls, classes, sources), reproducibly=True)
    except SerializationError:
        # A class of the module that nobody needs may be the one that cannot be pickled.
        return dumps((cls, {}, sources), reproducibly=True)


def dumps(value: object, *, by_value: bool = True, reproducibly: bool = False) -> bytes:
    """Pickle ``value``, the user's modules by value.

    Args:
        value: anything.
        by_value: whether the user's modules are.
        reproducibly: equal content gives equal bytes in every process; slower for large containers.

    Raises:
        SerializationError: naming the type, the reason and what to do.
    """
    registered = _register(local_modules()) if by_value else []
    try:
        buffer = io.BytesIO()
        if reproducibly:
            with contextlib.suppress(RecursionError):  # C goes deeper than Python
                _SamePickler(buffer).dump(value)
                return buffer.getvalue()
            buffer = io.BytesIO()
        _Pickler(buffer).dump(value)
        return buffer.getvalue()
    except Exception as error:
        raise SerializationError(
            f"{_describe(value)} cannot travel to the worker: {type(error).__name__}: {text_of(error)}. "
            f"Locks, files, sockets and connections stay in their process: make them in an enter "
            f"hook, not at module level or in arguments."
        ) from error
    finally:
        _unregister(registered)


_registrations: Counter[str] = Counter()
_registering = threading.Lock()


def _register(names: list[str]) -> list[types.ModuleType]:
    """Have modules pickled by value; several threads may want the same one at the same time."""
    modules = [sys.modules[name] for name in names if name in sys.modules]
    with _registering:
        # What the user registered stays registered.
        foreign = internals.list_registry_pickle_by_value() - set(_registrations)
        modules = [module for module in modules if module.__name__ not in foreign]
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
            _registrations[module.__name__] += 1
    return modules


def _unregister(modules: list[types.ModuleType]) -> None:
    with _registering:
        for module in modules:
            _registrations[module.__name__] -= 1
            if not _registrations[module.__name__]:
                del _registrations[module.__name__]
                cloudpickle.unregister_pickle_by_value(module)


def local_modules() -> list[str]:
    """List the loaded modules that no installation provides, ``__main__`` left out.

    ``__main__`` needs no registration: cloudpickle takes it by value always.
    """
    found = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OURS or name in ("__main__", "__mp_main__"):
            continue
        path = getattr(module, "__file__", None)
        # An alias under another name cannot be registered, and need not be.
        plain = getattr(module, "__name__", None) == name
        if plain and isinstance(path, str) and path.endswith(".py") and not _installed(path):
            found.append(name)
    return found


def _installation_roots() -> tuple[str, ...]:
    paths = set(sysconfig.get_paths().values())
    paths.update(site.getsitepackages() if hasattr(site, "getsitepackages") else [])
    paths.add(site.getusersitepackages() if hasattr(site, "getusersitepackages") else "")
    paths.add(sysconfig.get_paths(vars={"base": sys.base_prefix})["stdlib"])
    # Scripts and data directories may be plain prefixes such as /usr: only library ones count.
    keys = ("python3", "site-packages", "dist-packages")
    return tuple(str(Path(p).resolve()) for p in paths if p and any(k in p for k in keys))


_ROOTS = _installation_roots()
_INSTALLED: dict[str, bool] = {}


def _installed(path: str) -> bool:
    known = _INSTALLED.get(path)
    if known is None:
        resolved = str(Path(path).resolve())
        known = _INSTALLED[path] = (
            resolved.startswith(tuple(root + "/" for root in _ROOTS))
            or "/site-packages/" in resolved
            or "/dist-packages/" in resolved
        )
    return known


def _reachable_modules(cls: type[Any]) -> set[str]:
    """Name the user's modules that the class's module refers to, directly or through others."""
    local = {*local_modules(), "__main__"}
    pending = [base.__module__ for base in cls.__mro__ if base.__module__ in local]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name in found or name not in sys.modules:
            continue
        found.add(name)
        for value in list(vars(sys.modules[name]).values()):
            origin = value.__name__ if isinstance(value, types.ModuleType) else None
            if isinstance(value, (type, types.FunctionType)):
                origin = value.__module__
            if origin in local and origin not in found:
                pending.append(origin)
    return found


def _classes_of(module: str) -> dict[str, type[Any]]:
    if module == "__main__":  # identity across __main__ is kept by the trackers, see _Pickler
        return {}
    return {
        name: value
        for name, value in vars(sys.modules[module]).items()
        if isinstance(value, type) and value.__module__ == module and value.__qualname__ == name
    }


def sources_of(modules: Iterable[str]) -> dict[str, str]:
    """Read the source text of modules by file name, where there is one."""
    sources: dict[str, str] = {}
    for name in modules:
        path = getattr(sys.modules.get(name), "__file__", None)
        if isinstance(path, str):
            lines = linecache.getlines(path)
            if lines:
                sources[path] = "".join(lines)
    return dict(sorted(sources.items()))


def _describe(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], type):
        value = value[0]
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    return f"a value of type {type(value).__module__}.{type(value).__qualname__}"


class _ByValue:
    """What cloudpickle would do otherwise: class identities, exceptions with odd constructors.

    cloudpickle marks a class that it pickles by value with a random id, by which the same class is
    found again when it comes back. Here the id follows from the class's place and source, so that
    equal code is the same class to every process that has it.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            _pin_class_id(obj)
        elif isinstance(obj, BaseException) and _plain_reduce(type(obj)):
            # OSError and some others have more to keep than the arguments that they pass on.
            reduced: Any = obj.__reduce__()
            state = dict(reduced[2]) if len(reduced) > 2 else {}
            fields = {name: state[name] for name in state.keys() - obj.__dict__.keys()}
            return _rebuild_exception, (type(obj), reduced[1], dict(obj.__dict__), fields)
        reduced = internals.Pickler.reducer_override(self, obj)
        if isinstance(reduced, tuple) and reduced[-1] is internals._class_setstate:
            # This process has the class whole: it comes back to what it was, see _fill_class.
            _whole_classes.add(obj)
            members = reduced[2][0]
            members.pop("__slotnames__", None)  # noted by copyreg once an instance was pickled
            if obj.__qualname__ != obj.__name__:  # it would be lost, and errors are known by it
                members["__qualname__"] = obj.__qualname__
            return (*reduced[:-1], _fill_class)
        return reduced


class _Pickler(_ByValue, cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """The fast one, in C."""


class _SamePickler(_ByValue, pickle._Pickler):
    """Gives equal bytes for equal content in every process. In Python, so only for what is compared.

    The order of sets is random per process, and C's pickler asks nobody about them. Which equal
    strings are one object varies, too, so that no string is referred back to.
    """

    dispatch_table = internals.Pickler.dispatch_table
    _function_reduce = internals.Pickler._function_reduce
    _dynamic_function_reduce = internals.Pickler._dynamic_function_reduce
    _function_getnewargs = internals.Pickler._function_getnewargs

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=internals.DEFAULT_PROTOCOL)
        self.globals_ref: dict[int, dict[str, Any]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is set and obj:  # filled after it is known: it may hold what refers to it
            return set, (), sorted(obj, key=_sort_key), None, None, set.update
        if type(obj) is frozenset and obj:
            return frozenset, (sorted(obj, key=_sort_key),)
        return super().reducer_override(obj)

    def memoize(self, obj: Any) -> None:
        if type(obj) not in (str, bytes):
            super().memoize(obj)  # type: ignore[misc]  # typeshed does not show it


def _sort_key(item: object) -> str:
    if isinstance(item, (tuple, frozenset)):
        keys = map(_sort_key, item)
        return f"{type(item)}{list(keys) if isinstance(item, tuple) else sorted(keys)}"
    text = repr(item)
    # An address says nothing; such items keep the order that they have.
    return f"{type(item)}" if " at 0x" in text else f"{type(item)}{text}"


_whole_classes: weakref.WeakSet[type[Any]] = weakref.WeakSet()


def _fill_class(cls: type[Any], state: Any) -> type[Any]:
    """Give a class that came along its members, unless this process has it already.

    cloudpickle would replace the members of the caller's own class whenever an instance or exception
    of it came back: its functions would then see copies of their module's globals.
    """
    if cls not in _whole_classes:
        internals._class_setstate(cls, state)
        _whole_classes.add(cls)
    return cls


def _pin_class_id(cls: type[Any]) -> None:
    if cls.__module__ in ("builtins", None) or cls in internals._DYNAMIC_CLASS_TRACKER_BY_CLASS:
        return
    if cls.__module__ not in ("__main__", *internals.list_registry_pickle_by_value()):
        return
    with internals._DYNAMIC_CLASS_TRACKER_LOCK:
        base = hashlib.sha256(
            f"{cls.__module__}\0{cls.__qualname__}\0{_source_or_names(cls)}".encode()
        ).hexdigest()[:32]
        number = 0
        # A factory makes several classes with one source: they are told apart by order.
        while internals._DYNAMIC_CLASS_TRACKER_BY_ID.get(f"{base}{number}", cls) is not cls:
            number += 1
        internals._DYNAMIC_CLASS_TRACKER_BY_CLASS[cls] = f"{base}{number}"
        internals._DYNAMIC_CLASS_TRACKER_BY_ID[f"{base}{number}"] = cls


def _source_or_names(cls: type[Any]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return repr(sorted(vars(cls)))


def _plain_reduce(cls: type[BaseException]) -> bool:
    """Whether exceptions of this class leave pickling to the builtin that they derive from."""
    reduces = next(base for base in cls.__mro__ if "__reduce__" in vars(base))
    return (
        reduces.__module__ == "builtins"
        and cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__module__ != "builtins"
    )


def _rebuild_exception(
    cls: type[BaseException],
    args: tuple[Any, ...],
    state: dict[str, Any],
    fields: dict[str, Any],
) -> BaseException:
    """Make an exception again without its own ``__init__``, whose parameters may be others."""
    error = cls.__new__(cls, *args)
    for base in cls.__mro__:
        if base.__module__ == "builtins":
            try:
                # C-level fields, such as UnicodeDecodeError's, are set by the builtin constructor.
                base.__init__(error, *args)  # type: ignore[misc]
            except TypeError:
                error.args = args
            break
    error.__dict__.update(state)
    if fields:
        BaseException.__setstate__(
            error, fields
        )  # kept outside __dict__, for instance ImportError.name
    return error


def loads(data: bytes) -> Any:
    """Unpickle what `dumps` made."""
    return pickle.loads(data)


def arguments_digest(arguments: inspect.BoundArguments) -> str:
    """Name constructor arguments: equal ones have equal digests in every process.

    Defaults count as given. A process that looked the class up knows them by their text only, so
    that is what counts where it is no literal. Containers are compared by content whatever their
    order of insertion; other objects by their pickles.

    Raises:
        SerializationError: when an argument cannot be pickled.
    """
    digest = hashlib.sha256()
    for name, parameter in arguments.signature.parameters.items():
        if name in arguments.arguments:
            content = _canonical(arguments.arguments[name])
        elif parameter.default is parameter.empty:
            continue  # no more positional or keyword arguments
        else:
            content = _canonical_default(default_text(parameter))
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def default_text(parameter: inspect.Parameter) -> str:
    """Write a parameter's default down: its ``repr``, the same in every process."""
    # An address in a default repr would make each process's spec differ; the type says enough.
    text = repr(parameter.default)
    return f"<{type(parameter.default).__qualname__}>" if " at 0x" in text else text


def _canonical_default(text: str) -> bytes:
    try:
        return _canonical(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return b"default:" + text.encode()


def _canonical(value: object) -> bytes:
    kind = type(value)
    if kind in (bool, int, str, bytes, type(None)):
        return f"{kind.__name__}:{value!r}".encode()
    if kind is float:
        return f"float:{float(value).hex()}".encode()  # type: ignore[arg-type]  # checked by kind
    if kind in (list, tuple):
        parts = [_canonical(item) for item in value]  # type: ignore[attr-defined]
    elif kind in (set, frozenset):
        parts = sorted(_canonical(item) for item in value)  # type: ignore[attr-defined]
    elif kind is dict:
        items = value.items()  # type: ignore[attr-defined]
        parts = sorted(_canonical(key) + b"=" + _canonical(item) for key, item in items)
    else:
        parts = [dumps(value, reproducibly=True)]
    # The lengths keep ["ab"] and ["a", "b"] apart.
    return kind.__name__.encode() + b"[" + b",".join(b"%d:%s" % (len(p), p) for p in parts) + b"]"
