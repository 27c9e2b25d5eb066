"""Compile the agent: small, static, for both architectures, with no compiler installed.

Loaded by its path from the build hook, so it imports nothing of this package. The PyPI package
``ziglang`` brings clang and musl; `build_checked` takes the system's ``cc`` for the tests instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TARGETS = ("x86_64", "aarch64")
"""What `platform.machine` says on Linux."""
SOURCES = ("agent.c", "exec.c", "transfer.c", "files.c", "keeper.c", "tree.c", "wire.c")
_HERE = Path(__file__).parent
_COMMON = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wshadow")
_SIZE = ("-static", "-Os", "-s", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections")
_CHECKED = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
_STRICT = ("-fno-sanitize-recover=all",)


class BuildError(RuntimeError):
    """The compiler refused; the message is what it said."""


def binary_name(target: str) -> str:
    """Give the file name of the agent for an architecture."""
    return f"agent-{target}"


def build(out_dir: Path, targets: Sequence[str] = TARGETS) -> list[Path]:
    """Compile the agent into ``out_dir`` and give the paths, in the order of ``targets``.

    The same sources and the same version of ziglang give the same bytes. Takes a few seconds a
    target, the first time about 20 s, because musl is compiled too.

    Raises:
        BuildError: ziglang is not installed in this environment, or the compiler refused.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    compiler = (sys.executable, "-m", "ziglang", "cc")
    paths = []
    for target in targets:
        options = (*_SIZE, "-target", f"{target}-linux-musl")
        paths.append(_compile((*compiler, *_COMMON, *options), out_dir / binary_name(target)))
    return paths


def build_checked(
    output: Path,
    sources: Sequence[Path] | None = None,
    cc: str = "cc",
    options: Sequence[str] = (),
) -> Path:
    """Compile for this machine with address and undefined-behaviour sanitizers, for tests.

    Raises:
        BuildError: there is no such compiler, or it refused.
    """
    line = (cc, *_COMMON, *_CHECKED, *_STRICT, f"-I{_HERE}", *options)
    return _compile(line, output, sources)


def _compile(command: Sequence[str], output: Path, sources: Sequence[Path] | None = None) -> Path:
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
    for path in build(Path(sys.argv[1] if len(sys.argv) > 1 else _HERE / "bin")):
        print(path, path.stat().st_size)
