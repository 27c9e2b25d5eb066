"""Files of images on a node. Others read them meanwhile: each is its old or its new self, whole."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import uuid
from pathlib import Path

__all__ = ["unpack", "unpack_once"]


def unpack(packed: bytes, target: Path) -> None:
    """Put the file or the directory that `Image.pack` made at ``target``.

    What is there already with the same content is left alone; other files of the directory stay.
    """
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        top = archive.getmembers()[0]
        if top.isfile():
            target.parent.mkdir(parents=True, exist_ok=True)
            _put(target, _content(archive, top), top.mode)
            return
        target.mkdir(parents=True, exist_ok=True)
        for member in archive:
            checked = tarfile.data_filter(member, str(target))
            place = target / checked.name
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
            elif member.issym():
                _put_link(place, checked.linkname)
            else:
                _put(place, _content(archive, member), checked.mode)


def unpack_once(packed: bytes, target: Path) -> None:
    """Do so at a place that only ever has this content; what is there is whole."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    try:
        unpack(packed, beside)
        os.rename(beside, target)
    except OSError:
        if not target.exists():  # else another process was faster
            raise
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = archive.extractfile(member)
    assert source is not None  # a regular file, or a hard link to one
    return source.read()


def _put(place: Path, content: bytes, mode: int) -> None:
    with contextlib.suppress(OSError):
        if place.read_bytes() == content:
            if place.stat().st_mode & 0o7777 != mode:
                place.chmod(mode)
            return
    beside = _beside(place)
    try:
        beside.write_bytes(content)
        beside.chmod(mode)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def _put_link(place: Path, leads_to: str) -> None:
    with contextlib.suppress(OSError):
        if os.readlink(place) == leads_to:
            return
    beside = _beside(place)
    try:
        beside.symlink_to(leads_to)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def _beside(place: Path) -> Path:
    """Name a sibling, which is on the same file system."""
    return place.with_name(f".apothic-{uuid.uuid4().hex}")
