"""The verb `comad evaluate`: one backbone, scored beside raw pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from comad.data.images import load_images
from comad.evaluate.scoreboard import Scoreboard, score
from comad.evaluate.views import device, load_one, view_size


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a backbone by kNN and a linear probe on frozen features.

    Args:
        backbone: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        data: a folder of images with sub-folders as labels, or the name of a bundled set.
        image_size: pixels on the side of the view; left out, 224, and on stamps as many as give 6 × 6 patches.
        out: a JSON file for the scores; none is written if left out.
    """

    backbone: str
    data: str = "stamps"
    image_size: int | None = None
    out: str | None = None


def evaluate(config: EvaluateConfig) -> str:
    """Score the backbone; k, pool, learning rate and weight decay are chosen on the validation part. Returns the table.

    Raises:
        ValueError: the backbone or the data cannot be loaded, or there are no labels to score by.
    """
    if config.out and Path(config.out).is_dir():
        raise ValueError(f"--out {config.out!r} is a folder; name a JSON file.")
    splits = load_images(config.data)
    teacher = load_one(config.backbone, config.data, config.image_size)
    image_size = view_size(teacher.backbone)
    pixels = score("pixels", "pixels", None, splits, image_size).row
    row = score(teacher.name, "teacher", teacher.backbone.to(device()), splits, image_size).row
    if row.reason:
        raise ValueError(f"{config.data!r} cannot be scored: {row.reason} Put images into one sub-folder per label.")
    board = Scoreboard((pixels, row))
    if config.out:
        board.write(Path(config.out))
    return f"{teacher.card.summary()}\n{board.table()}"
