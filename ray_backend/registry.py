"""The registry: what the cluster remembers, in the key-value store of Ray's GCS.

Every use of Ray's internal store is in this module, behind names of ours. Putting if absent is atomic
there. Values live as long as the GCS does; with an external Redis they survive the head node.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ray.experimental import internal_kv as kv

from ray_backend.names import NAMESPACE

__all__ = ["Registry", "StartRecord"]

_NAMESPACE = NAMESPACE.encode()
_WORD_S = 3600.0
_NO_ENGINE_S = 60.0
"""Seconds after which a node without a Docker engine may be tried again: it may have one by now."""


class StartRecord(NamedTuple):
    """How the starts of an instance's processes went.

    Attributes:
        begun: starts since it was last ready.
        was_ready: it has been ready once.
        node_id: where that was; for sandbox sessions only.
    """

    begun: int
    was_ready: bool
    node_id: str = ""


class Registry:
    """Typed access to the store, from any process that is connected to Ray."""

    # -- cluster ---------------------------------------------------------------------------------

    def cluster_id(self) -> str:
        """Name the cluster; the first to ask decides."""
        self._put("cluster", uuid.uuid4().hex.encode(), overwrite=False)
        found = self._get("cluster")
        assert found is not None  # it was put just now
        return found.decode()

    # -- blobs -----------------------------------------------------------------------------------

    def put_blob(self, digest: str, content: bytes) -> None:
        """Store content under its digest."""
        self._put(f"blob/{digest}", content, overwrite=False)

    def has_blob(self, digest: str) -> bool:
        """Tell whether content is stored."""
        return self._exists(f"blob/{digest}")

    def get_blob(self, digest: str) -> bytes | None:
        """Give stored content."""
        return self._get(f"blob/{digest}")

    def delete_blob(self, digest: str) -> None:
        """Remove content."""
        self._delete(f"blob/{digest}")

    def list_blobs(self) -> list[str]:
        """Name the stored contents."""
        return self._list("blob/")

    @staticmethod
    def arguments_key(actor_name: str, digest: str) -> str:
        """Give the key under which an instance's large constructor arguments are a blob.

        With their digest: two may try to make an instance of one name, each with its own arguments.
        """
        return f"arguments/{actor_name}/{digest}"

    # -- specs and apps --------------------------------------------------------------------------

    def put_spec(self, digest: str, spec: str) -> None:
        """Store a class spec, as JSON, under its digest."""
        self._put(f"spec/{digest}", spec.encode(), overwrite=False)

    def get_spec(self, digest: str) -> str | None:
        """Give a class spec as JSON."""
        found = self._get(f"spec/{digest}")
        return None if found is None else found.decode()

    def list_specs(self) -> list[str]:
        """Name the stored specs."""
        return self._list("spec/")

    def delete_spec(self, digest: str) -> None:
        """Remove a class spec."""
        self._delete(f"spec/{digest}")

    def put_app(self, name: str, manifest: str) -> None:
        """Store an app's manifest, as JSON."""
        self._put(f"app/{name}", manifest.encode(), overwrite=True)

    def get_app(self, name: str) -> str | None:
        """Give an app's manifest as JSON."""
        found = self._get(f"app/{name}")
        return None if found is None else found.decode()

    def list_apps(self) -> list[str]:
        """Name the deployed apps."""
        return sorted(self._list("app/"))

    # -- what nothing refers to any more -----------------------------------------------------------

    def unused_specs(self, leases: Iterable[Mapping[str, Any]]) -> set[str]:
        """Name the specs that neither an app nor a lease refers to."""
        used = {str(lease.get("spec_digest")) for lease in leases}
        for app in self.list_apps():
            used.update(json.loads(self.get_app(app) or "{}").get("spec_digests", ()))
        return set(self.list_specs()) - used

    def sweep_blobs(self, unused_before: set[str]) -> set[str]:
        """Remove the contents that were unused at the last sweep and are still.

        Returns:
            What is unused now, for the next sweep.
        """
        used: set[str] = set()
        for digest in self.list_specs():
            spec = json.loads(self.get_spec(digest) or "{}")
            used.add(str(spec.get("blob_digest")))
            image = (spec.get("options") or {}).get("image") or {}
            used.update(str(step.get("digest")) for step in image.get("steps", ()))
        leases = set(self.list_leases())
        unused = {
            key
            for key in self.list_blobs()
            if key not in used and key.removeprefix("arguments/").partition("/")[0] not in leases
        }
        for key in unused & unused_before:
            self.delete_blob(key)
        return unused - unused_before

    # -- secrets ---------------------------------------------------------------------------------

    def put_secret(self, name: str, variables: Mapping[str, str], *, overwrite: bool) -> bool:
        """Store a secret's variables; False when it exists and is not to be replaced."""
        content = json.dumps(dict(variables)).encode()
        return self._put(f"secret/{name}", content, overwrite=overwrite)

    def get_secret(self, name: str) -> dict[str, str] | None:
        """Give a secret's variables."""
        found = self._get_json(f"secret/{name}")
        return None if found is None else dict(found)

    def list_secrets(self) -> list[str]:
        """Name the stored secrets."""
        return sorted(self._list("secret/"))

    def delete_secret(self, name: str) -> bool:
        """Remove a secret; False when there is none."""
        return self._delete(f"secret/{name}")

    # -- volumes ---------------------------------------------------------------------------------

    def put_volume(self, name: str, record: Mapping[str, Any]) -> bool:
        """Record a volume; False when it is recorded already."""
        return self._put(f"volume/{name}", json.dumps(dict(record)).encode(), overwrite=False)

    def get_volume(self, name: str) -> dict[str, Any] | None:
        """Give a volume's record."""
        return self._get_json(f"volume/{name}")

    def list_volumes(self) -> list[str]:
        """Name the recorded volumes."""
        return sorted(self._list("volume/"))

    def delete_volume(self, name: str) -> bool:
        """Remove a volume's record and its tie to a node."""
        self._delete(f"volume-node/{name}")
        return self._delete(f"volume/{name}")

    def pin_volume(self, name: str, node_id: str) -> str:
        """Tie a host-local volume to the node that uses it first; give the node it is tied to."""
        self._put(f"volume-node/{name}", node_id.encode(), overwrite=False)
        return self.volume_node(name) or node_id

    def volume_node(self, name: str) -> str | None:
        """Give the node that a host-local volume is tied to."""
        found = self._get(f"volume-node/{name}")
        return None if found is None else found.decode()

    # -- node types that the autoscaler could start -----------------------------------------------

    def put_node_type(self, name: str, record: str) -> None:
        """Store a node type, as JSON."""
        self._put(f"node-type/{name}", record.encode(), overwrite=True)
        self._node_types_changed()

    def get_node_type(self, name: str) -> str | None:
        """Give a node type as JSON."""
        found = self._get(f"node-type/{name}")
        return None if found is None else found.decode()

    def list_node_types(self) -> list[str]:
        """Name the stored node types."""
        return sorted(self._list("node-type/"))

    def delete_node_type(self, name: str) -> bool:
        """Remove a node type; False when there is none."""
        found = self._delete(f"node-type/{name}")
        self._node_types_changed()
        return found

    def node_types_version(self) -> str:
        """Give a word that is another one after each change; empty before the first."""
        return (self._get("node-types-version") or b"").decode()

    def _node_types_changed(self) -> None:
        self._put("node-types-version", uuid.uuid4().hex.encode(), overwrite=True)

    # -- leases ----------------------------------------------------------------------------------

    def put_lease(self, actor_name: str, record: Mapping[str, Any]) -> None:
        """Write an instance's lease."""
        self._put(f"lease/{actor_name}", json.dumps(dict(record)).encode(), overwrite=True)

    def get_lease(self, actor_name: str) -> dict[str, Any] | None:
        """Give an instance's lease."""
        return self._get_json(f"lease/{actor_name}")

    def list_leases(self) -> list[str]:
        """Name the instances that have a lease."""
        return self._list("lease/")

    def forget_lease(self, actor_name: str) -> None:
        """Remove an instance's lease and what was stored for it alone."""
        self._delete(f"lease/{actor_name}")
        arguments = self.arguments_key(actor_name, "")
        for digest in self._list(f"blob/{arguments}"):
            self.delete_blob(f"{arguments}{digest}")
        self.delete_revival(actor_name)
        self._delete(f"replaced/{actor_name}")
        self._delete(f"start/{actor_name}")

    # -- where sandbox sessions are ----------------------------------------------------------------

    def take_seat(self, node_id: str, actor_name: str) -> bool:
        """Note that a session is about to make things on a node; True for the first ever there."""
        self._put(f"sandbox-seat/{node_id}/{actor_name}", b"1", overwrite=True)
        return self._put(f"sandbox-node/{node_id}", b"1", overwrite=False)

    def leave_seat(self, node_id: str, actor_name: str) -> None:
        """Note that nothing of a session is on a node any more."""
        self._delete(f"sandbox-seat/{node_id}/{actor_name}")

    def list_seats(self) -> dict[str, set[str]]:
        """Name the sessions that may have something on a node, by node id."""
        found: dict[str, set[str]] = {}
        for key in self._list("sandbox-seat/"):
            node_id, _, actor_name = key.partition("/")
            found.setdefault(node_id, set()).add(actor_name)
        return found

    def list_seen_nodes(self) -> list[str]:
        """Name the nodes on which a session ever was."""
        return self._list("sandbox-node/")

    def forget_node(self, node_id: str) -> None:
        """Forget a node that has left the cluster, with the seats on it."""
        for actor_name in self.list_seats().get(node_id, ()):
            self.leave_seat(node_id, actor_name)
        self._delete(f"sandbox-node/{node_id}")
        self._delete(f"no-engine/{node_id}")

    def note_no_engine(self, node_id: str) -> None:
        """Note that a session found no Docker engine on a node."""
        self._put(f"no-engine/{node_id}", str(time.time()).encode(), overwrite=True)

    def nodes_without_engine(self) -> set[str]:
        """Name the nodes that had no Docker engine less than `_NO_ENGINE_S` ago."""
        found = set()
        for node_id in self._list("no-engine/"):
            noted = self._get(f"no-engine/{node_id}")
            if noted is not None and time.time() - float(noted) < _NO_ENGINE_S:
                found.add(node_id)
        return found

    # -- starts ----------------------------------------------------------------------------------

    def note_start(self, actor_name: str) -> None:
        """Count a start that begins."""
        found = self.start_record(actor_name)
        self._put_start(actor_name, found._replace(begun=found.begun + 1))

    def note_ready(self, actor_name: str, node_id: str = "") -> None:
        """Note that the start has come to its end, and on which node."""
        self._put_start(actor_name, StartRecord(0, was_ready=True, node_id=node_id))

    def start_record(self, actor_name: str) -> StartRecord:
        """Tell how an instance's starts went."""
        found = self._get_json(f"start/{actor_name}")
        return StartRecord(0, was_ready=False) if found is None else StartRecord(**found)

    def _put_start(self, actor_name: str, record: StartRecord) -> None:
        content = json.dumps(record._asdict()).encode()
        self._put(f"start/{actor_name}", content, overwrite=True)

    def put_revival(self, actor_name: str, record: bytes) -> None:
        """Store what it takes to make a named instance again on another node."""
        self._put(f"revival/{actor_name}", record, overwrite=True)

    def get_revival(self, actor_name: str) -> bytes | None:
        """Give what it takes to make a named instance again."""
        return self._get(f"revival/{actor_name}")

    def delete_revival(self, actor_name: str) -> None:
        """Forget what it takes to make a named instance again."""
        self._delete(f"revival/{actor_name}")

    def list_revivals(self) -> list[str]:
        """Name the instances that can be made again."""
        return self._list("revival/")

    # -- words left by a process for its callers and its successor ---------------------------------

    def put_timeout(self, task_id: str, text: str) -> None:
        """Leave word for the caller of a call whose process is about to be replaced."""
        record = {"text": text, "unix_s": time.time()}
        self._put(f"timeout/{task_id}", json.dumps(record).encode(), overwrite=True)

    def take_timeout(self, task_id: str) -> str | None:
        """Read and remove the word on a call."""
        found = self._get_json(f"timeout/{task_id}")
        if found is None:
            return None
        self._delete(f"timeout/{task_id}")
        return str(found["text"])

    def mark_moved(self, actor_id: str) -> None:
        """Note that an actor was removed so that another takes its instance over."""
        record = {"unix_s": time.time()}
        self._put(f"moved/{actor_id}", json.dumps(record).encode(), overwrite=True)

    def was_moved(self, actor_id: str) -> bool:
        """Tell whether another actor took over, or is about to."""
        return self._exists(f"moved/{actor_id}")

    def sweep_words(self) -> None:
        """Remove words that no caller came for within an hour."""
        for kind in ("timeout/", "moved/"):
            for key in self._list(kind):
                found = self._get_json(kind + key)
                if found is not None and time.time() - found["unix_s"] > _WORD_S:
                    self._delete(kind + key)

    def mark_replaced(self, actor_name: str) -> None:
        """Note that the next restart of an actor is wanted."""
        self._put(f"replaced/{actor_name}", b"1", overwrite=True)

    def take_replaced(self, actor_name: str) -> bool:
        """Tell whether this restart was wanted, and forget it."""
        return self._delete(f"replaced/{actor_name}")

    # -- the store -------------------------------------------------------------------------------

    def _put(self, key: str, value: bytes, *, overwrite: bool) -> bool:
        """Write; True when the key is new or was to be overwritten."""
        existed = kv._internal_kv_put(
            key.encode(), value, overwrite=overwrite, namespace=_NAMESPACE
        )
        return overwrite or not existed

    def _get(self, key: str) -> bytes | None:
        found: bytes | None = kv._internal_kv_get(key.encode(), namespace=_NAMESPACE)
        return found

    def _exists(self, key: str) -> bool:
        return bool(kv._internal_kv_exists(key.encode(), namespace=_NAMESPACE))

    def _get_json(self, key: str) -> dict[str, Any] | None:
        found = self._get(key)
        return None if found is None else dict(json.loads(found))

    def _delete(self, key: str) -> bool:
        return bool(kv._internal_kv_del(key.encode(), namespace=_NAMESPACE))

    def _list(self, prefix: str) -> list[str]:
        keys = kv._internal_kv_list(prefix.encode(), namespace=_NAMESPACE)
        return [key.decode()[len(prefix) :] for key in keys]
