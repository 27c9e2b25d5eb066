"""Compile the agent: small, static, for both architectures, with no compiler installed.

The build hook (``hatch_build.py``) loads this file by its path, so it imports nothing of this
package. The PyPI package ``ziglang`` brings clang and musl. ``python -m
ray_backend.sandbox.agent.build`` does the same by hand, after a change of the sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TARGETS = ("x86_64", "aarch64")
"""What `platform.machine` says on Linux."""
SOURCES = (
    "agent.c",
    "gate.c",
    "streams.c",
    "exec.c",
    "keepers.c",
    "transfer.c",
    "hosts.c",
    "files.c",
    "keeper.c",
    "leader.c",
    "identity.c",
    "tree.c",
    "wire.c",
)
_HERE = Path(__file__).parent
BIN = _HERE / "bin"
"""Where the wheel has the binaries, and a checkout once it has built them."""
STAMP = "sources.sha256"
"""Beside the binaries: the digest of the sources that they were made from."""
_COMMON = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wshadow")
_SHIPPED = (
    "-static",
    "-Os",
    "-s",
    "-fstack-protector-strong",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wl,--gc-sections",
)
_CHECKED = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
_STRICT = ("-fno-sanitize-recover=all",)


class BuildError(RuntimeError):
    """The compiler refused; the message is what it said."""


def binary_name(target: str) -> str:
    """Give the file name of the agent for an architecture."""
    return f"agent-{target}"


def source_digest() -> str:
    """Give the SHA-256, in hex, of the sources, the headers and this file, which has the options."""
    digest = hashlib.sha256()
    for path in sorted([*_HERE.glob("*.[ch]"), Path(__file__)], key=lambda path: path.name):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def is_current(out_dir: Path = BIN) -> bool:
    """Tell whether ``out_dir`` holds every binary, made from the sources as they are."""
    try:
        stamp = (out_dir / STAMP).read_text(encoding="ascii").strip()
    except OSError:
        return False
    present = all((out_dir / binary_name(target)).is_file() for target in TARGETS)
    return present and stamp == source_digest()


def build(out_dir: Path = BIN, cache: Path | None = None) -> list[Path]:
    """Put the agent into ``out_dir`` unless it is current; give the paths, as in `TARGETS`.

    The same sources and the same version of ziglang give the same bytes. A compilation takes about a
    second, but up to a minute with a ziglang at a new path, as in every isolated build, because
    then musl is compiled too; so what comes of it is kept in ``cache`` as well.

    Args:
        out_dir: where to.
        cache: a directory to keep results in; None: ``apothic-ray`` in the user's cache directory.

    Raises:
        BuildError: ziglang is not installed in this environment, or the compiler refused.
    """
    names = [binary_name(target) for target in TARGETS]
    paths = [out_dir / name for name in names]
    if is_current(out_dir):
        return paths
    digest = source_digest()
    kept = _cache_of(digest, cache)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / STAMP).unlink(missing_ok=True)
    if kept is not None and is_current(kept):
        for name in names:
            _place(kept / name, out_dir / name)
    else:
        with ThreadPoolExecutor(len(TARGETS)) as pool:
            list(pool.map(_compile_shipped, TARGETS, paths))
        if kept is not None:
            _keep(paths, digest, kept)
    (out_dir / STAMP).write_text(digest + "\n", encoding="ascii")
    return paths


def _compile_shipped(target: str, path: Path) -> None:
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", f"{target}-linux-musl")
    _compile((*compiler, *_COMMON, *_SHIPPED), path)


def _cache_of(digest: str, cache: Path | None) -> Path | None:
    """Give where the results of these sources and this compiler are kept; None for nowhere."""
    try:
        version = importlib.metadata.version("ziglang")
        if cache is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apothic-ray"
    except (importlib.metadata.PackageNotFoundError, RuntimeError):
        return None  # no ziglang, or no home
    return cache / f"agent-{digest[:32]}-{version}"


def _keep(paths: Sequence[Path], digest: str, kept: Path) -> None:
    """Fill the cache; one that cannot be written is done without."""
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        for path in paths:
            _place(path, kept / path.name)
        (kept / STAMP).write_text(digest + "\n", encoding="ascii")


def _place(source: Path, target: Path) -> None:
    """Copy to a name beside the target and move it there, so that it is never half there."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        os.replace(shutil.copy(source, scratch), target)


def build_checked(
    output: Path,
    sources: Iterable[Path] | None = None,
    cc: str = "cc",
    options: Sequence[str] = (),
) -> Path:
    """Compile for this machine with address and undefined-behaviour sanitizers, for tests.

    Args:
        output: the program to write.
        sources: instead of the agent's.
        cc: a compiler of the system.
        options: more of them.

    Raises:
        BuildError: there is no such compiler, or it refused.
    """
    return _compile((cc, *_COMMON, *_CHECKED, *_STRICT, f"-I{_HERE}", *options), output, sources)


def _compile(command: Sequence[str], output: Path, sources: Iterable[Path] | None = None) -> Path:
    """Compile to a name beside ``output`` and move it there, so that it is never half there."""
    files = [str(_HERE / name) for name in SOURCES] if sources is None else map(str, sources)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        unfinished = os.path.join(scratch, output.name)
        line = [*command, "-o", unfinished, *files]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise BuildError(f"no such compiler: {error.filename}") from error
        if done.returncode != 0:
            raise BuildError(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
        os.replace(unfinished, output)
    return output


if __name__ == "__main__":
    try:
        for path in build():
            print(path, path.stat().st_size)
    except BuildError as error:
        sys.exit(str(error))
