"""Figures: curves and scoreboard of a run, differences of a comparison."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from comad.runtime.log import read_log

COLOURS = {
    "teacher": "#4c78a8",
    "student": "#e45756",
    "untrained": "#bab0ac",
    "init_only": "#bab0ac",
    "pixels": "#d8d2cd",
    "supervised": "#54a24b",
}
FEW = 12
"""Fewer points than these are marked on a curve."""


def run_figure(folder: Path) -> Path:
    """Draw loss, validation kNN, teacher shares and the scoreboard of a run into ``run.png``.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    log, _ = read_log(folder)
    rows = json.loads((folder / "scoreboard.json").read_text(encoding="utf-8"))["rows"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), width_ratios=(1, 1, 1, 1.4), layout="constrained")
    draw_lines(axes[0], log, ["loss"], "loss")
    draw_lines(axes[1], log, ["knn"], "validation kNN, %")
    draw_lines(
        axes[2], log, sorted({key for line in log for key in line if key.startswith("share_")}), "share of the target"
    )
    _bars(axes[3], rows)
    path = folder / "run.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def comparison_figure(folder: Path) -> Path:
    """Draw each row's difference to the reference, with its interval, into ``comparison.png``: a panel per score.

    Raises:
        FileNotFoundError: the folder holds no comparison.
    """
    table = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    rows = table["rows"][::-1]
    titles = {name: title for name, title in table["scores"].items() if not name.endswith("_coarse")}
    names = [name for name in titles if any(row[f"{name}_interval"] for row in rows)]
    size = (2 + 4 * max(1, len(names)), 1.3 + 0.32 * len(rows))
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=False):
        _differences(axis, rows, name)
        axis.set_title(f"{titles[name]}, fine top-1, {table['split']}", fontsize=10)
    axes[0][0].set_yticks(range(len(rows)), [textwrap.fill(row["label"], 36) for row in rows])
    figure.supxlabel(
        f"percentage points above {table['reference']}, with 95 % interval; at the right: top-1, %", fontsize=9
    )
    path = folder / "comparison.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _differences(axis: Axes, rows: list[dict[str, Any]], name: str) -> None:
    """A point and an interval per row; the mean stands at the right."""
    axis.axvline(0, color="#999999", linewidth=0.8)
    for height, row in enumerate(rows):
        if not row[f"{name}_interval"]:
            continue
        middle, (low, high) = row[f"{name}_minus_reference"], row[f"{name}_interval"]
        colour = COLOURS.get(row["kind"], COLOURS["untrained"])
        axis.plot([low, high], [height, height], color=colour, linewidth=2.5, solid_capstyle="butt")
        axis.plot([middle], [height], "o", color=colour, markersize=5)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axis.annotate(f"{row[name]:.1f}", (1, height), xytext=(4, 0), va="center", fontsize=8, **place)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)


def draw_lines(axis: Axes, log: list[dict[str, Any]], keys: list[str], title: str) -> None:
    """Draw values of a log over its steps, few of them with a dot each."""
    for key in keys:
        points = [(line["step"], line[key]) for line in log if key in line]
        if points:
            dot = "." if len(points) < FEW else ""
            axis.plot(*zip(*points, strict=True), label=key.removeprefix("share_"), marker=dot)
    axis.set(title=title, xlabel="step")
    axis.spines[["top", "right"]].set_visible(False)
    if len(keys) > 1:
        axis.legend(frameon=False, fontsize=8)


def _bars(axis: Axes, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["knn"] is not None][::-1]
    bars = axis.barh(
        [row["name"] for row in rows], [row["knn"] for row in rows], color=[COLOURS[r["role"]] for r in rows]
    )
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set(title="kNN, fine top-1, %")
    axis.spines[["top", "right"]].set_visible(False)
