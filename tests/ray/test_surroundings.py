"""What an instance finds around it: secrets, volumes, the image's packages, files and variables."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import ray

from apothic import App, Image, Secret, Volume, method
from apothic.errors import (
    ConflictError,
    EnvironmentSetupError,
    InstanceStartError,
    SecretNotFoundError,
    VolumeNotFoundError,
)
from ray_backend import environments, ray_api
from ray_backend.registry import Registry

pytestmark = pytest.mark.ray

VALUE = "correct-horse-battery-staple"


class Probe:
    """What the classes below have in common; every fact is read in the worker."""

    def __init__(self, path: str = "") -> None:
        self.found = sorted(os.listdir(path)) if path else []

    @method()
    def env(self, name: str) -> str | None:
        return os.environ.get(name)

    @method()
    def seen_at_construction(self) -> list[str]:
        return self.found

    @method()
    def read(self, path: str) -> str:
        return Path(path).read_text()

    @method()
    def write(self, path: str, text: str) -> None:
        Path(path).write_text(text)

    @method()
    def cwd(self) -> str:
        return os.getcwd()

    @method()
    def version(self, module: str) -> str:
        import importlib
        from importlib.metadata import version

        importlib.import_module(module)
        return version(module)

    @method()
    def python(self) -> str:
        import sys

        return sys.prefix

    @method()
    def mode(self, path: str) -> int:
        return os.stat(path).st_mode & 0o777


def probe_class(app_name: str, **options: object) -> object:
    app = App(app_name)
    return app.cls(name="Probe", cpu=0, memory_mb=10, **options)(Probe)  # type: ignore[arg-type]


# -- secrets ---------------------------------------------------------------------------------------


@pytest.fixture
def secret(ray_cluster: str):
    stored = Secret.create("KEY", VALUE)
    yield stored
    stored.delete()


def test_secret_is_in_the_environment_and_nowhere_else(secret: Secret, tmp_path: Path) -> None:
    cls = probe_class("secrets", secrets=[secret])
    inst = cls.named("one")
    assert inst.env.remote("KEY") == VALUE
    shown = [
        repr(secret),
        repr(cls),
        repr(inst),
        inst.handle_json,
        inst.inspect().model_dump_json(),
        cls.inspect().model_dump_json(),
        cls.spec.model_dump_json(),
        repr(ray_api.actor_record(inst.actor._actor_id.hex())),
        repr(ray.util.list_named_actors(all_namespaces=True)),
    ]
    assert not [text for text in shown if VALUE in text]
    # Ray's logs of the whole session.
    logs = ray_api.session_directory() / "logs"
    hits = subprocess.run(
        ["grep", "-rl", VALUE, str(logs)], capture_output=True, text=True, check=False
    )
    assert hits.stdout == ""
    inst.close()


def test_secret_with_several_variables_set_before_construction(ray_cluster: str) -> None:
    stored = Secret.create("many", {"FIRST_KEY": "1", "SECOND_KEY": "2"})
    app = App("secrets-many")

    @app.cls(cpu=0, memory_mb=10, secrets=[stored])
    class AtStart:
        def __init__(self, first: str = "") -> None:
            self.seen = os.environ["FIRST_KEY"] + os.environ["SECOND_KEY"]

        @method()
        def value(self) -> str:
            return self.seen

    inst = AtStart.new()
    assert inst.value.remote() == "12"
    assert "FIRST_KEY" not in os.environ
    inst.close()
    stored.delete()
    with pytest.raises(InstanceStartError, match=r"secret 'many' is not stored"):
        AtStart.new()
    with pytest.raises(SecretNotFoundError, match="many"):
        stored.delete()


def test_secret_is_not_replaced_unless_set(secret: Secret) -> None:
    with pytest.raises(ConflictError, match=r"Secret\.set") as caught:
        Secret.create("KEY", "other-" + VALUE)
    assert VALUE not in str(caught.value)
    Secret.set("KEY", "new")
    assert [s.name for s in Secret.list()] == ["KEY"]
    inst = probe_class("secrets-set", secrets=[Secret.from_name("KEY")]).new()
    assert inst.env.remote("KEY") == "new"
    inst.close()


# -- volumes ---------------------------------------------------------------------------------------


@pytest.fixture
def mount_root(tmp_path: Path) -> Path:
    return tmp_path / "mounts"


def test_host_local_volume_outlives_its_instances(ray_cluster: str, mount_root: Path) -> None:
    path = str(mount_root / "data")
    volume = Volume.vast_local("kept", size_gb=1, mount_path=path)
    cls = probe_class("volumes", volumes=[volume])
    try:
        first, second = cls.new(path), cls.new(path)
        assert first.seen_at_construction.remote() == []
        first.write.remote(f"{path}/file", "hello")
        assert second.read.remote(f"{path}/file") == "hello"
        first.close()
        assert second.read.remote(f"{path}/file") == "hello"  # the other's end took nothing away
        second.close()
        assert not os.path.lexists(path)
        # At another place, by the mapping form, and there before the constructor runs.
        elsewhere = str(mount_root / "elsewhere")
        third = probe_class("volumes-2", volumes={elsewhere: volume}).new(elsewhere)
        assert third.seen_at_construction.remote() == ["file"]
        third.close()
        with pytest.raises(ConflictError, match="size_gb"):
            Volume.create("kept", backend="vast_local", size_gb=2)
        with pytest.raises(ConflictError, match="backend"):
            Volume.create("kept", backend="cloud_bucket")
        assert [found.name for found in Volume.list()] == ["kept"]
    finally:
        volume.delete()
    assert Volume.list() == []
    with pytest.raises(VolumeNotFoundError):
        volume.delete()
    fresh = cls.new(path)
    assert fresh.seen_at_construction.remote() == []
    fresh.close()
    volume.delete()


def test_a_killed_process_leaves_no_link_that_hinders(ray_cluster: str, mount_root: Path) -> None:
    path = str(mount_root / "data")
    volume = Volume.vast_local("stale", size_gb=1, mount_path=path)
    other = Volume.vast_local("stale-other", size_gb=1, mount_path=path)
    try:
        inst = probe_class("volumes-3", volumes=[volume]).named("n", path)
        inst.write.remote(f"{path}/file", "hello")
        ray.kill(inst.actor)
        second = probe_class("volumes-4", volumes=[other]).new(path)
        assert second.seen_at_construction.remote() == []
        with pytest.raises(InstanceStartError, match="is in use on this node"):
            probe_class("volumes-5", volumes=[volume]).new(path)
        second.close()
    finally:
        volume.delete()
        other.delete()


def test_missing_volume_and_taken_path(ray_cluster: str, tmp_path: Path) -> None:
    missing = Volume.from_name("nowhere", mount_path=str(tmp_path / "m"))
    with pytest.raises(VolumeNotFoundError, match="create_if_missing"):
        probe_class("volumes-6", volumes=[missing]).new()
    taken = tmp_path / "taken"
    taken.mkdir()
    volume = Volume.vast_local("taken", size_gb=1, mount_path=str(taken))
    with pytest.raises(InstanceStartError, match="exists on this node and is not ours"):
        probe_class("volumes-7", volumes=[volume]).new()
    volume.delete()
    assert taken.is_dir()


def test_portable_volume_needs_a_shared_root(ray_cluster: str, tmp_path: Path) -> None:
    volume = Volume.cloud("portable", mount_path=str(tmp_path / "p"))
    with pytest.raises(InstanceStartError, match="APOTHIC_SHARED_ROOT"):
        probe_class("volumes-8", volumes=[volume]).new()
    assert Registry().list_volumes() == ["portable"]
    Registry().delete_volume("portable")


# -- images ----------------------------------------------------------------------------------------


def test_variables_files_and_working_directory(ray_cluster: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a.txt").write_text("a")
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    target = tmp_path / "target"
    image = (
        Image.debian_slim(python_version="3.11")
        .env(COLOUR="red", SIZE=3)
        .workdir(str(target / "work"))
        .add_local_dir(source, str(target / "there"))
        .add_local_file(script)
    )
    inst = probe_class("image", image=image).new()
    assert (inst.env.remote("COLOUR"), inst.env.remote("SIZE")) == ("red", "3")
    assert inst.cwd.remote() == str(target / "work")
    assert inst.read.remote(f"{target}/there/inner/a.txt") == "a"
    assert inst.mode.remote("run.sh") == 0o755
    inst.close()


def test_satisfied_packages_are_not_installed_again(ray_cluster: str) -> None:
    inst = probe_class("satisfied", image=Image.debian_slim().pip_install("pydantic>=2")).new()
    plain = probe_class("plain").new()
    assert inst.python.remote() == plain.python.remote()
    inst.close()
    plain.close()


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_missing_packages_are_installed(ray_cluster: str, installer: str) -> None:
    image = Image.debian_slim()
    wanted = "sqids==0.5.1"
    image = image.pip_install(wanted) if installer == "pip" else image.uv_pip_install(wanted)
    inst = probe_class(f"install-{installer}", image=image).new()
    assert inst.version.remote("sqids") == "0.5.1"
    inst.close()


def test_package_that_does_not_exist(ray_cluster: str) -> None:
    image = Image.debian_slim().pip_install("sqids==999.0")
    with pytest.raises(EnvironmentSetupError, match=r"sqids==999\.0"):
        probe_class("no-such-package", image=image).new()


def test_container_step_says_what_the_node_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    problem = environments._build(Image.debian_slim().apt_install("git").model_dump_json(), "x")
    assert problem is not None
    assert "has no podman" in problem
    assert "apt-get install podman" in problem


@pytest.mark.skipif(shutil.which("podman") is None, reason="containers of classes need podman")
def test_container_is_built_with_its_context(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "hello.txt").write_text("hello")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY hello.txt /there/hello.txt\n")
    recipe = Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path / "context")
    image, blobs = recipe.pack()
    for digest, content in blobs.items():
        Registry().put_blob(digest, content)
    tag = environments.build_on_node(image)
    try:
        assert environments.build_on_node(image) == tag  # it is there already
        made = subprocess.run(
            ["podman", "create", tag, "x"], capture_output=True, text=True, check=True
        ).stdout.strip()
        subprocess.run(["podman", "cp", f"{made}:/there/hello.txt", str(tmp_path)], check=True)
        subprocess.run(["podman", "rm", made], capture_output=True, check=True)
        assert (tmp_path / "hello.txt").read_text() == "hello"
    finally:
        subprocess.run(["podman", "rmi", "-f", tag], capture_output=True, check=False)
    failing, _ = Image.from_registry("localhost/none/such").run_commands("true").pack()
    with pytest.raises(EnvironmentSetupError, match="could not build the image"):
        environments.build_on_node(failing)


def test_another_python_is_refused(ray_cluster: str) -> None:
    with pytest.raises(EnvironmentSetupError, match=r"python_version='3\.9'"):
        probe_class("python", image=Image.debian_slim(python_version="3.9")).new()
