"""Load a user's class from its pickle, and make its modules and source known to this process."""

from __future__ import annotations

import importlib.util
import linecache
import sys
import types
from typing import Any

__all__ = ["load_class", "share_class_identities"]


def share_class_identities() -> None:
    """Let Ray's private copy of cloudpickle and the package know the same by-value classes.

    Both mark such a class with an id and find it again by that. With one table between them, a class
    that went into the worker inside our pickle is the same class when it comes as an argument in one
    of Ray's, and the caller's own class when it goes back.
    """
    import ray.cloudpickle.cloudpickle as rays
    from cloudpickle import cloudpickle as packages

    if packages._DYNAMIC_CLASS_TRACKER_BY_CLASS is rays._DYNAMIC_CLASS_TRACKER_BY_CLASS:
        return
    # Classes that were pickled before Ray was loaded keep their ids.
    rays._DYNAMIC_CLASS_TRACKER_BY_CLASS.update(packages._DYNAMIC_CLASS_TRACKER_BY_CLASS)
    rays._DYNAMIC_CLASS_TRACKER_BY_ID.update(packages._DYNAMIC_CLASS_TRACKER_BY_ID)
    for name in (
        "_DYNAMIC_CLASS_TRACKER_BY_CLASS",
        "_DYNAMIC_CLASS_TRACKER_BY_ID",
        "_DYNAMIC_CLASS_TRACKER_LOCK",
    ):
        setattr(packages, name, getattr(rays, name))


def load_class(blob: bytes) -> type[Any]:
    """Unpickle a class that `apothic.packing.pack_class` made."""
    from apothic.packing import loads

    cls, modules, sources = loads(blob)
    for path, text in sources.items():
        # lazily checked entries (size without mtime) are kept by linecache.checkcache
        linecache.cache[path] = (len(text), None, text.splitlines(True), path)
    for name, classes in modules.items():
        if classes and name not in sys.modules:
            sys.modules[name] = _PackedModule(name, classes, next(iter(sources), None))
    found: type[Any] = cls
    return found


class _PackedModule(types.ModuleType):
    """Stands for a module of the user's: its classes are those of the pickle.

    Arguments refer to classes by module and name; looked up here they are the very classes that the
    user's methods know. Anything else comes from the real module, where this process can import it.
    """

    def __init__(self, name: str, classes: dict[str, type[Any]], path: str | None) -> None:
        super().__init__(name)
        self.__dict__.update(classes)
        # cloudpickle asks for a file to tell a user's module from an installed one.
        self.__dict__["__file__"] = path or f"<{name}.py>"

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        name = self.__name__
        real = self.__dict__.get("_apothic_real")
        if real is None:
            spec = _find_spec(name)
            if spec is None or spec.loader is None:
                raise AttributeError(
                    f"module {name!r} came along with the class, but has no {attribute!r} and "
                    f"cannot be imported here. Refer to it at module level, where it is packed, or "
                    f"bring the module with Image.add_local_python_source({name!r})."
                )
            real = importlib.util.module_from_spec(spec)
            self.__dict__["_apothic_real"] = real
            spec.loader.exec_module(real)
        return getattr(real, attribute)


def _find_spec(name: str) -> Any:
    packed = sys.modules.pop(name, None)
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    finally:
        if packed is not None:
            sys.modules[name] = packed
