"""What a user reads, to the letter."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from apothic.errors import NoMatchingOfferError
from tests.placement.nodes import full_node, node, node_id, place


def cluster() -> list[dict[str, Any]]:
    return [
        node("head", cpus=4, memory_gib=8),
        full_node("f1", "us-a100", cost_per_hour_usd=20),
        full_node("f2", "us-a100", cost_per_hour_usd=20),
        node("s", offer="eu-t4", gpus=4, gpu="T4", cost_per_hour_usd=1.2, country="DE"),
        node("u1", gpus=8, gpu="A100"),
        node("u2", gpus=8, gpu="A100", vram_gb="lots"),
        node("x", gpus=1),
        node("dead", gpus=8, gpu="H100", alive=False),
    ]


def lines(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def test_nothing_matches():
    with pytest.raises(NoMatchingOfferError) as caught:
        place(cluster(), gpu="A100", min_vram_gb=80, max_cost_per_hour_usd=2)
    assert str(caught.value) == lines("""
        no node can ever run cpu=1, memory_mb=1024, gpu='A100', min_vram_gb=80, max_cost_per_hour_usd=2. Each kind of node, the first parameter that it fails, what it has and what is wanted:

          offer                      nodes  fails                  has                                             wanted
          (no offer) 1x unnamed GPU      1  gpu                    not stated                                      A100
          (no offer) 8x A100             1  min_vram_gb            40 GB (by name)                                 at least 80 GB
          (no offer) 8x A100             1  min_vram_gb            40 GB (by name; vram-gb='lots' cannot be read)  at least 80 GB
          (no offer) no GPU              1  gpu                    no GPU                                          A100
          eu-t4                          1  gpu                    T4 with 16 GB (by name)                         A100
          us-a100                        2  max_cost_per_hour_usd  2.5 USD/h                                       at most 2 USD/h

        Relax the parameter, add a node that has it, or label the nodes that have it and do not state it (apothic.io/…).
    """)  # noqa: E501 - to the letter


def test_something_matches():
    full = {node_id("f1"): {"CPU": 1.0}, node_id("f2"): {"CPU": 64.0, "memory": 2.0**33, "GPU": 3}}
    found = place(cluster(), full, gpu=["A100", "T4"], offer_filters={"dph_total": {"lte": 20}})
    assert found.explain() == lines("""
        Asked for: cpu=1, memory_mb=1024, gpu=['A100', 'T4'], offer_filters={'dph_total': {'lte': 20.0}}.

        Matching, in the order of choice:
          offer    nodes  cost       room now
          us-a100      2  2.5 USD/h         3
          eu-t4        1  0.3 USD/h         4

        Not matching:
          offer                      nodes  fails                        has         wanted
          (no offer) 1x unnamed GPU      1  gpu                          not stated  A100 or T4
          (no offer) 8x A100             2  offer_filters.dph_total.lte  not stated  at most 20 USD/h
          (no offer) no GPU              1  gpu                          no GPU      A100 or T4
    """)


def test_nothing_is_asked():
    assert place([node("a"), node("b")], cpu=4).explain() == lines("""
        Asked for: cpu=4, memory_mb=1024.

        Matching, in the order of choice:
          offer     nodes  cost        room now
          any node      2  not stated         4
    """)


def test_a_long_table_ends_with_a_count():
    nodes = [node(str(index), offer=f"offer-{index:03}") for index in range(200)]
    with pytest.raises(NoMatchingOfferError) as caught:
        place(nodes, gpu="A100")
    text = str(caught.value)
    assert "offer-039" in text
    assert "offer-040" not in text
    assert "… and 160 more" in text


def test_nodes_whose_memory_differs_share_a_row():
    nodes = [node(str(index), memory_gib=8 + index) for index in range(5)]
    with pytest.raises(NoMatchingOfferError) as caught:
        place(nodes, memory_mb=16 * 1024)
    assert lines("""
          offer              nodes  fails      has             wanted
          (no offer) no GPU      5  memory_mb  up to 12288 MB  at least 16384 MB
    """) in textwrap.dedent(str(caught.value)).replace("\n  ", "\n")


def test_all_that_matches_is_full():
    nodes = [node("t", gpus=2, gpu="T4", offer="eu-t4", cost_per_hour_usd=0.6)]
    found = place(nodes, {node_id("t"): {"CPU": 8.0}}, gpu="T4")
    error = found.timed_out(30, ["app.Model 'prod'", "Ray actor Trainer"], "raise THE_LIMIT")
    assert str(error) == lines("""
        nothing with room was found within 30 s for cpu=1, memory_mb=1024, gpu='T4': eu-t4 would do, and had none. The room is held by: app.Model 'prod', Ray actor Trainer. Close what is not needed, add nodes, or raise THE_LIMIT.

        Asked for: cpu=1, memory_mb=1024, gpu='T4'.

        Matching, in the order of choice:
          offer  nodes  cost       room now
          eu-t4      1  0.3 USD/h        no
    """)  # noqa: E501 - to the letter
