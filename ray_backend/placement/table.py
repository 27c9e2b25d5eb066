"""Texts for people: tables of what matches, of what does not, and why."""

from __future__ import annotations

from collections.abc import Sequence

from apothic.constraints import PlacementConstraints
from ray_backend.placement.criterion import figure
from ray_backend.placement.matcher import Survey

__all__ = ["MAX_ROWS", "cost_text", "no_match_text", "rejected_table", "table", "wants_text"]

MAX_ROWS = 40
"""Rows of one table beyond which the rest is counted: messages travel and are read."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lay out rows under a head, indented by two; columns in ``right`` are aligned to the right."""
    shown = [list(head), *(list(row) for row in rows[:MAX_ROWS])]
    widths = [max(len(row[column]) for row in shown) for column in range(len(head))]
    lines = [
        "  "
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    ]
    if len(rows) > MAX_ROWS:
        lines.append(f"  … and {len(rows) - MAX_ROWS} more")
    return "\n".join(lines)


def wants_text(constraints: PlacementConstraints, cpu: int, memory_mb: int) -> str:
    """Write down what was asked for."""
    parts = [f"cpu={cpu}", f"memory_mb={memory_mb}"]
    for name in constraints.given:
        value = getattr(constraints, name)
        if name == "offer_filters":
            text = str(value.model_dump(mode="json", exclude_none=True))
        elif isinstance(value, tuple):
            text = repr(value[0]) if len(value) == 1 else repr(list(value))
        elif isinstance(value, bool):
            text = str(value)
        else:
            text = figure(value)
        parts.append(f"{name}={text}")
    return ", ".join(parts)


def cost_text(cost_per_hour_usd: float | None) -> str:
    """Write a price."""
    return "not stated" if cost_per_hour_usd is None else figure(cost_per_hour_usd, "USD/h")


def rejected_table(found: Survey) -> str:
    """List what does not match: the first parameter that it fails, what it has, what is wanted."""
    rows = [
        (
            each.offer,
            str(each.nodes) if each.nodes else "not started",
            each.parameter,
            each.has,
            each.wanted,
        )
        for each in found.rejections
    ]
    return table(("offer", "nodes", "fails", "has", "wanted"), rows, (1,))


def no_match_text(found: Survey, wants: str) -> str:
    """Tell that nothing can ever run it, and what would help."""
    if found.is_vacant:
        return (
            f"no node can ever run {wants}: the cluster has no live node, and no node type is "
            f"registered. Start a node, or register those that the autoscaler can start."
        )
    return (
        f"no node can ever run {wants}. Each kind of node, the first parameter that it fails, what "
        f"it has and what is wanted:\n\n{rejected_table(found)}\n\nRelax the parameter, add a node "
        f"that has it, or label the nodes that have it and do not state it (apothic.io/…)."
    )
