"""The table of a comparison: means, paired differences to the reference with intervals; as JSON and Markdown."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from comad.compare.config import CompareConfig
from comad.compare.entries import ComparisonRow
from comad.evaluate.scoreboard import paired_interval
from comad.evaluate.scores import Scores

SCORES = {"knn": "kNN", "linear": "linear", "finetune": "fine-tune"}
LEVELS = {"": "Fine labels", "_coarse": "Coarse labels"}

Results = Mapping[int, Scores]
"""Seed → what was measured for one row."""


def tabulate(
    config: CompareConfig, entries: Sequence[ComparisonRow], results: Sequence[Results], reference: ComparisonRow
) -> dict[str, Any]:
    """The whole comparison as plain values.

    Args:
        config: of the comparison.
        entries: its rows.
        results: of each row, by seed.
        reference: the row from which differences are taken; seeds are paired.
    """
    against = results[entries.index(reference)]
    return {
        "reference": reference.label,
        "ablation": config.ablation,
        "data": config.recipe.data if config.recipe.data == "stamps" else Path(config.recipe.data).name,
        "split": config.recipe.split,
        "rows": [_row(entry, own, against) for entry, own in zip(entries, results, strict=True) if own],
    }


def _row(entry: ComparisonRow, results: Results, against: Results) -> dict[str, Any]:
    """One row: means over seeds, and of each score the difference to the reference and its 95 % interval."""
    measured = list(results.values())
    row, facts = measured[0].scores[0].row, [part.facts for part in measured]
    plain = {
        "label": entry.label,
        "preset": entry.preset,
        "teachers": list(entry.teacher_names),
        "kind": entry.kind,
        "seeds": list(results),
        "params": row.params,
        "flops": row.flops,
        "images_seen": facts[0]["images_seen"],
        "seconds": round(statistics.mean(part["seconds"] for part in facts), 1),
        "commit": ", ".join(sorted({part["code"] for part in facts})),
    }
    for name in (score + level for score in SCORES for level in LEVELS):
        plain |= _compared(name, results, against)
    return plain


def _compared(name: str, results: Results, against: Results) -> dict[str, Any]:
    """Mean percent, difference to the reference over the seeds that both have, and its interval; None if not scored."""
    values = [getattr(part.scores[0].row, name) for part in results.values()]
    keys = (name, f"{name}_minus_reference", f"{name}_interval")
    if None in values:
        return dict.fromkeys(keys)
    shared = [seed for seed in results if seed in against and name in against[seed].scores[0].correct]
    if not shared:
        return dict(zip(keys, (round(statistics.mean(values), 4), None, None), strict=True))
    own, other = (torch.stack([rows[seed].scores[0].correct[name] for seed in shared]) for rows in (results, against))
    interval = paired_interval(own, other, results[shared[0]].scores[0].groups[name])
    difference, low, high = (round(value, 4) for value in interval)
    return dict(zip(keys, (round(statistics.mean(values), 4), difference, [low, high]), strict=True))


def write_table(table: Mapping[str, Any], out: Path) -> None:
    """Write ``comparison.json`` and ``comparison.md``; a reader never sees half a file."""
    for name, text in (("comparison.json", json.dumps(table, indent=1)), ("comparison.md", markdown(table))):
        temporary = out / f".{name}.{os.getpid()}"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, out / name)


def markdown(table: Mapping[str, Any]) -> str:
    """The table for a page, one part for each kind of label."""
    rows = table["rows"]
    seeds, commits = max((row["seeds"] for row in rows), key=len), sorted({row["commit"] for row in rows})
    lines = [
        f"# Comparison on {table['data']}, {table['split']} images",
        "",
        f"Top-1 percent, mean over seeds {', '.join(map(str, seeds))}. In brackets: difference to "
        f"`{table['reference']}`, paired by seed and image, and its 95 % interval (bootstrap over seeds and concepts).",
        f"Seconds are those of training. comad {'; '.join(commits)}.",
    ]
    for level, title in LEVELS.items():
        names = [name for name in SCORES if any(row[name + level] is not None for row in rows)]
        if names:
            lines += ["", f"## {title}", "", *_markdown(rows, names, level)]
    return "\n".join(lines)


def _markdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str], level: str) -> list[str]:
    titles = [
        "row",
        "teachers",
        "seeds",
        *(SCORES[name] for name in names),
        "parameters",
        "GFLOPs",
        "images",
        "seconds",
    ]
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)]]
    for row in rows:
        cost = [f"{row['params']:,}", f"{row['flops'] / 1e9:.3f}", f"{row['images_seen']:,}", f"{row['seconds']:,.0f}"]
        who = [f"`{row['label']}`", " ".join(row["teachers"]), str(len(row["seeds"]))]
        lines.append([*who, *(_cell(row, name + level) for name in names), *cost])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(row: Mapping[str, Any], name: str) -> str:
    """``41.2 (+1.3 [0.4, 2.2])``."""
    if row[name] is None:
        return "–"
    if row[f"{name}_minus_reference"] is None:
        return f"{row[name]:.1f}"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1f} ({row[f'{name}_minus_reference']:+.1f} [{low:.1f}, {high:.1f}])"
