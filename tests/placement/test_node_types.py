"""Cluster files: what is read of them, and that ours are ones that Ray takes."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from apothic import cli
from apothic.constraints import PlacementConstraints
from apothic.errors import InvalidOptionError
from apothic.node_types import NodeType, read_node_types
from ray_backend.placement.catalogue import describe
from ray_backend.placement.demand import plan

TOP = Path(__file__).parents[2]
LAUNCHER = TOP / "cluster.yaml"
KUBERAY = TOP / "cluster.kuberay.yaml"


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    return dict(yaml.safe_load(LAUNCHER.read_text()))


def test_ray_takes_the_cluster_file(
    launcher: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ray up` does before it asks the cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(TOP)
    prepared = prepare_config(copy.deepcopy(launcher))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(launcher["available_node_types"])


def test_labels_are_ones_that_ray_takes(launcher: dict[str, Any]) -> None:
    from ray._private import label_utils

    for entry in launcher["available_node_types"].values():
        label_utils.validate_node_label_syntax(entry["labels"])


def test_the_cluster_file_installs_this_package_and_asks_for_the_token(
    launcher: dict[str, Any],
) -> None:
    import ray

    (package,) = [line for line in launcher["setup_commands"] if "apothic-ray" in line]
    assert launcher["file_mounts"][package.split()[-1]] == "."
    assert any(f"ray[default]=={ray.__version__}" in line for line in launcher["setup_commands"])
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in launcher[commands][-1]


def test_the_cluster_file_leaves_no_image_and_no_python_to_chance(
    launcher: dict[str, Any],
) -> None:
    """Ray's own default is an image of Ubuntu 18.04; workers with GPUs need one with a driver."""
    for entry in launcher["available_node_types"].values():
        image = entry["node_config"]["ImageId"]
        assert image.startswith("ami-")
        assert ("nvidia" in image) == ("GPU" in entry["resources"])
    commands = launcher["setup_commands"]
    [made] = [i for i, line in enumerate(commands) if "-m venv" in line]
    version = re.search(r"python3\.(\d+) -m venv ~/(\S+)", commands[made])
    assert version is not None
    assert 10 <= int(version[1]) <= 13
    [found] = [i for i, line in enumerate(commands) if ">>~/.bashrc" in line]
    assert f'PATH="$HOME/{version[2]}/bin:$PATH"' in commands[found]
    installs = [i for i, line in enumerate(commands) if line.startswith("pip install")]
    assert made < found < min(installs)


def test_workers_keep_an_engine_that_they_have_and_give_it_their_gpus(
    launcher: dict[str, Any],
) -> None:
    install, _, toolkit = launcher["worker_setup_commands"]
    assert install.startswith("command -v docker >/dev/null ||")
    assert "if command -v nvidia-smi" in toolkit
    assert "nvidia-ctk runtime configure --runtime=docker" in toolkit


def test_commands_of_the_cluster_file_are_ones_of_bash(launcher: dict[str, Any]) -> None:
    for name, commands in launcher.items():
        for command in commands if name.endswith("_commands") else ():
            subprocess.run(["bash", "-n", "-c", f"({command})"], check=True)


@pytest.mark.parametrize(
    "page", [LAUNCHER, TOP / "docs" / "clusters.md"], ids=lambda page: page.name
)
def test_its_types_are_registered_where_the_file_is(launcher: dict[str, Any], page: Path) -> None:
    """On the head: a program elsewhere could not connect by the head's address."""
    [line] = [line for line in page.read_text().splitlines() if "ray exec" in line]
    command = shlex.split(line.lstrip("# "))
    assert command[:3] == ["ray", "exec", LAUNCHER.name]
    token, program, *arguments = shlex.split(command[3])
    assert (token, program) == ("RAY_AUTH_MODE=token", "apothic")
    path = cli._parser().parse_args(arguments).file
    place = path.replace("~", f"/home/{launcher['auth']['ssh_user']}").removesuffix("/cluster.yaml")
    assert launcher["file_mounts"][place] == "."
    assert not any("yaml" in pattern for pattern in launcher["rsync_exclude"])


def test_the_dashboard_is_reached_through_a_tunnel(launcher: dict[str, Any]) -> None:
    """It listens on the head alone, so no documented address names the head."""
    kuberay = yaml.safe_load(KUBERAY.read_text())
    host = kuberay["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"]
    assert f"--dashboard-host={host}" in launcher["head_start_ray_commands"][-1]
    assert host == "127.0.0.1"
    page = (TOP / "docs" / "clusters.md").read_text()
    assert set(re.findall(r"--address (\S+:8265)", page)) == {"http://localhost:8265"}
    assert "ray dashboard cluster.yaml" in page
    assert f"port-forward svc/{kuberay['metadata']['name']}-head-svc 8265" in page


def test_its_worker_types_are_offers() -> None:
    types = {each.name: each for each in read_node_types(LAUNCHER)}
    assert list(types) == ["sandbox-cpu", "gpu-a10g", "gpu-a100"]
    offers = [describe(each) for each in types.values()]
    assert [offer.offer_id for offer in offers] == list(types)
    assert [offer.gpus for offer in offers] == [0, 1, 8]
    assert not any(offer.malformed for offer in offers)
    wanted = PlacementConstraints.check(gpu=["A100", "A10G"], max_cost_per_hour_usd=2)
    found = plan(wanted, cpu=4, memory_mb=16384, nodes=[], registered=offers)
    assert [choice.name for choice in found.choices] == ["gpu-a10g"]
    assert found.demands[0].resources == {"offer:gpu-a10g": 0.001}


def test_kuberay_has_the_same_node_types(launcher: dict[str, Any]) -> None:
    """Read by the autoscaler's own reader of a RayCluster."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    cluster = yaml.safe_load(KUBERAY.read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    types = autoscaling_config._generate_available_node_types_from_ray_cr_spec(cluster["spec"])
    head = types.pop("headgroup")
    wanted = dict(launcher["available_node_types"])
    for found, entry in (
        (head, wanted.pop("head")),
        *((types[name], entry) for name, entry in wanted.items()),
    ):
        assert found["resources"] == entry["resources"]
        assert found["labels"] == entry["labels"]
    assert set(types) == set(wanted)
    for name, entry in wanted.items():
        assert types[name]["min_workers"] == entry["min_workers"]
        assert types[name]["max_workers"] == entry["max_workers"]


def test_every_kuberay_worker_reaches_an_engine_of_its_own() -> None:
    """Whose socket only root and one group may open: that of the user of Ray's images, 1000:100."""
    cluster = yaml.safe_load(KUBERAY.read_text())
    for group in cluster["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        ray_container, engine = pod["containers"]
        assert engine["args"] == ["--group=100"]
        assert engine["securityContext"] == {"privileged": True}
        shared = {each["name"]: each["mountPath"] for each in ray_container["volumeMounts"]}
        mounted = {each["name"]: each["mountPath"] for each in engine["volumeMounts"]}
        assert shared.items() <= mounted.items()
        assert shared["docker-socket"] == "/var/run"
        room = {each["name"]: each["emptyDir"].get("sizeLimit") for each in pod["volumes"]}
        assert set(room) == set(mounted)
        assert room["docker-data"] == f"{group['labels']['apothic.io/disk-gb']}Gi"


def write(path: Path, node_types: Any) -> Path:
    file = path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"available_node_types": node_types}))
    return file


GOOD: dict[str, Any] = {
    "resources": {"CPU": 4, "memory": 2**34, "offer:x": 1},
    "labels": {"apothic.io/country": "DE"},
}


def test_what_is_no_offer_or_cannot_be_started_is_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"head": {"resources": {}}, "x": GOOD, "off": {**GOOD, "max_workers": 0}},
    )
    assert read_node_types(file) == [
        NodeType(name="x", resources=GOOD["resources"], labels=GOOD["labels"])
    ]


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ({"head": {"resources": {"CPU": 1}}}, "no node type in .* is an offer"),
        ({"x": {}}, "'x' .* has no resources"),
        ({"x": {**GOOD, "resources": {"offer:x": 1, "CPU": 1}}}, "states no memory"),
        ({"x": {**GOOD, "resources": {**GOOD["resources"], "GPU": "two"}}}, "GPU='two'"),
        ({"x": {**GOOD, "labels": {"apothic.io/vram-gb": 80}}}, "Quote the values"),
        (None, "not a Ray cluster-launcher file"),
    ],
)
def test_files_that_say_too_little_are_refused(tmp_path: Path, types: Any, words: str) -> None:
    with pytest.raises(InvalidOptionError, match=words):
        read_node_types(write(tmp_path, types))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="cannot be read"):
        read_node_types(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InvalidOptionError, match="not valid YAML"):
        read_node_types(tmp_path / "bad.yaml")


def test_a_type_takes_one_offer() -> None:
    with pytest.raises(InvalidOptionError, match="exactly one"):
        describe(NodeType(name="x", resources={"CPU": 1, "offer:a": 1, "offer:b": 1}, labels={}))
