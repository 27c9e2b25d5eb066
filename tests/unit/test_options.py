"""Names, retry policies, options, secrets, volumes and images: what is accepted, and as what."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apothic import App, Image, Retries, Secret, Volume, method
from apothic.errors import InvalidOptionError
from apothic.names import actor_name, check_instance_id, check_name
from apothic.options import ClassOptions
from apothic.volume import check_same_volume, mounts_from


class Plain:
    @method()
    def m(self) -> None: ...


def options(**given_options: object) -> ClassOptions:
    return App("options").cls(**given_options)(Plain).options


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "_a", "A.b-c_9", "x" * 63])
def test_names(name: str) -> None:
    assert check_name("app", name) == name


@pytest.mark.parametrize("instance_id", ["1", "user@example.org", "a/b c:d", "ü", "x" * 128])
def test_instance_ids(instance_id: str) -> None:
    assert check_instance_id(instance_id) == instance_id


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_instances_never_share_an_actor_name(one: str, two: str) -> None:
    names = {
        actor_name("a", "b", one),
        actor_name("a", "b", two),
        actor_name("a", f"b.{one[0]}", two),
    }
    assert len(names) == len({("b", one), ("b", two), (f"b.{one[0]}", two)})


# -- retries ---------------------------------------------------------------------------------------


@given(st.floats(1, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 10_000))
def test_delays_grow_up_to_the_longest(
    factor: float, initial: float, more: float, attempt: int
) -> None:
    policy = Retries(1, factor, initial, initial + more)
    assert initial <= policy.delay_s(attempt) <= policy.delay_s(attempt + 1) <= policy.max_delay


def test_policies_are_values() -> None:
    assert Retries(2) == Retries(2, 2.0, 1.0, 60.0)
    assert len({Retries(2), Retries(2), Retries(3)}) == 2
    with pytest.raises(AttributeError):
        Retries(2).max_retries = 3  # type: ignore[misc]


# -- options ---------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract() -> None:
    found = options()
    assert (found.cpu, found.memory_mb, found.timeout_s) == (1, 1024, 600)
    assert (found.concurrent_requests, found.max_pending_tasks) == (1, 100)
    assert (found.max_containers, found.tasks_per_container) == (1, 1)
    assert found.retries.max_retries == 0


@pytest.mark.parametrize(
    "given_options",
    [{"concurrent_requests": 200}, {"concurrent_requests": 3, "max_pending_tasks": 2}],
)
def test_one_process_need_not_fill_a_container(given_options: dict[str, int]) -> None:
    for found in (
        options(**given_options),
        App("many").sandbox(**given_options).options,  # type: ignore[arg-type]
    ):
        assert found.model_dump(include=given_options.keys()) == given_options


@pytest.mark.parametrize(
    ("given_options", "expected"),
    [
        ({"retries": 3}, Retries(3)),
        ({"max_retries": 2}, Retries(2)),
        ({"retries": 2, "max_retries": 2}, Retries(2)),
        ({"retries": Retries(4, 1, 0, 0)}, Retries(4, 1, 0, 0)),
        ({"retries": Retries(4, 3.0, 0.5, 9), "max_retries": 4}, Retries(4, 3.0, 0.5, 9)),
        ({"retries": 0}, Retries(0)),
    ],
)
def test_retries_in_every_form(given_options: dict[str, object], expected: Retries) -> None:
    assert options(**given_options).retries == expected


def test_options_survive_json() -> None:
    found = options(
        cpu=0,
        timeout_s=1.5,
        retries=Retries(2, 3.0, 0.5, 9.0),
        image=Image.debian_slim().pip_install("a").env(A="b"),
        secrets=[Secret("ONE"), Secret("TWO"), Secret("ONE")],
        volumes={"/a/": Volume.cloud("v"), "/b": Volume.vast_local("w", size_gb=2)},
    )
    assert ClassOptions.model_validate_json(found.model_dump_json()) == found
    assert found.secrets == ("ONE", "TWO")
    assert [(mount.path, mount.volume, mount.backend) for mount in found.mounts] == [
        ("/a", "v", "cloud_bucket"),
        ("/b", "w", "vast_local"),
    ]


def test_generators_take_retries_beside_other_methods_only() -> None:
    class Yields:
        @method()
        def items(self):
            yield 1

    class Both(Yields):
        @method()
        def one(self) -> int:
            return 1

    with pytest.raises(InvalidOptionError, match="generator"):
        App("options").cls(retries=1)(Yields)
    assert App("options").cls(retries=1)(Both).options.max_retries == 1


# -- secrets and volumes ---------------------------------------------------------------------------


def test_secrets_show_their_name_alone() -> None:
    secret = Secret("TOKEN")
    assert repr(secret) == str(secret) == "Secret('TOKEN')"
    assert secret == Secret.from_name("TOKEN")
    assert len({secret, Secret("TOKEN"), Secret("OTHER")}) == 2
    with pytest.raises(AttributeError):
        secret.value = "hunter2"  # type: ignore[attr-defined]  # there is no place for one


def test_volumes_in_a_list_need_their_path() -> None:
    volume = Volume.cloud("v", mount_path="/data")
    assert mounts_from([volume]) == {"/data": volume}
    assert mounts_from({"/x/../data//": volume}) == {"/data": volume}
    assert mounts_from(None) == mounts_from([]) == {}


def test_a_size_that_is_not_given_matches_any() -> None:
    check_same_volume(Volume("v", size_gb=3), Volume("v"))
    check_same_volume(Volume("v"), Volume("v", size_gb=3))


# -- images ----------------------------------------------------------------------------------------


def test_every_step_gives_a_new_image(tmp_path: Path) -> None:
    (tmp_path / "req.txt").write_text("# comment\none==1  # why\n\ntwo\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["c"]\n[project.optional-dependencies]\nx = ["d"]\n'
    )
    (tmp_path / "env").write_text("# c\nexport A='1 2'\nB=\"x\"\nC=d=e\n")
    (tmp_path / "Dockerfile").write_text("RUN true\n")
    base = Image.debian_slim(python_version="3.12")
    images = [
        base,
        base.pip_install("a", "b"),
        base.uv_pip_install("a"),
        base.pip_install_from_requirements(tmp_path / "req.txt"),
        base.pip_install_from_pyproject(tmp_path / "pyproject.toml", optional_dependencies=["x"]),
        base.env({"A": 1}, B=True),
        base.env_file(tmp_path / "env"),
        base.run_commands("true"),
        base.command_shell("/bin/bash -c"),
        base.workdir("/w"),
        base.apt_install("git"),
        base.with_dockerfile("RUN true"),
        base.add_local_file(tmp_path / "req.txt"),
        base.add_local_dir(tmp_path, "/data"),
        base.add_local_python_source("apothic"),
        Image.from_registry("python:3.11"),
        Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path),
    ]
    assert base.steps == ()
    for number, image in enumerate(images):
        assert image not in images[:number]
        assert Image.model_validate_json(image.model_dump_json()) == image
    assert [image.needs_container for image in images].count(True) == 6
    assert images[3].steps[0].values == ("one==1", "two")
    assert images[4].steps[0].values == ("c", "d")
    assert images[5].steps[0].variables == {"A": "1", "B": "True"}
    assert images[6].steps[0].variables == {"A": "1 2", "B": "x", "C": "d=e"}


def test_files_are_packed_by_content(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "f.txt").write_text("same")
        (tmp_path / place / "g.pyc").write_text(place)
    packed = [Image.debian_slim().add_local_dir(tmp_path / p, "/d").pack() for p in ("one", "two")]
    assert packed[0] == packed[1]  # neither times, nor owners, nor byte code count
    image, blobs = packed[0]
    assert image.steps[0].local is None
    with tarfile.open(fileobj=io.BytesIO(blobs[image.steps[0].digest or ""])) as archive:
        assert sorted(archive.getnames()) == [".", "./f.txt"]
    (tmp_path / "two" / "f.txt").write_text("other")
    assert Image.debian_slim().add_local_dir(tmp_path / "two", "/d").pack()[0] != image
