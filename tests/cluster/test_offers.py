"""Node types that the autoscaler could start: registered, listed, waited for, and unregistered."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from apothic.backend import connect
from apothic.errors import NoMatchingOfferError
from apothic.node_types import read_node_types
from ray_backend import ray_api
from tests.cluster.conftest import MIB, Nodes
from tests.support import eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FILE = """
available_node_types:
  head: {resources: {CPU: 2}}
  spot:
    resources: {CPU: 32, memory: 1073741824, "offer:spot": 1}
    labels: {apothic.io/cost-per-hour-usd: "0.2", apothic.io/country: "NO"}
"""


def test_a_registered_type_is_waited_for_until_it_starts(
    nodes: Nodes, define: Callable[..., Any], tmp_path: Path
) -> None:
    client = connect()
    cls = define(geolocation="NO")
    with pytest.raises(NoMatchingOfferError):
        cls.new()
    (tmp_path / "cluster.yaml").write_text(FILE)
    client.register_node_types(read_node_types(tmp_path / "cluster.yaml"))
    try:
        assert [each.name for each in client.list_node_types()] == ["spot"]
        assert re.search(r"^  spot +not started +0 USD/h +no$", cls.explain(), re.MULTILINE)
        assert "not started" in client.offers_table()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(cls.new)
            (waiting,) = eventually(
                lambda: [each for each in ray_api.actor_seats("PENDING_CREATION") if each.waits]
            )
            assert waiting.resources["offer:spot"] == 0.001  # what the autoscaler acts on
            label = {"apothic.io/country": "NO", "apothic.io/cost-per-hour-usd": "0.2"}
            nodes.add_offer("spot", num_cpus=32, memory=1024 * MIB, labels=label)
            with future.result(timeout=60) as inst:
                assert nodes.name(inst.node.remote()) == "spot"
        nodes.forget("spot")
    finally:
        assert client.unregister_node_type("spot")
    assert not client.unregister_node_type("spot")
    eventually(lambda: "spot" not in client.offers_table())


def test_the_table_of_offers(nodes: Nodes, define: Callable[..., Any]) -> None:
    eventually(nodes.are_free)
    lines = [line.split() for line in connect().offers_table().splitlines()]
    assert [
        "large",
        "1",
        "2x",
        "A100",
        "80",
        "16",
        "4096",
        "8",
        "US",
        "2",
        "GPU,",
        "16",
        "CPU",
    ] in lines
    assert ["t4", "1", "2x", "T4", "16", "4", "1024", "0.4", "DE", "2", "GPU,", "4", "CPU"] in lines


def test_the_command_registers_lists_and_forgets(
    nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from apothic.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        status = main(words)
        return status, *capsys.readouterr()

    file = tmp_path / "cluster.yaml"
    file.write_text(FILE)
    # Ray may tell of nodes that died meanwhile on the same output.
    status, text, _ = run("offers", "register", str(file))
    assert (status, "registered spot\n" in text) == (0, True)
    assert re.search(r"^  spot +not started ", run("offers")[1], re.MULTILINE)
    status, text, _ = run("offers", "unregister", "spot")
    assert (status, "unregistered spot\n" in text) == (0, True)
    status, _, error = run("offers", "unregister", "spot")
    assert status == 1
    assert "registered are none" in error
    assert run("offers", "register", str(tmp_path / "none"))[0] == 1
