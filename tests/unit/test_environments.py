"""What images of classes become: what is built, and what of a recipe is left for the worker."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import ray

import apothic
from apothic import Image
from apothic.errors import EnvironmentSetupError
from ray_backend import environments
from ray_backend.dockerfile import dockerfile_of
from ray_backend.environments import Environment, compile_image
from tests.placement.nodes import node

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER = "3.10" if HERE != "3.10" else "3.12"
INSTALL = (
    f"RUN python -m pip install --no-cache-dir ray=={ray.__version__} "
    f"apothic-ray=={apothic.__version__}"
)


def compiled(image: Image) -> tuple[Environment, list[Image]]:
    built: list[Image] = []

    def build(recipe: Image) -> str:
        built.append(recipe)
        return "built"

    return compile_image(image, missing=list, build=build), built


def lines(image: Image) -> list[str]:
    found, built = compiled(image)
    assert found.runtime_env is not None
    assert found.runtime_env["image_uri"] == "built"
    (recipe,) = built
    return dockerfile_of(recipe, complete=True).splitlines()


@pytest.mark.parametrize(
    "image",
    [
        Image.debian_slim().apt_install("git"),
        Image.debian_slim(python_version=HERE).pip_install("numpy").run_commands("true"),
    ],
)
def test_a_container_runs_rays_workers_on_the_clusters_python(image: Image) -> None:
    found = lines(image)
    assert found[0] == f"FROM python:{HERE}-slim"
    assert len(found) == len(image.steps) + 3
    assert found[-1] == INSTALL


def test_a_base_of_the_users_is_kept_and_gets_ray(tmp_path: Path) -> None:
    assert lines(Image.from_registry("debian:stable"))[0] == "FROM debian:stable"
    (tmp_path / "Dockerfile").write_text("FROM mine\nRUN true\n")
    found = lines(Image.from_dockerfile(tmp_path / "Dockerfile"))
    assert (found[0], found[-1]) == ("FROM mine", INSTALL)


def test_a_build_tells_a_base_with_another_python() -> None:
    check = lines(Image.from_registry("debian:stable"))[-2].removeprefix("RUN ")
    program = shlex.split(check)
    assert program[:2] == ["python", "-c"]
    run = subprocess.run(
        [sys.executable, *program[1:]], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    other = [program[2].replace(f"'{HERE}'", f"'{OTHER}'")]
    run = subprocess.run(
        [sys.executable, "-c", *other], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert f"Python {HERE}" in run.stderr


def test_another_python_is_refused_with_a_container_and_without() -> None:
    base = Image.debian_slim(python_version=OTHER)
    for image in (base, base.apt_install("git")):
        with pytest.raises(
            EnvironmentSetupError, match=re.escape(f"the cluster runs Python {HERE}")
        ):
            compiled(image)


def test_a_prebuilt_image_is_run_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    plain = Image.from_registry("mine:1", prebuilt=True)
    image, _ = plain.env(A=1).workdir("/w").add_local_file(tmp_path / "f").pack()
    found, built = compiled(image)
    assert found.runtime_env == {"image_uri": "mine:1", "env_vars": {"A": "1"}}
    assert (found.workdir, [remote for remote, _ in found.files]) == ("/w", ["f"])
    assert built == []


def test_no_step_on_a_prebuilt_image_is_lost() -> None:
    plain = Image.from_registry("mine:1", prebuilt=True)
    for image in (
        plain.pip_install("numpy"),
        plain.uv_pip_install("numpy"),
        plain.apt_install("git"),
        plain.run_commands("true"),
        plain.command_shell("/bin/bash -c").run_commands("true"),
        plain.with_dockerfile("RUN true"),
    ):
        found = lines(image)
        assert found[0] == "FROM mine:1"
        assert len(found) == len(image.steps) + 1  # it has Ray and this package


def test_one_build_does_not_do_for_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("1"), node("2"), node("3", alive=False)]
    monkeypatch.setattr(environments, "live_nodes", lambda: nodes)
    with pytest.raises(EnvironmentSetupError, match=r"2 nodes.*prebuilt=True"):
        compile_image(Image.debian_slim().apt_install("git"))
