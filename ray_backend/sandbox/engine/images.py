"""Images of sandboxes: present ones at once, others pulled, recipes built once per engine."""

from __future__ import annotations

import contextlib
import gc
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import docker.errors
from docker.utils import parse_repository_tag

from apothic.errors import ImageBuildError, ImageNotFoundError
from ray_backend.dockerfile import base_of, dockerfile_of
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.context import DOCKERFILE, recipe_digest, write_context
from ray_backend.sandbox.engine.labels import BASE, BUILD, BUILD_UNFINISHED
from ray_backend.sandbox.engine.locks import held, held_if_free
from ray_backend.sandbox.engine.translate import is_conflict, translated

if TYPE_CHECKING:
    from apothic.image import Image

__all__ = ["ImageDefaults", "Progress", "clean_builds", "ensure_image", "image_defaults"]

Progress = Callable[[str], None]
"""Called with a line of what a pull or a build says; what it raises ends the pull or the build."""

REPOSITORY = "apothic-sandbox"
_LOG_LINES = 60
_STEP = re.compile(r"Step \d+/\d+ : (.*)")
_SPOOL_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class ImageDefaults:
    """What an image says about running in it.

    Attributes:
        id: the engine's id.
        user: name or number, with or without a group; empty for root.
        working_directory: empty when the image names none.
        environment: names and values.
    """

    id: str
    user: str
    working_directory: str
    environment: dict[str, str]


def image_defaults(engine: Engine, reference: str) -> ImageDefaults:
    """Look at a present image.

    Raises:
        ImageNotFoundError: when it is not present.
    """
    found = engine.inspect_image(reference)
    if found is None:
        raise ImageNotFoundError(
            f"image {reference!r} is not on this node. Pull it there: docker pull {reference}"
        )
    config = found.get("Config") or {}
    pairs = (entry.partition("=") for entry in config.get("Env") or ())
    return ImageDefaults(
        id=found["Id"],
        user=config.get("User") or "",
        working_directory=config.get("WorkingDir") or "",
        environment={name: value for name, _, value in pairs},
    )


def ensure_image(
    engine: Engine,
    image: str | Image,
    fetch: Callable[[str], bytes],
    *,
    progress: Progress | None = None,
) -> str:
    """Give the reference of an image that is present: about 3 ms when it was already.

    Those who want the same recipe at the same time wait for the first, in other processes of the
    node, too. A recipe whose base has changed on the node since is built again.

    Args:
        engine: where.
        image: a reference, or a recipe, its files packed.
        fetch: gives a packed file's archive by digest.
        progress: takes lines of what happens.

    Raises:
        ImageNotFoundError: when the base is not present and cannot be pulled.
        ImageBuildError: when a step fails, with the step and the end of the log.
        InvalidOptionError: when the recipe cannot be written as a Dockerfile.
    """
    tell = progress or (lambda line: None)
    if isinstance(image, str) or not image.steps:
        reference = image if isinstance(image, str) else base_of(image)
        _ensure_present(engine, reference, tell)
        return reference
    tag = f"{REPOSITORY}:{recipe_digest(image)[:32]}"
    if _is_current(engine, image, tag):
        return tag
    with held("build", engine.info.id, tag):
        if not _is_current(engine, image, tag):
            tell(f"building {tag}")
            try:
                with held("builds", engine.info.id, shared=True):
                    _build(engine, image, tag, fetch, tell)
            finally:
                clean_builds(engine)
    return tag


def clean_builds(engine: Engine) -> int:
    """Remove what builds left that were killed; give how many things. Nothing while one runs."""
    removed = 0
    with held_if_free("builds", engine.info.id) as free:
        if not free:
            return 0
        wanted = {"label": f"{BUILD}={BUILD_UNFINISHED}"}
        for container in engine.list_containers({BUILD: BUILD_UNFINISHED}):
            removed += engine.remove(container.id)
        with translated("list images"):
            images = engine.api.images(filters={**wanted, "dangling": True})
        for found in images:
            removed += _remove_image(engine, found["Id"])
    return removed


def _id_of(engine: Engine, reference: str) -> str | None:
    found = engine.inspect_image(reference)
    return None if found is None else str(found["Id"])


def _base_id(engine: Engine, image: Image) -> str:
    """Give the id of the recipe's base; empty when it is not present, or not known."""
    starts_itself = not dockerfile_of(image).startswith(f"FROM {base_of(image)}\n")
    return (
        "" if starts_itself or base_of(image) == "scratch" else _id_of(engine, base_of(image)) or ""
    )


def _is_current(engine: Engine, image: Image, tag: str) -> bool:
    found = engine.inspect_image(tag)
    if found is None:
        return False
    built_on = (found["Config"].get("Labels") or {}).get(BASE, "")
    base_id = _base_id(engine, image) if built_on else ""
    return not base_id or built_on == base_id


def _ensure_present(engine: Engine, reference: str, tell: Progress) -> None:
    if _id_of(engine, reference) is not None:
        return
    repository, tag = parse_repository_tag(reference)
    tell(f"pulling {reference}")
    try:
        with _closing(
            engine.api.pull(repository, tag or "latest", stream=True, decode=True)
        ) as lines:
            for line in lines:
                if "error" in line:
                    raise _not_pulled(reference, line["error"])
                if "progress" not in line:
                    tell(" ".join(filter(None, (line.get("id"), line.get("status")))))
    except docker.errors.APIError as error:
        raise _not_pulled(reference, str(error.explanation or error)) from error


def _not_pulled(reference: str, reason: str) -> ImageNotFoundError:
    return ImageNotFoundError(
        f"image {reference!r} is not on this node and could not be pulled: {reason.strip()}. Check "
        f"the name; a private registry needs 'docker login' by the user of Ray on the node; without "
        f"a registry bring it there: 'docker save {reference} | ssh NODE docker load'."
    )


def _build(
    engine: Engine, image: Image, tag: str, fetch: Callable[[str], bytes], tell: Progress
) -> None:
    if dockerfile_of(image).startswith(f"FROM {base_of(image)}\n") and base_of(image) != "scratch":
        _ensure_present(engine, base_of(image), tell)
    former = _id_of(engine, tag)
    log: deque[str] = deque(maxlen=_LOG_LINES)
    step, last_image = "", ""
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as context:
        write_context(image, _base_id(engine, image), fetch, context)
        context.seek(0)
        with (
            translated(f"build the image {tag!r}"),
            _closing(
                engine.api.build(
                    fileobj=context,
                    custom_context=True,
                    dockerfile=DOCKERFILE,
                    tag=tag,
                    rm=True,
                    forcerm=True,
                    decode=True,
                )
            ) as events,
        ):
            for event in events:
                text = str(event.get("stream") or event.get("status") or "")
                for line in filter(None, map(str.strip, text.splitlines())):
                    found = _STEP.match(line)
                    step = found[1] if found else step
                    log.append(line)
                    if not line.startswith("---> "):
                        tell(line)
                    elif re.fullmatch(r"[0-9a-f]{12}", line[5:]):
                        last_image = line[5:]
                if "error" in event:
                    if last_image:
                        _remove_image(engine, last_image)
                    raise _failed(tag, step, str(event["error"]), log)
    if former is not None and former != _id_of(engine, tag):
        _remove_image(engine, former)


def _failed(tag: str, step: str, reason: str, log: deque[str]) -> ImageBuildError:
    end = "\n".join(log)
    return ImageBuildError(
        f"image {tag!r} could not be built: step {step!r} failed: {reason.strip()}. Correct the "
        f"recipe; the end of the log:\n{end}",
        step,
        end,
    )


def _remove_image(engine: Engine, image_id: str) -> bool:
    """Remove an untagged image and its untagged parents, unless something else needs them."""
    with translated(f"remove the image {image_id[:19]!r}"):
        try:
            engine.api.remove_image(image_id)
        except docker.errors.ImageNotFound:
            return False
        except docker.errors.APIError as error:
            if is_conflict(error):
                return False
            raise
    return True


@contextlib.contextmanager
def _closing(stream: Any) -> Iterator[Any]:
    """End a stream of docker-py, so that the engine sees the connection close and stops."""
    try:
        yield stream
    except BaseException:
        stream.close()
        del stream
        gc.collect()  # docker-py keeps the response in a cycle, and offers no way to close it
        raise
