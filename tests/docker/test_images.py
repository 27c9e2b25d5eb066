from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from apothic.errors import ImageBuildError, ImageNotFoundError, InvalidOptionError
from apothic.image import Image
from ray_backend.sandbox.engine.connection import Engine
from ray_backend.sandbox.engine.images import clean_builds, ensure_image, image_defaults
from ray_backend.sandbox.engine.labels import BUILD, BUILD_UNFINISHED, OwnerLabels
from tests.docker.support import BUSYBOX, run_inside, start_python
from tests.support import eventually, read_line

Later = Callable[[str], str]


def build(engine: Engine, image: Image, progress: Callable[[str], None] | None = None) -> str:
    packed, blobs = image.pack()
    return ensure_image(engine, packed, blobs.__getitem__, progress=progress)


def leftovers(engine: Engine) -> list[str]:
    wanted = {"label": f"{BUILD}={BUILD_UNFINISHED}", "dangling": True}
    return [
        *(found["Id"] for found in engine.api.images(filters=wanted)),
        *(found.id for found in engine.list_containers({BUILD: BUILD_UNFINISHED})),
    ]


def test_every_kind_of_step(
    engine: Engine, owner: OwnerLabels, remove_image: Later, tmp_path: Path
):
    source = tmp_path / "source"
    (source / "sub dir").mkdir(parents=True)
    (source / "sub dir" / "$file").write_text("content")
    (source / "run.sh").write_text("echo ran")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("run.sh")
    recipe = (
        Image.from_registry(BUSYBOX)
        .env(PLAIN="a b", TRICKY="$HOME \"q\" 'q' \\x #y", EMPTY="")
        .workdir("/work $dir")
        .run_commands("echo one > made", "pwd >> made")
        .add_local_dir(source, "/added")
        .add_local_file(source / "run.sh", "single.sh")
        .add_local_file(source / "run.sh", "/deep/er/named/")
        .with_dockerfile("USER nobody")
    )
    said: list[str] = []
    tag = remove_image(build(engine, recipe, said.append))
    assert any(line.startswith("Step 1/") for line in said)
    defaults = image_defaults(engine, tag)
    assert defaults.user == "nobody"
    assert defaults.working_directory == "/work $dir"
    assert defaults.environment["TRICKY"] == "$HOME \"q\" 'q' \\x #y"
    assert (defaults.environment["PLAIN"], defaults.environment["EMPTY"]) == ("a b", "")
    out = run_inside(
        engine,
        owner,
        "cat '/work $dir/made' '/added/sub dir/$file'; echo; /added/link; readlink /added/link;"
        "'/work $dir/single.sh'; /deep/er/named; stat -c '%u %a' /added/run.sh",
        image=tag,
    )
    assert out == "one\n/work $dir\ncontent\nran\nrun.sh\nran\nran\n0 755\n"
    assert leftovers(engine) == []
    said.clear()
    assert build(engine, recipe, said.append) == tag
    assert said == []
    (source / "run.sh").write_text("echo other")
    other = remove_image(build(engine, recipe))
    assert other != tag


def test_image_with_nothing_in_it(engine: Engine, remove_image: Later):
    tag = remove_image(build(engine, Image.from_registry("scratch").env(A="1")))
    assert image_defaults(engine, tag).environment["A"] == "1"


def test_dockerfile_with_its_own_base(
    engine: Engine, owner: OwnerLabels, remove_image: Later, tmp_path: Path
):
    (tmp_path / "data").write_text("from the context")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(
        f"FROM {BUSYBOX} AS first\nRUN echo built > /built\nFROM {BUSYBOX}\n"
        f"COPY --from=first /built /built\nCOPY data /data\n"
    )
    recipe = Image.from_dockerfile(dockerfile, context_dir=tmp_path)
    tag = remove_image(build(engine, recipe))  # its declared base is in no registry here
    out = run_inside(engine, owner, "cat /built /data", image=tag)
    assert out == "built\nfrom the context"
    # The first stage is of no use any more, and untagged.
    assert leftovers(engine) == [] or clean_builds(engine)
    assert leftovers(engine) == []


def test_a_step_fails(engine: Engine):
    recipe = Image.from_registry(BUSYBOX).run_commands(
        "echo fine > /a", "echo the reason >&2; exit 3", "echo never"
    )
    with pytest.raises(ImageBuildError, match="the reason") as caught:
        build(engine, recipe)
    assert caught.value.step == "RUN echo the reason >&2; exit 3"
    assert "the reason" in caught.value.log
    assert "never" not in caught.value.log
    assert leftovers(engine) == []


def test_missing_base(engine: Engine):
    for recipe in (
        Image.from_registry("localhost:1/apothic-none:1"),
        Image.from_registry("localhost:1/apothic-none:1").run_commands("true"),
    ):
        with pytest.raises(ImageNotFoundError, match=r"could not be pulled: .*docker login"):
            build(engine, recipe)
    assert leftovers(engine) == []


def test_prebuilt_is_taken_as_it_is(engine: Engine):
    assert build(engine, Image.from_registry(BUSYBOX, prebuilt=True)) == BUSYBOX


def test_variable_with_a_line_break(engine: Engine):
    with pytest.raises(InvalidOptionError, match="line break"):
        build(engine, Image.from_registry(BUSYBOX).env(A="1\n2"))


def test_base_changes(engine: Engine, owner: OwnerLabels, remove_image: Later):
    """A base that was built anew on the node is built upon anew."""
    for number in (1, 2):
        engine.api.import_image_from_data(b"\0" * 1024, "apothic-test-base", str(number))
    remove_image("apothic-test-base:1")
    remove_image("apothic-test-base:2")
    remove_image("apothic-test-base:now")
    recipe = Image.from_registry("apothic-test-base:now").env(A="1")
    ids = []
    for number in (1, 2, 2):
        engine.api.tag(f"apothic-test-base:{number}", "apothic-test-base", "now")
        ids.append(image_defaults(engine, remove_image(build(engine, recipe))).id)
    assert ids[0] != ids[1] == ids[2]
    assert engine.inspect_image(ids[0]) is None


def test_builders_wait_for_one_another(engine: Engine, remove_image: Later):
    """Four processes, one recipe: one builds, all get the same image."""
    processes = [
        start_python(
            f"""
            import sys
            from apothic.image import Image
            from ray_backend.sandbox.engine.connection import Engine
            from tests.docker.test_images import build

            engine = Engine.connect()
            recipe = Image.from_registry("{BUSYBOX}").run_commands("head -c 8 /dev/urandom > /x")
            print("ready", flush=True)
            sys.stdin.readline()
            said = []
            print(build(engine, recipe, said.append), sum("Step 1" in line for line in said))
            """
        )
        for _ in range(4)
    ]
    for process in processes:
        read_line(process, "ready")
    outputs = [process.communicate("go\n") for process in processes]
    found = [out.split() for out, _ in outputs]
    assert all(len(words) == 2 for words in found), outputs
    for tag, _ in found:
        remove_image(tag)
    assert len({tag for tag, _ in found}) == 1
    assert sorted(count for _, count in found) == ["0", "0", "0", "1"]


_SLOW = "echo begun; tail -f /dev/null"


def test_builder_killed(engine: Engine):
    process = start_python(
        f"""
        from apothic.image import Image
        from ray_backend.sandbox.engine.connection import Engine
        from tests.docker.test_images import build

        recipe = Image.from_registry("{BUSYBOX}").run_commands("echo a > /a", "{_SLOW}")
        build(Engine.connect(), recipe, lambda line: print(line, flush=True))
        """
    )
    read_line(process, "begun")
    assert leftovers(engine)
    assert clean_builds(engine) == 0  # it runs: not ours to touch
    process.send_signal(signal.SIGKILL)
    process.communicate()
    eventually(lambda: clean_builds(engine) >= 0 and not leftovers(engine))


def test_builder_interrupted(engine: Engine):
    def progress(line: str) -> None:
        if line == "begun":
            raise KeyboardInterrupt

    recipe = Image.from_registry(BUSYBOX).run_commands("echo a > /a", _SLOW)
    with pytest.raises(KeyboardInterrupt):
        build(engine, recipe, progress)
    eventually(lambda: clean_builds(engine) >= 0 and not leftovers(engine), timeout_s=10)
