"""A registry that keeps what it is told in this process, for tests without a cluster."""

from __future__ import annotations

from ray_backend.registry import Registry


class MemoryRegistry(Registry):
    """The registry over a dictionary."""

    def __init__(self) -> None:
        self.store: dict[str, bytes] = {}

    def _put(self, key: str, value: bytes, *, overwrite: bool) -> bool:
        if key in self.store and not overwrite:
            return False
        self.store[key] = value
        return True

    def _get(self, key: str) -> bytes | None:
        return self.store.get(key)

    def _exists(self, key: str) -> bool:
        return key in self.store

    def _delete(self, key: str) -> bool:
        return self.store.pop(key, None) is not None

    def _list(self, prefix: str) -> list[str]:
        return [key.removeprefix(prefix) for key in self.store if key.startswith(prefix)]
