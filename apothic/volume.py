"""`Volume` and `StorageMount`: directories that outlive instances."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from apothic.errors import ConflictError, InvalidOptionError, VolumeNotFoundError
from apothic.names import check_name
from apothic.twins import Twin, Twins, class_twin, twin

if TYPE_CHECKING:
    from apothic.backend import ControlPlaneClient

__all__ = ["StorageMount", "Volume", "VolumeAio", "VolumeClassAio", "mounts_from"]

VolumeBackend = Literal["cloud_bucket", "vast_local"]
_BACKENDS = ("cloud_bucket", "vast_local")
HOST_LOCAL: Final = "vast_local"
"""The backend of volumes that lie on one node."""


@dataclass(frozen=True)
class StorageMount:
    """Storage that `volumes=` takes.

    Attributes:
        name: the volume's name on the cluster.
        backend: ``cloud_bucket`` is portable: the same files from every node, under the shared root
            that the nodes set in ``APOTHIC_SHARED_ROOT``. ``vast_local`` is host-local: a directory
            of one node, to which its users are then tied.
        size_gb: the size asked for, in GB; recorded, and compared when it is named again.
        mount_path: where it appears when given in a list.
        create_if_missing: whether the first use makes it.
    """

    name: str
    backend: str = "cloud_bucket"
    size_gb: float | None = None
    mount_path: str | None = None
    create_if_missing: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be a volume."""
        check_name("volume", self.name)
        if self.backend not in _BACKENDS:
            raise InvalidOptionError(
                f"volume backend={self.backend!r} is not known: it is one of "
                f"{', '.join(_BACKENDS)}. Use Volume.cloud or Volume.vast_local."
            )
        size = self.size_gb
        if size is not None and (
            isinstance(size, bool)
            or not isinstance(size, (int, float))
            or not math.isfinite(size)
            or size <= 0
        ):
            raise InvalidOptionError(
                f"volume size_gb={size!r} is not valid: it takes a number of GB above 0. "
                f"Leave it out where any size will do."
            )
        if self.mount_path is not None:
            _check_path(self.mount_path)


class _HasTwins:
    """Apart from `Volume`, whose decorator would read the attribute before there are twins."""

    aio: ClassVar[Twins[Volume, VolumeClassAio, VolumeAio]] = Twins(
        lambda: VolumeClassAio(), lambda volume: VolumeAio(volume)
    )


@dataclass(frozen=True)
class Volume(_HasTwins, StorageMount):
    """A named directory on the cluster that outlives the instances which mount it."""

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        create_if_missing: bool = False,
        backend: VolumeBackend = "cloud_bucket",
        size_gb: float | None = None,
        mount_path: str | None = None,
        mount_path_default: str | None = None,
        geolocation: str | list[str] | None = None,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> Volume:
        """Refer to a volume; with ``client`` or ``base_url`` it is looked up at once.

        Args:
            name: its name.
            create_if_missing: make it at first use.
            backend: as for `StorageMount`.
            size_gb: in GB.
            mount_path: where it appears.
            mount_path_default: where it appears when ``mount_path`` is not given.
            geolocation: refused: a cluster of your own keeps volumes where its nodes are.
            client: the connection to use.
            base_url: the cluster to connect to.

        Raises:
            InvalidOptionError: when a value is not valid.
            VolumeNotFoundError: when it was looked up, is missing and not to be created.
            ConflictError: when it exists with another backend or size.
        """
        if geolocation is not None:
            raise InvalidOptionError(
                f"volume geolocation={geolocation!r} has no effect here: files lie where your "
                f"nodes are. Give geolocation to the class that uses the volume."
            )
        volume = cls(name, backend, size_gb, mount_path or mount_path_default, create_if_missing)
        if client is not None or base_url is not None:
            volume._ensure(client, base_url)
        return volume

    @classmethod
    def cloud(cls, name: str, *, mount_path: str | None = None) -> Volume:
        """Refer to a portable volume, made at first use: the same files from every node.

        Raises:
            InvalidOptionError: when a value is not valid.
        """
        return cls(name, "cloud_bucket", None, mount_path, True)

    @classmethod
    def vast_local(cls, name: str, *, size_gb: float, mount_path: str | None = None) -> Volume:
        """Refer to a host-local volume, made at first use: fast, tied to the node of that use.

        Raises:
            InvalidOptionError: when a value is not valid.
        """
        return cls(name, "vast_local", size_gb, mount_path, True)

    @classmethod
    def create(
        cls,
        name: str,
        *,
        backend: VolumeBackend = "cloud_bucket",
        size_gb: float | None = None,
        mount_path: str | None = None,
        client: ControlPlaneClient | None = None,
        base_url: str | None = None,
    ) -> Volume:
        """Record a volume on the cluster; its directory is made at first use.

        Raises:
            ConflictError: when it exists with another backend or size.
            InvalidOptionError: when a value is not valid.
        """
        volume = cls(name, backend, size_gb, mount_path, True)
        volume._ensure(client, base_url)
        return volume

    @classmethod
    def list(
        cls, *, client: ControlPlaneClient | None = None, base_url: str | None = None
    ) -> list[Volume]:
        """List the volumes that the cluster has recorded."""
        records = _connect(client, base_url).list_volumes()
        return [cls(record.name, record.backend, record.size_gb) for record in records]

    def delete(
        self, *, client: ControlPlaneClient | None = None, base_url: str | None = None
    ) -> None:
        """Remove the volume and its files.

        Raises:
            VolumeNotFoundError: when there is none of this name.
        """
        if not _connect(client, base_url).delete_volume(self.name):
            raise VolumeNotFoundError(
                f"volume {self.name!r} does not exist on this cluster. Volume.list() names those "
                f"that do."
            )

    def _ensure(self, client: ControlPlaneClient | None, base_url: str | None) -> None:
        _connect(client, base_url).ensure_volume(replace(self))


class VolumeClassAio:
    """Async twins of what `Volume` itself can be asked."""

    __slots__ = ()

    from_name: Final = class_twin(Volume.from_name)
    create: Final = class_twin(Volume.create)
    list: Final = class_twin(Volume.list)


class VolumeAio(Twin[Volume], VolumeClassAio):
    """Async twins of `Volume`."""

    __slots__ = ()

    delete: Final = twin(Volume.delete)


def check_same_volume(stored: StorageMount, wanted: StorageMount) -> None:
    """Refuse to mount an existing volume as something else.

    Raises:
        ConflictError: when backend or size differ.
    """
    if stored.backend != wanted.backend:
        raise ConflictError(
            f"volume {wanted.name!r} exists with backend {stored.backend!r}, not "
            f"{wanted.backend!r}. Use that backend, or another name."
        )
    if None not in (stored.size_gb, wanted.size_gb) and stored.size_gb != wanted.size_gb:
        raise ConflictError(
            f"volume {wanted.name!r} exists with size_gb={stored.size_gb}, not {wanted.size_gb}. "
            f"Use that size, or another name."
        )


def mounts_from(
    volumes: Mapping[str, StorageMount] | Sequence[StorageMount] | None,
) -> dict[str, StorageMount]:
    """Read `volumes=` in either form, as mount path to storage.

    Raises:
        InvalidOptionError: when a path is missing, not absolute, or used twice.
    """
    if volumes is None:
        return {}
    pairs: list[tuple[object, object]]
    if isinstance(volumes, Mapping):
        pairs = list(volumes.items())
    elif isinstance(volumes, Sequence) and not isinstance(volumes, (str, bytes)):
        pairs = [(getattr(mount, "mount_path", None), mount) for mount in volumes]
    else:
        raise InvalidOptionError(
            f"volumes={volumes!r} is not valid: it takes {{'/path': volume}} or a list of volumes "
            f"that have a mount_path. Write {{'/data': Volume.from_name('name')}}."
        )
    found: dict[str, StorageMount] = {}
    for path, mount in pairs:
        if not isinstance(mount, StorageMount):
            raise InvalidOptionError(
                f"volumes holds {mount!r}, which is no Volume. Write Volume.from_name('name')."
            )
        if path is None:
            raise InvalidOptionError(
                f"volume {mount.name!r} stands in a list without mount_path: nothing says where it "
                f"appears. Give mount_path, or use {{'/path': volume}}."
            )
        clean = _check_path(path)
        if clean in found:
            raise InvalidOptionError(
                f"mount path {clean!r} is used by two volumes, {found[clean].name!r} and "
                f"{mount.name!r}. Give one of them another path."
            )
        found[clean] = mount
    return found


def _check_path(path: object) -> str:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise InvalidOptionError(
            f"mount path {path!r} is not valid: it takes an absolute path. Write '/data'."
        )
    clean = posixpath.normpath(path)
    if clean in ("/", "//"):
        raise InvalidOptionError("mount path '/' would hide the whole file system. Write '/data'.")
    return clean


def _connect(client: ControlPlaneClient | None, base_url: str | None) -> ControlPlaneClient:
    from apothic.backend import connect

    return connect(client, base_url)
