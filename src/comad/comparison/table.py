"""The table of a comparison: means, paired differences to the reference with intervals; as JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from comad.comparison.config import CompareConfig
from comad.comparison.entries import ComparisonRow
from comad.evaluation.evaluation import score_names, title_of
from comad.evaluation.intervals import paired_interval
from comad.evaluation.scores import Scores
from comad.runtime.atomic import write_text
from comad.runtime.seal import sealed

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
    measured = (name for own in results for part in own.values() for name in part.scores[0].row.scores)
    names = list(dict.fromkeys([*score_names(), *measured]))
    return {
        "reference": reference.label,
        "ablation": config.ablation,
        "data": config.recipe.data if config.recipe.data == "stamps" else Path(config.recipe.data).name,
        "split": config.recipe.split,
        "budget": config.recipe.budget,
        "scores": {name: title_of(name) for name in names},
        "rows": [_row(entry, own, against, names) for entry, own in zip(entries, results, strict=True) if own],
    }


def _row(entry: ComparisonRow, results: Results, against: Results, names: Sequence[str]) -> dict[str, Any]:
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
    for name in names:
        plain |= _compared(name, results, against)
    return plain


def _compared(name: str, results: Results, against: Results) -> dict[str, Any]:
    """Mean percent of a score and the numbers of images, concepts and seeds behind it; difference to the reference over
    the seeds that both have, and its interval, which is over concepts alone where there is one such seed. None if not
    scored.
    """
    keys = (name, *(f"{name}_{key}" for key in ("images", "concepts", "seeds", "minus_reference", "interval", "over")))
    rows = [part.scores[0].row for part in results.values() if name in part.scores[0].row.scores]
    if len(rows) < len(results):
        return dict.fromkeys(keys)
    mean = round(statistics.mean(row.scores[name] for row in rows), 4)
    counts = (rows[0].num_images[name], rows[0].num_concepts[name], len(rows))
    shared = [seed for seed in results if seed in against and name in against[seed].scores[0].correct]
    if not shared:
        return dict(zip(keys, (mean, *counts, None, None, None), strict=True))
    own, other = (torch.stack([part[seed].scores[0].correct[name] for seed in shared]) for part in (results, against))
    interval = paired_interval(own, other, results[shared[0]].scores[0].groups[name])
    difference, low, high = (round(value, 4) for value in interval[:3])
    return dict(zip(keys, (mean, *counts, difference, [low, high], interval.over), strict=True))


def write_table(table: Mapping[str, Any], out: Path) -> None:
    """Write ``comparison.json`` and ``comparison.md``; a reader never sees half a file."""
    for name, text in (("comparison.json", json.dumps(sealed(table), indent=1)), ("comparison.md", markdown(table))):
        write_text(out / name, text + "\n")


def markdown(table: Mapping[str, Any]) -> str:
    """The table for a page, one part for each kind of label."""
    rows = table["rows"]
    seeds, commits = max((row["seeds"] for row in rows), key=len), sorted({row["commit"] for row in rows})
    budget = f", {table['budget']} by intent: each row's schedule is fitted to it" if table.get("budget") else ""
    lines = [
        f"# Comparison on {table['data']}, {table['split']} images",
        "",
        f"Top-1 percent, mean over seeds {', '.join(map(str, seeds))}. In brackets: difference to "
        f"`{table['reference']}`, paired by seed and image, and its 95 % interval (t, over seeds and concepts; * is "
        "over concepts alone, for one seed says nothing about others).",
        f"Images are those seen in training, seconds those it took{budget}. comad {'; '.join(commits)}.",
    ]
    for level, title in LEVELS.items():
        of_level = [name for name in table["scores"] if name.endswith("_coarse") == bool(level)]
        names = [name for name in of_level if any(row[name] is not None for row in rows)]
        if names:
            lines += ["", f"## {title}", "", *_markdown(table, names)]
    return "\n".join(lines)


def _markdown(table: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    rows = table["rows"]
    scores = [f"{table['scores'][name].removesuffix(' coarse')} ({_counts(rows, name)})" for name in names]
    lines = [["row", "teachers", "seeds", *scores, "parameters", "GFLOPs", "images", "seconds"]]
    lines += [["---", "---", *["---:"] * (len(names) + 5)]]
    for row in rows:
        cost = [f"{row['params']:,}", f"{row['flops'] / 1e9:.3f}", f"{row['images_seen']:,}", f"{row['seconds']:,.0f}"]
        who = [f"`{row['label']}`", " ".join(row["teachers"]), str(len(row["seeds"]))]
        lines.append([*who, *(_cell(row, name) for name in names), *cost])
    return [f"| {' | '.join(line)} |" for line in lines]


def _counts(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """``700 images of 101 concepts``: the same for all rows, as they are scored on the same images."""
    row = next(row for row in rows if row[name] is not None)
    return f"{row[f'{name}_images']:,} images of {row[f'{name}_concepts']:,} concepts"


def _cell(row: Mapping[str, Any], name: str) -> str:
    """``41.2 (+1.3 [0.4, 2.2])``."""
    if row[name] is None:
        return "–"
    if row[f"{name}_minus_reference"] is None:
        return f"{row[name]:.1f}"
    low, high = row[f"{name}_interval"]
    star = "*" if row[f"{name}_over"] != "seeds and concepts" else ""
    return f"{row[name]:.1f} ({row[f'{name}_minus_reference']:+.1f} [{low:.1f}, {high:.1f}]{star})"
