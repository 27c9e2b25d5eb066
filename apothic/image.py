"""`Image`: an immutable recipe of what must be present where user code runs.

A class turns it into Ray's ``runtime_env``, or into a container where a step needs one. Every call
returns a new recipe; files are read when the recipe is deployed, requirement files at once.
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from apothic.digests import digest_of
from apothic.errors import InvalidOptionError
from apothic.names import check_env_name

__all__ = ["Image", "ImageStep"]

StepKind = Literal["pip", "uv", "env", "run", "shell", "workdir", "apt", "dockerfile", "add"]
_CONTAINER_STEPS = ("run", "shell", "apt", "dockerfile")
_PYTHON_SOURCE_ROOT = "apothic:python"  # not a path: the engine chooses where sources go


class ImageStep(BaseModel):
    """One step of a recipe.

    Attributes:
        kind: what it does.
        values: packages, commands, a path or file contents, after the kind.
        variables: for ``env``.
        local: for ``add``, the path on the machine that deploys.
        remote: for ``add``, where it appears; relative paths are against the working directory.
        digest: for ``add``, the content's digest once it was packed.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    kind: StepKind
    values: tuple[str, ...] = ()
    variables: dict[str, str] = Field(default_factory=dict)
    local: str | None = None
    remote: str | None = None
    digest: str | None = None


class Image(BaseModel):
    """A recipe: a base and steps. Make one with `debian_slim`, `from_registry`, `from_dockerfile`.

    Attributes:
        base: an image reference, or None for the environment that the nodes have.
        python_version: asked of `debian_slim`, for instance ``3.11``.
        prebuilt: the base already holds Python, Ray and this package, so that none of these is added;
            without a step that changes it nothing is built.
        steps: in order.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    python_version: str | None = None
    prebuilt: bool = False
    steps: tuple[ImageStep, ...] = ()

    @classmethod
    def debian_slim(cls, *, python_version: str = "3.11") -> Image:
        """Start from the nodes' own environment, or from Debian where a step needs a container.

        For a class, the default stands for the cluster's own version, and any other is refused when an
        instance starts: Ray needs the same Python everywhere. A sandbox takes any.

        Raises:
            InvalidOptionError: when the version is no ``major.minor``.
        """
        parts = python_version.split(".") if isinstance(python_version, str) else []
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise InvalidOptionError(
                f"python_version={python_version!r} is not valid: it takes 'major.minor'. "
                f"Write '3.11'."
            )
        return cls(python_version=python_version)

    @classmethod
    def from_registry(cls, image_ref: str, *, prebuilt: bool = False) -> Image:
        """Start from a container image.

        Args:
            image_ref: its reference.
            prebuilt: it holds Python, Ray and this package already, for a class. Without it they are
                added by a build, which needs the cluster's version of Python, and pip, in the image.

        Raises:
            InvalidOptionError: when the reference is empty or holds white space.
        """
        return cls(base=_text("image_ref", image_ref, no_space=True), prebuilt=prebuilt)

    @classmethod
    def from_dockerfile(
        cls,
        path: str | Path,
        *,
        context_dir: str | Path | None = None,
        base: str = "python:3.11-slim",
    ) -> Image:
        """Start from a Dockerfile, which is read now; files it copies come from ``context_dir``.

        Raises:
            InvalidOptionError: when the file cannot be read.
        """
        image = cls(base=_text("base", base, no_space=True))
        if context_dir is not None:
            image = image.add_local_dir(context_dir, ".")
        return image.with_dockerfile(_read(path))

    def pip_install(self, *packages: str) -> Image:
        """Install packages with pip; those already satisfied on the node are left as they are."""
        return self._with(ImageStep(kind="pip", values=_texts("package", packages)))

    def uv_pip_install(self, *packages: str) -> Image:
        """Install packages with uv; those already satisfied on the node are left as they are."""
        return self._with(ImageStep(kind="uv", values=_texts("package", packages)))

    def pip_install_from_requirements(self, path: str | Path) -> Image:
        """Install what a requirements file lists; it is read now."""
        return self.pip_install(*_requirement_lines(path))

    def uv_pip_install_from_requirements(self, path: str | Path) -> Image:
        """Install what a requirements file lists, with uv; it is read now."""
        return self.uv_pip_install(*_requirement_lines(path))

    def pip_install_from_pyproject(
        self, path: str | Path, *, optional_dependencies: list[str] | None = None
    ) -> Image:
        """Install the dependencies of a ``pyproject.toml``; it is read now."""
        return self.pip_install(*_pyproject_requirements(path, optional_dependencies))

    def uv_pip_install_from_pyproject(
        self, path: str | Path, *, optional_dependencies: list[str] | None = None
    ) -> Image:
        """Install the dependencies of a ``pyproject.toml``, with uv; it is read now."""
        return self.uv_pip_install(*_pyproject_requirements(path, optional_dependencies))

    def env(self, values: Mapping[str, object] | None = None, /, **kwargs: object) -> Image:
        """Set environment variables. They are visible to all users of the cluster: no secrets."""
        variables: dict[str, str] = {}
        for name, value in {**(values or {}), **kwargs}.items():
            variables[check_env_name(name)] = str(value)
        return self._with(ImageStep(kind="env", variables=variables))

    def env_file(self, path: str | Path) -> Image:
        """Set the variables of a ``NAME=value`` file, which is read now."""
        variables: dict[str, str] = {}
        for number, line in enumerate(_read(path).splitlines(), 1):
            text = line.strip().removeprefix("export ").strip()
            if not text or text.startswith("#"):
                continue
            name, equals, value = text.partition("=")
            if not equals:
                raise InvalidOptionError(
                    f"{path}, line {number}: {line!r} is no NAME=value. Correct the line."
                )
            value = value.strip()
            if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            variables[check_env_name(name.strip())] = value
        return self._with(ImageStep(kind="env", variables=variables))

    def run_commands(self, *commands: str) -> Image:
        """Run shell commands while a container image is built."""
        return self._with(ImageStep(kind="run", values=_texts("command", commands)))

    def command_shell(self, shell: str) -> Image:
        """Choose the shell of the following `run_commands`, for instance ``/bin/bash -c``."""
        return self._with(ImageStep(kind="shell", values=(_text("shell", shell),)))

    def workdir(self, path: str) -> Image:
        """Set the working directory; it is created if missing."""
        return self._with(ImageStep(kind="workdir", values=(_text("workdir", path),)))

    def apt_install(self, *packages: str) -> Image:
        """Install Debian packages while a container image is built."""
        return self._with(ImageStep(kind="apt", values=_texts("package", packages)))

    def with_dockerfile(self, contents: str) -> Image:
        """Add lines of a Dockerfile as they are."""
        return self._with(ImageStep(kind="dockerfile", values=(_text("contents", contents),)))

    def add_local_file(self, local: str | Path, remote: str | None = None) -> Image:
        """Bring a file along, as it is when the app is deployed or first used.

        Args:
            local: path on this machine.
            remote: where it appears; its own name in the working directory if not given.
        """
        path = _existing(local, "file")
        return self._with(ImageStep(kind="add", local=str(path), remote=remote or path.name))

    def add_local_dir(self, local: str | Path, remote: str | None = None) -> Image:
        """Bring a directory along, as it is when the app is deployed or first used."""
        path = _existing(local, "directory")
        return self._with(ImageStep(kind="add", local=str(path), remote=remote or path.name))

    def copy_local_file(self, local: str | Path, remote: str | None = None) -> Image:
        """Do what `add_local_file` does: here both put a copy where the code runs."""
        return self.add_local_file(local, remote)

    def copy_local_dir(self, local: str | Path, remote: str | None = None) -> Image:
        """Do what `add_local_dir` does: here both put a copy where the code runs."""
        return self.add_local_dir(local, remote)

    def add_local_python_source(self, *modules: str) -> Image:
        """Bring importable modules or packages of this machine along, by name.

        Raises:
            InvalidOptionError: when one cannot be found, or has no source of its own.
        """
        image = self
        for name in _texts("module", modules):
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin in (None, "built-in", "frozen"):
                raise InvalidOptionError(
                    f"module {name!r} has no source here: add_local_python_source takes modules "
                    f"that this process can import. Check the name and sys.path."
                )
            path = Path(spec.origin or "")
            if spec.submodule_search_locations:
                path = path.parent
            parent, _, leaf = name.rpartition(".")
            remote = "/".join(
                [_PYTHON_SOURCE_ROOT, *parent.split(".")] if parent else [_PYTHON_SOURCE_ROOT]
            )
            remote = f"{remote}/{leaf}" + ("" if path.is_dir() else path.suffix)
            image = image._with(ImageStep(kind="add", local=str(path), remote=remote))
        return image

    @property
    def needs_container(self) -> bool:
        """Whether a step cannot be had from a ``runtime_env``."""
        return self.base is not None or any(step.kind in _CONTAINER_STEPS for step in self.steps)

    def pack(self) -> tuple[Image, dict[str, bytes]]:
        """Read the local files.

        Returns:
            The recipe with content digests in place of local paths, and the contents (tar archives)
            by digest.

        Raises:
            InvalidOptionError: when a file has gone meanwhile.
        """
        blobs: dict[str, bytes] = {}
        steps: list[ImageStep] = []
        for step in self.steps:
            if step.kind == "add" and step.local is not None:
                content = _tar(Path(step.local))
                digest = digest_of(content)
                blobs[digest] = content
                step = step.model_copy(update={"digest": digest, "local": None})
            steps.append(step)
        return self.model_copy(update={"steps": tuple(steps)}), blobs

    def _with(self, step: ImageStep) -> Image:
        return self.model_copy(update={"steps": (*self.steps, step)})


def _text(name: str, value: object, *, no_space: bool = False) -> str:
    if (
        not isinstance(value, str)
        or not value.strip()
        or "\0" in value
        or (no_space and any(char.isspace() for char in value))
    ):
        raise InvalidOptionError(
            f"{name}={value!r} is not valid: it takes a non-empty string"
            f"{' without white space' if no_space else ''}. Correct it."
        )
    return value


def _texts(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise InvalidOptionError(f"no {name} was given: name at least one.")
    return tuple(_text(name, value) for value in values)


def _existing(path: str | Path, kind: str) -> Path:
    found = Path(path).expanduser().absolute()
    if not (found.is_file() if kind == "file" else found.is_dir()):
        raise InvalidOptionError(f"{str(path)!r} is no {kind} on this machine. Check the path.")
    return found


def _read(path: str | Path) -> str:
    try:
        return _existing(path, "file").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOptionError(f"{str(path)!r} cannot be read: {error}. Check it.") from None


def _requirement_lines(path: str | Path) -> list[str]:
    lines: list[str] = []
    for raw in _read(path).splitlines():
        line = raw.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("-"):
            raise InvalidOptionError(
                f"{path}: option line {line!r} is not supported: only requirements are taken. "
                f"Put the packages it refers to into the file itself."
            )
        lines.append(line)
    return lines


def _pyproject_requirements(path: str | Path, extras: list[str] | None) -> list[str]:
    try:
        import tomllib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found,no-redef,unused-ignore]
    try:
        project = tomllib.loads(_read(path)).get("project", {})
    except tomllib.TOMLDecodeError as error:
        raise InvalidOptionError(f"{str(path)!r} is no TOML: {error}. Correct it.") from None
    found = [str(item) for item in project.get("dependencies", [])]
    optional = project.get("optional-dependencies", {})
    for extra in extras or []:
        if extra not in optional:
            raise InvalidOptionError(
                f"{str(path)!r} has no optional dependencies {extra!r}: it has "
                f"{', '.join(sorted(optional)) or 'none'}. Name one of them."
            )
        found += [str(item) for item in optional[extra]]
    return found


def _tar(path: Path) -> bytes:
    """Pack a file or directory reproducibly: equal content gives equal bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if info.name.endswith((".pyc", "__pycache__")):
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        try:
            archive.add(path, arcname=".", filter=plain)
        except OSError as error:
            raise InvalidOptionError(
                f"{str(path)!r} cannot be read: {error}. It must still be there when the app is "
                f"deployed or first used."
            ) from None
    return buffer.getvalue()
