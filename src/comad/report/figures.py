"""Pictures of a run: its curves and its scoreboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "teacher": "#4c78a8",
    "student": "#e45756",
    "untrained": "#bab0ac",
    "init_only": "#bab0ac",
    "pixels": "#d8d2cd",
}


def run_figure(folder: Path) -> Path:
    """Draw loss, validation kNN, teacher shares and the scoreboard of a run into ``run.png``.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = json.loads((folder / "scoreboard.json").read_text(encoding="utf-8"))["rows"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), width_ratios=(1, 1, 1, 1.4), layout="constrained")
    _lines(axes[0], log, ["loss"], "loss")
    _lines(axes[1], log, ["knn"], "validation kNN, %")
    _lines(
        axes[2], log, sorted({key for line in log for key in line if key.startswith("share_")}), "share of the target"
    )
    _bars(axes[3], rows)
    path = folder / "run.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _lines(axis: Axes, log: list[dict[str, Any]], keys: list[str], title: str) -> None:
    for key in keys:
        points = [(line["step"], line[key]) for line in log if key in line]
        axis.plot(*zip(*points, strict=True), label=key.removeprefix("share_")) if points else None
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
    axis.set(title="test kNN, fine top-1, %")
    axis.spines[["top", "right"]].set_visible(False)
