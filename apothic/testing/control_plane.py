"""`FakeControlPlane`: the seam, in this process."""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from apothic.backend import (
    ControlPlaneClient,
    InstanceRef,
    SandboxRef,
    SandboxRequest,
    StartRequest,
)
from apothic.errors import (
    AppNotFoundError,
    ConnectionFailedError,
    InstanceNotFoundError,
    VolumeNotFoundError,
)
from apothic.options import ClassOptions
from apothic.packing import loads
from apothic.sandbox_values import SandboxHandle, SandboxSessionInfo, SandboxSpec
from apothic.testing.instance import FakeInstance
from apothic.testing.process import SetUpError
from apothic.testing.running import Watch, interruptible_sleep
from apothic.testing.sandboxes import InProcessSandboxes
from apothic.testing.surroundings import Surroundings
from apothic.values import (
    AppManifest,
    ClassInstanceHandle,
    ClassSpec,
    InstanceInfo,
)
from apothic.volume import StorageMount, check_same_volume

__all__ = ["FakeControlPlane"]

_Key = tuple[str, str, str]


class FakeControlPlane(ControlPlaneClient):
    """An engine in this process. `fake_engine` makes one and puts it in place."""

    def __init__(self) -> None:
        """Start with nothing stored; call `disconnect` at the end."""
        self._cluster_id = f"fake-{uuid.uuid4().hex}"
        self._lock = threading.RLock()
        self._instances: dict[_Key, FakeInstance] = {}
        self._apps: dict[str, AppManifest] = {}
        self._specs: dict[str, ClassSpec] = {}
        self._blobs: dict[str, bytes] = {}
        self._secrets: dict[str, dict[str, str]] = {}
        self._volumes: dict[str, StorageMount] = {}
        self._directory: str | None = None
        self._surroundings = Surroundings()
        self._closed = False
        self._sandboxes = InProcessSandboxes(self._cluster_id, self._prepare)
        self.watch: Watch = Watch()
        self._sandboxes = InProcessSandboxes(self._cluster_id, self._prepare)
        interruptible_sleep(True)

    @property
    def cluster_id(self) -> str:
        """Name the engine; every one is a cluster of its own."""
        return self._cluster_id

    @property
    def job_id(self) -> str:
        """Name the one job there is."""
        return "this-process"

    # -- apps ------------------------------------------------------------------------------------

    def deploy(
        self, manifest: AppManifest, blobs: Mapping[str, bytes], *, close_outdated: bool
    ) -> None:
        """Store an app."""
        self._check_open()
        with self._lock:
            for spec in manifest.classes.values():
                self._store(spec, lambda: blobs)
            sandboxes = [
                self._sandboxes.store_spec(definition) for definition in manifest.sandboxes.values()
            ]
            self._apps[manifest.name] = manifest
            current = {spec.digest for spec in manifest.classes.values()}
            outdated = [
                instance
                for instance in self._instances.values()
                if instance.handle.app == manifest.name
                and instance.handle.spec_digest not in current
            ]
        if close_outdated:
            for instance in outdated:
                instance.close()
            self._sandboxes.close_outdated(manifest.name, sandboxes)

    def find_app(self, name: str) -> AppManifest:
        """Give a deployed app."""
        with self._lock:
            if name not in self._apps:
                raise AppNotFoundError(
                    f"no app {name!r} is deployed: deployed are {', '.join(self._apps) or 'none'}. "
                    f"Deploy it with app.deploy(), or check the name."
                )
            return self._apps[name]

    def list_apps(self) -> list[str]:
        """Name the deployed apps."""
        with self._lock:
            return sorted(self._apps)

    def find_spec(self, digest: str) -> ClassSpec | None:
        """Give a class spec."""
        return self._specs.get(digest)

    def explain(self, spec: ClassSpec | SandboxSpec) -> str:
        """Say that nothing is placed here."""
        return f"{spec.app}.{spec.name} runs in this process: the engine for tests places nothing."

    # -- instances -------------------------------------------------------------------------------

    def start(self, request: StartRequest) -> InstanceRef:
        """Start or find an instance."""
        spec = request.spec
        key = (spec.app, spec.name, request.instance_id)
        while True:
            with self._lock:
                self._check_open()
                found = self._instances.get(key)
                if found is None:
                    digest = self._store(spec, request.blobs)
                    self._prepare_volumes(spec)
                    instance = FakeInstance(self, request, digest)
                    self._instances[key] = instance
                    instance.spawn()
                    return instance
                if not found.closing:
                    found.check_same(request)
                    return found
            found.ended.wait()  # the name is free after its exit hooks

    def attach(self, handle: ClassInstanceHandle) -> InstanceRef:
        """Reach a live instance."""
        with self._lock:
            found = self._instances.get((handle.app, handle.cls, handle.instance_id))
            if found is None or found.closing:
                raise InstanceNotFoundError(
                    f"{handle.app}.{handle.cls} {handle.instance_id!r} does not live: it was closed, "
                    f"or it was lost. Start another."
                )
            return found

    def list_instances(self, app: str | None = None, cls: str | None = None) -> list[InstanceInfo]:
        """List live instances."""
        with self._lock:
            found = [self._instances[key] for key in sorted(self._instances)]
        return [
            instance.info()
            for instance in found
            if app in (None, instance.handle.app) and cls in (None, instance.handle.cls)
        ]

    def kill(self, handle: ClassInstanceHandle) -> None:
        """Do to an instance what ``kill -9`` does to its process: no exit hook runs.

        A named one comes back with a new construction; another one is lost.

        Raises:
            InstanceNotFoundError: when it does not live.
        """
        self.attach(handle)
        self._instances[handle.app, handle.cls, handle.instance_id].kill()

    # -- sandboxes -------------------------------------------------------------------------------

    def start_sandbox(self, request: SandboxRequest) -> SandboxRef:
        """Open or find a session."""
        self._check_open()
        self._prepare_volumes(request.spec)
        return self._sandboxes.start_sandbox(request)

    def attach_sandbox(self, handle: SandboxHandle) -> SandboxRef:
        """Reach a live session."""
        return self._sandboxes.attach_sandbox(handle)

    def find_sandbox_spec(self, digest: str) -> SandboxSpec | None:
        """Give a version of a definition."""
        return self._sandboxes.find_sandbox_spec(digest)

    def list_sandboxes(
        self, app: str | None = None, sandbox: str | None = None
    ) -> list[SandboxSessionInfo]:
        """List live sessions."""
        return self._sandboxes.list_sandboxes(app, sandbox)

    # -- secrets and volumes ---------------------------------------------------------------------

    def put_secret(self, name: str, variables: Mapping[str, str], *, overwrite: bool) -> bool:
        """Store a secret."""
        with self._lock:
            if name in self._secrets and not overwrite:
                return False
            self._secrets[name] = dict(variables)
            return True

    def list_secrets(self) -> list[str]:
        """Name the stored secrets."""
        return sorted(self._secrets)

    def delete_secret(self, name: str) -> bool:
        """Remove a secret."""
        return self._secrets.pop(name, None) is not None

    def ensure_volume(self, volume: StorageMount) -> None:
        """Record a volume, or check that the recorded one is the same."""
        with self._lock:
            found = self._volumes.get(volume.name)
            if found is not None:
                check_same_volume(found, volume)
                return
            if not volume.create_if_missing:
                raise VolumeNotFoundError(
                    f"volume {volume.name!r} does not exist. Make it with Volume.create, or name it "
                    f"with create_if_missing=True."
                )
            self._volumes[volume.name] = StorageMount(volume.name, volume.backend, volume.size_gb)

    def list_volumes(self) -> list[StorageMount]:
        """List recorded volumes."""
        with self._lock:
            return [self._volumes[name] for name in sorted(self._volumes)]

    def delete_volume(self, name: str) -> bool:
        """Remove a volume and its files."""
        with self._lock:
            if self._volumes.pop(name, None) is None:
                return False
            shutil.rmtree(self._volume_directory(name))
            return True

    def disconnect(self) -> None:
        """Close every instance and session, named ones too, and remove what was stored; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._instances.values())
        with ThreadPoolExecutor(max(1, len(left))) as threads:  # each may wait for running calls
            list(threads.map(FakeInstance.close, left))
        self._sandboxes.close_all()
        self.watch.stop()
        interruptible_sleep(False)
        if self._directory is not None:
            shutil.rmtree(self._directory)

    # -- inside ----------------------------------------------------------------------------------

    def make_object(
        self, label: str, spec: ClassSpec, options: ClassOptions, arguments: bytes, undo: ExitStack
    ) -> Any:
        """Set secrets and volumes up, then construct the user's object."""
        undo.enter_context(self._surroundings.variables(self._prepare(label, options, undo)))
        cls = loads(self._blobs[spec.blob_digest])[0]
        args, kwargs = loads(arguments)
        return cls(*args, **kwargs)

    def _prepare(self, label: str, options: ClassOptions, undo: ExitStack) -> dict[str, str]:
        """Make volumes and give the variables of image and secrets; the latter win."""
        variables: dict[str, str] = {}
        for step in options.image.steps if options.image is not None else ():
            variables.update(step.variables)
        for name in options.secrets:
            if name not in self._secrets:
                raise SetUpError(
                    f"{label}: secret {name!r} is not stored. Store it with "
                    f"Secret.create({name!r}, …)."
                )
            variables.update(self._secrets[name])
        for mount in options.mounts:
            directory = self._volume_directory(mount.volume)
            undo.enter_context(self._surroundings.link(Path(mount.path), directory, mount.volume))
        return variables

    def forget(self, instance: FakeInstance) -> None:
        """Free the name of an instance that has ended."""
        with self._lock:
            handle = instance.handle
            key = (handle.app, handle.cls, handle.instance_id)
            if self._instances.get(key) is instance:
                del self._instances[key]

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionFailedError(
                "this engine for tests was disconnected. Do the work inside `with fake_engine():`."
            )

    def _store(self, spec: ClassSpec, blobs: Callable[[], Mapping[str, bytes]]) -> str:
        digest = spec.digest
        if digest not in self._specs:
            self._blobs.update(blobs())
            self._specs[digest] = spec
        return digest

    def _prepare_volumes(self, spec: ClassSpec | SandboxSpec) -> None:
        for mount in ClassOptions.model_validate(spec.options).mounts:
            self.ensure_volume(
                StorageMount(
                    mount.volume, mount.backend, mount.size_gb, mount.path, mount.create_if_missing
                )
            )

    def _volume_directory(self, name: str) -> Path:
        with self._lock:
            if self._directory is None:
                self._directory = tempfile.mkdtemp(prefix="apothic-volumes-")
            directory = Path(self._directory, name)
            directory.mkdir(exist_ok=True)
            return directory
