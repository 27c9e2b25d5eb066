"""The build context of a recipe: a tar archive with its Dockerfile and its files."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from apothic.digests import digest_of
from ray_backend.dockerfile import CONTEXT_DIRECTORY, dockerfile_of, is_build_context
from ray_backend.sandbox.engine.labels import BASE, BUILD, BUILD_UNFINISHED

if TYPE_CHECKING:
    from apothic.image import Image

__all__ = ["DOCKERFILE", "recipe_digest", "write_context"]

DOCKERFILE = f"{CONTEXT_DIRECTORY}/Dockerfile"
"""Where in the archive the Dockerfile is."""
_FROM_LINE = re.compile(r"^[ \t]*FROM[ \t].*[^\\\s][ \t]*$", re.IGNORECASE)


def recipe_digest(image: Image) -> str:
    """Give a digest of all that a recipe is, contents of files included."""
    added = "".join(f"{step.remote}\0{step.digest}\n" for step in image.steps if step.kind == "add")
    return digest_of(f"{dockerfile_of(image, complete=True)}\0{added}".encode())


def write_context(
    image: Image, base_id: str, fetch: Callable[[str], bytes], target: IO[bytes]
) -> None:
    """Write the archive.

    Args:
        image: the recipe, its files packed.
        base_id: the engine's id of its base, or empty.
        fetch: gives a packed file's archive by digest.
        target: where to.
    """
    text = _labelled(dockerfile_of(image, complete=True), base_id)
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as context:
        for step in image.steps:
            if step.kind == "add" and step.digest is not None:
                root = "." if is_build_context(image, step) else ""
                if root and step.remote not in (None, "."):
                    root = str(step.remote).lstrip("/")
                _copy(fetch(step.digest), root or f"{CONTEXT_DIRECTORY}/{step.digest}", context)
        member = tarfile.TarInfo(DOCKERFILE)
        member.size, member.mode = len(text.encode()), 0o644
        context.addfile(member, io.BytesIO(text.encode()))


def _labelled(dockerfile: str, base_id: str) -> str:
    """Mark all that the build makes on the way, so that leftovers of a killed one are found."""
    lines = []
    for line in dockerfile.splitlines():
        lines.append(line)
        if _FROM_LINE.match(line):
            lines.append(f"LABEL {BUILD}={BUILD_UNFINISHED}")
    lines.append(f'LABEL {BUILD}="" {BASE}="{base_id}"')
    return "\n".join(lines) + "\n"


def _copy(packed: bytes, root: str, context: tarfile.TarFile) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member) if member.isfile() else None
            member.name = posixpath.normpath(posixpath.join(root, member.name))
            if member.islnk():
                member.linkname = posixpath.normpath(posixpath.join(root, member.linkname))
            context.addfile(member, content)
