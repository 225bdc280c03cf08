"""Figures of dense evaluations: answers beside the truth, and the curves of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from comad.runtime.log import read_log

Samples = Mapping[str, np.ndarray]
UNLABELLED = 255
FEW = 12
"""Fewer points than these are marked on a curve."""


def draw_segmentation(folder: Path) -> list[Path]:
    """Draw ``predictions.png`` (image, truth, answer) and ``curves.png`` of a run of `comad evaluate segment`."""
    samples = _read(folder)
    maps = [part for name, part in samples.items() if name.startswith(("truth", "answer"))]
    shown = sorted({int(label) for part in maps for label in np.unique(part)} - {UNLABELLED})
    palette = _palette(len(samples["names"]))

    def draw(axes: list[Axes], number: int) -> None:
        image = samples[f"image{number}"].transpose(1, 2, 0)
        truth, answer = samples[f"truth{number}"], samples[f"answer{number}"]
        axes[0].imshow(image)
        axes[1].imshow(palette[truth])
        axes[2].imshow(palette[np.where(truth == UNLABELLED, UNLABELLED, answer)])

    figure = _sheet(samples, ("image", "truth", "answer, where there is a truth"), draw)
    handles = [Patch(color=palette[label] / 255, label=str(samples["names"][label])) for label in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=7, frameon=False)
    return [_save(figure, folder / "predictions.png"), _curves(folder, ["miou", "aacc"])]


def draw_detection(folder: Path) -> list[Path]:
    """Draw ``predictions.png`` (boxes and masks) and ``curves.png`` of a run of `comad evaluate detect`."""
    samples = _read(folder)

    def draw(axes: list[Axes], number: int) -> None:
        image = samples[f"image{number}"].transpose(1, 2, 0)
        masks, labels = samples[f"truth_masks{number}"], samples[f"truth_labels{number}"]
        boxes = np.array([_box(mask) for mask in masks if mask.any()]).reshape(-1, 4)
        _objects(axes[0], image, boxes, masks, [str(samples["names"][label - 1]) for label in labels])
        found, scores = samples[f"answer_labels{number}"], samples[f"answer_scores{number}"]
        words = [f"{samples['names'][label - 1]} {score:.2f}" for label, score in zip(found, scores, strict=True)]
        _objects(axes[1], image, samples[f"answer_boxes{number}"], samples[f"answer_masks{number}"], words)

    figure = _sheet(samples, ("truth", "answer: scores of .5,\nelse the best three"), draw)
    return [_save(figure, folder / "predictions.png"), _curves(folder, ["box_ap", "mask_ap"])]


def _read(folder: Path) -> Samples:
    with np.load(folder / "samples.npz") as file:
        return dict(file)


def _sheet(samples: Samples, titles: tuple[str, ...], draw: Callable[[list[Axes], int], None]) -> Any:
    """A row of axes per kept image, two images side by side."""
    count = sum(name.startswith("image") for name in samples)
    rows, columns = -(-count // 2), len(titles)
    size = (4.4 * columns, 2.3 * rows + 0.8)
    figure, grid = plt.subplots(rows, 2 * columns, figsize=size, layout="constrained", squeeze=False)
    for number in range(2 * rows):
        axes = list(grid[number // 2, number % 2 * columns :][:columns])
        for axis, title in zip(axes, titles, strict=True):
            axis.axis("off")
            if number < 2:
                axis.set_title(title, fontsize=9)
        if number < count:
            draw(axes, number)
    return figure


def _objects(axis: Axes, image: np.ndarray, boxes: np.ndarray, masks: np.ndarray, words: list[str]) -> None:
    """An image with coloured masks, boxes and names on it."""
    shown, colours = image.astype(np.float64), _palette(max(1, len(masks)))
    for mask, colour in zip(masks, colours, strict=False):
        shown[mask.astype(bool)] = 0.45 * shown[mask.astype(bool)] + 0.55 * colour
    axis.imshow(shown.astype(np.uint8))
    for (left, top, right, bottom), colour, word in zip(boxes, colours, words, strict=False):
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour / 255, lw=1.2))
        box = {"color": colour / 255, "pad": 0.5}
        axis.text(left + 1, top + 1, word, va="top", fontsize=5, color="white", bbox=box, clip_on=True)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _palette(count: int) -> np.ndarray:
    """uint8 (256, 3): a colour for each class, white for `UNLABELLED`."""
    colours = plt.get_cmap("hsv")((np.arange(256) * 0.618) % 1)[:, :3]  # neighbours in the list differ
    dim = np.where(np.arange(256) % 3 == 1, 0.65, 1.0)[:, None]
    palette = (255 * colours * dim).astype(np.uint8)
    palette[max(count, 1) :] = 255
    return palette


def _curves(folder: Path, keys: list[str]) -> Path:
    """The loss, and the scores during the run."""
    log, _ = read_log(folder)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    _lines(axes[0], log, ["loss"], "loss")
    _lines(axes[1], log, ["lr"], "learning rate")
    _lines(axes[2], log, keys, "first validation images, %")
    return _save(figure, folder / "curves.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _lines(axis: Axes, log: list[dict[str, Any]], keys: list[str], title: str) -> None:
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
