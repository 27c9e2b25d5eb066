"""The `ray start` line of the guide makes the offer that it promises; its tables leave none out."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from ray._private.label_utils import parse_node_labels_string

from apothic import App
from ray_backend.placement.offers import LABEL_PREFIX, group_nodes

DOCS = Path(__file__).parents[2] / "docs"


def test_the_labels_of_ray_start_are_read() -> None:
    text = (DOCS / "clusters.md").read_text().replace("\\\n", " ")
    [line] = [
        line for line in text.splitlines() if line.startswith("ray start") and "--labels" in line
    ]
    words = shlex.split(line)
    resources = json.loads(words[words.index("--resources") + 1])
    labels = parse_node_labels_string(words[words.index("--labels") + 1])
    card = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:RTX-4090": 1.0}
    node = {"Alive": True, "NodeID": "n", "Resources": {**card, **resources}, "Labels": labels}
    [kind] = group_nodes([node])
    offer = kind.offer
    assert not offer.malformed
    assert offer.offer_id == labels[f"{LABEL_PREFIX}offer"]
    assert offer.vram_mb == 1000 * float(labels[f"{LABEL_PREFIX}vram-gb"])
    assert offer.cost_per_hour_usd == float(labels[f"{LABEL_PREFIX}cost-per-hour-usd"])
    assert offer.country == labels[f"{LABEL_PREFIX}country"]


def test_every_label_that_is_read_is_listed() -> None:
    from ray_backend.placement import offers

    page = (DOCS / "clusters.md").read_text()
    missing = [label for label, _ in offers._READERS.values() if f"`{label}`" not in page]
    assert missing == []


@pytest.mark.parametrize("option", [*inspect.signature(App("x").cls).parameters])
def test_every_option_is_explained(option: str) -> None:
    """Families of options share a word with an ellipsis, such as `min_…`."""
    named = re.findall(r"`([a-z_]+)(…?)`", (DOCS / "classes.md").read_text())
    assert any(option.startswith(name) if rest else option == name for name, rest in named)
