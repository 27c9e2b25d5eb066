"""What a class's `Image` becomes on Ray: a ``runtime_env``, files, or a container."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from apothic._version import __version__
from apothic.errors import EnvironmentSetupError
from apothic.image import Image
from ray_backend.ray_api import live_nodes
from ray_backend.registry import Registry
from ray_backend.sandbox.engine.context import DOCKERFILE, recipe_digest, write_context

__all__ = ["Environment", "compile_image"]

_DEFAULT_PYTHON = "3.11"  # of `Image.debian_slim`, so nobody asked for it
_HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
_INSTALLERS = {"pip": "pip", "uv": "uv"}
_AT_RUN_TIME = ("env", "workdir", "add")
"""Steps that the worker takes in any image; all others change an image when it is built."""


@dataclass(frozen=True)
class Environment:
    """What an actor needs besides its class.

    Attributes:
        runtime_env: for Ray; None where the job's own is enough.
        files: pairs of where they appear and the digest of a tar archive in the registry.
        workdir: the working directory, or None.
    """

    runtime_env: dict[str, Any] | None = None
    files: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None
    notes: tuple[str, ...] = field(default=())


def compile_image(
    image: Image | None,
    *,
    missing: Callable[[Sequence[str]], list[str]] | None = None,
    build: Callable[[Image], str] | None = None,
) -> Environment:
    """Turn a recipe into what Ray needs.

    Args:
        image: the recipe, its files packed.
        missing: gives those requirements that the nodes' environment does not satisfy.
        build: builds a recipe on the nodes and gives the image's reference.

    Raises:
        EnvironmentSetupError: when a node lacks what a container needs, another Python is asked for
            than the cluster has, or an image would have to be built on several nodes.
    """
    if image is None:
        return Environment()
    missing = missing or missing_on_node
    build = build or build_on_node
    env: dict[str, str] = {}
    packages: dict[str, list[str]] = {"pip": [], "uv": []}
    files: list[tuple[str, str]] = []
    workdir: str | None = None
    for step in image.steps:
        if step.kind == "env":
            env.update(step.variables)
        elif step.kind in packages:
            packages[step.kind].extend(step.values)
        elif step.kind == "workdir":
            workdir = step.values[0]
        elif step.kind == "add" and step.remote is not None and step.digest is not None:
            files.append((step.remote, step.digest))
    runtime_env: dict[str, Any] = {}
    if env:
        runtime_env["env_vars"] = env
    _check_python(image.python_version)
    if image.prebuilt and all(step.kind in _AT_RUN_TIME for step in image.steps):
        runtime_env["image_uri"] = image.base
    elif image.needs_container:
        runtime_env["image_uri"] = build(image if image.prebuilt else _with_worker(image))
    else:
        for kind, wanted in packages.items():
            lacking = missing(wanted) if wanted else []
            if lacking:
                runtime_env[_INSTALLERS[kind]] = lacking
        if len(runtime_env.keys() & _INSTALLERS.keys()) == 2:
            # Ray takes one installer per environment; both read the same requirements.
            runtime_env["uv"] = [*runtime_env.pop("pip"), *runtime_env["uv"]]
    return Environment(runtime_env or None, tuple(files), workdir)


def _check_python(wanted: str | None) -> None:
    """Refuse a Python that the nodes do not run: Ray needs one version on all of them."""
    if wanted not in (None, _DEFAULT_PYTHON, _HERE):
        raise EnvironmentSetupError(
            f"Image.debian_slim(python_version={wanted!r}): the cluster runs Python {_HERE}, and Ray "
            f"needs the same one everywhere. Leave python_version out, or run a cluster on {wanted}."
        )


def _with_worker(image: Image) -> Image:
    """Add what Ray starts a worker with: its own release on the same Python, and this package."""
    if image.base is None:
        image = image.model_copy(update={"python_version": _HERE})
    problem = f", the cluster {_HERE}: Ray needs the same one in both. Start from another base."
    check = (
        "import sys; found = '%d.%d' % sys.version_info[:2]; "
        f"sys.exit(found != '{_HERE}' and 'the image has Python ' + found + '{problem}')"
    )
    return image.run_commands(
        f'python -c "{check}"',
        # By the interpreter that Ray starts, which need not be the one of the first pip on PATH.
        f"python -m pip install --no-cache-dir ray=={ray.__version__} apothic-ray=={__version__}",
    )


def missing_on_node(requirements: Sequence[str]) -> list[str]:
    """Ask a node of the cluster which requirements its environment does not satisfy."""
    try:
        found: list[str] = ray.get(_probe.remote(list(requirements)), timeout=120)
    except ray.exceptions.RayError as error:
        raise EnvironmentSetupError(
            f"no node could be asked which packages it has: {error}. Check `ray status`."
        ) from None
    return found


def build_on_node(image: Image) -> str:
    """Build an image with podman on the cluster's node; Ray runs containers with it.

    Raises:
        EnvironmentSetupError: when it cannot be built, or there are several nodes: an actor may come
            to another than the one that has the image.
    """
    nodes = sum(bool(node["Alive"]) for node in live_nodes())
    if nodes > 1:
        raise EnvironmentSetupError(
            f"the image of a class must be built, as it has steps that need a container or no Ray in "
            f"it, and what is built is on one node: this cluster has {nodes} nodes. Build it "
            f"once, push it to a registry that all nodes reach, and use Image.from_registry(…, "
            f"prebuilt=True)."
        )
    tag = "localhost/apothic:" + recipe_digest(image)[:32]
    problem = ray.get(_podman_build.remote(image.model_dump_json(), tag))
    if problem is not None:
        raise EnvironmentSetupError(problem)
    return tag


def _missing(requirements: list[str]) -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    lacking = []
    for text in requirements:
        try:
            wanted = Requirement(text)
            satisfied = wanted.url is None and wanted.specifier.contains(
                version(wanted.name), prereleases=True
            )
            if wanted.marker is not None and not wanted.marker.evaluate():
                satisfied = True
        except (InvalidRequirement, PackageNotFoundError):
            satisfied = False
        if not satisfied:
            lacking.append(text)
    return lacking


def _build(recipe: str, tag: str) -> str | None:
    """Build unless present; give what is wrong, or None."""
    node = socket.gethostname()
    if shutil.which("podman") is None:
        return (
            f"node {node} has no podman, with which Ray runs containers: a class whose image has "
            f"apt_install, run_commands, from_registry or from_dockerfile needs it there. Install "
            f"podman on the nodes (apt-get install podman), or use pip_install and add_local_… "
            f"only, which need no container."
        )
    if subprocess.run(["podman", "image", "exists", tag], check=False).returncode == 0:
        return None
    image, registry = Image.model_validate_json(recipe), Registry()

    def fetch(digest: str) -> bytes:
        content = registry.get_blob(digest)
        assert content is not None  # stored before anything that names it
        return content

    with tempfile.TemporaryFile() as packed, tempfile.TemporaryDirectory() as directory:
        write_context(image, "", fetch, packed)
        packed.seek(0)
        with tarfile.open(fileobj=packed) as context:
            context.extractall(directory, filter="data")
        built = subprocess.run(
            ["podman", "build", "-t", tag, "-f", f"{directory}/{DOCKERFILE}", directory],
            text=True,
            capture_output=True,
            check=False,
        )
    if built.returncode == 0:
        return None
    return f"node {node} could not build the image:\n{(built.stdout + built.stderr)[-2000:]}"


class _LateTask:
    """A Ray task that is made when it is first used: decorating needs no connection, but exports."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *args: Any) -> Any:
        return ray.remote(num_cpus=0, max_retries=3)(self._function).remote(*args)


_probe = _LateTask(_missing)
_podman_build = _LateTask(_build)
