"""An empty image, and containers from it that are created for the engine's sake."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.labels import BUILD, BUILD_UNFINISHED, OwnerLabels
from ray_backend.sandbox.engine.locks import held
from ray_backend.sandbox.engine.translate import translated

__all__ = ["HELPER_IMAGE", "ensure_helper_image", "helper_container"]

HELPER_IMAGE = "apothic-helper:1"


def ensure_helper_image(engine: Engine) -> str:
    """Make the image unless it is there; it holds nothing and takes no space."""
    if engine.inspect_image(HELPER_IMAGE) is not None:
        return HELPER_IMAGE
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    with held("helper image", engine.info.id), translated("make the helper image"):
        if engine.inspect_image(HELPER_IMAGE) is None:
            repository, _, tag = HELPER_IMAGE.partition(":")
            # A second one, made from another node at the same time, takes the tag: the label then
            # lets the first be found as a leftover.
            engine.api.import_image_from_data(
                empty.getvalue(), repository, tag, changes=[f"LABEL {BUILD}={BUILD_UNFINISHED}"]
            )
    return HELPER_IMAGE


@contextlib.contextmanager
def helper_container(
    engine: Engine, owner: OwnerLabels, config: Mapping[str, Any]
) -> Iterator[str]:
    """Create a container, give its id, and remove it afterwards.

    Args:
        engine: where.
        owner: whose labels it carries.
        config: the body of ``POST /containers/create`` without image and labels.
    """
    ensure_helper_image(engine)
    body = {
        "Image": HELPER_IMAGE,
        "Entrypoint": ["/none"],
        **config,
        "Labels": {**owner.as_labels(), BUILD: ""},
    }
    with translated("create a helper container"):
        made: dict[str, Any] = engine.api.create_container_from_config(body)  # type: ignore[no-untyped-call]
    try:
        yield str(made["Id"])
    finally:
        engine.remove(made["Id"])
