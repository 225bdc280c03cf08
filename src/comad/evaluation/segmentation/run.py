"""The verb `comad evaluate segment`: train a head on a backbone and score it on the validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from lightning_fabric import Fabric
from torch import Tensor

from comad.data.ade20k import SegmentationImages, SegmentationSplits, load_ade20k
from comad.data.dense import DenseDataset, SegmentationView, in_order
from comad.evaluation.dense import PROBED, DenseRun, dense_job, run_dense, sampled, write_arrays, write_json
from comad.evaluation.features import evaluating
from comad.evaluation.segmentation.config import SegmentConfig
from comad.evaluation.segmentation.scores import count_pixels, score_counts
from comad.evaluation.segmentation.segmenter import Segmenter, segment_image
from comad.models.maps import load_maps
from comad.models.teachers import TeacherCard
from comad.models.timm_backbone import math_attention_on_cpu
from comad.runtime.lock import holding_runs
from comad.runtime.progress import track


@holding_runs()
def segment(config: SegmentConfig) -> str:
    """Train, score and write ``scores.json``, ``counts.npz`` and ``samples.npz`` into the run's folder.

    Of several processes the first scores; the others return an empty text.

    Returns:
        The scores, to be printed.

    Raises:
        ValueError: bad data, a backbone that cannot be used, a run folder in use, or a resume that does not fit.
        Interrupted: a signal came; a checkpoint is written.
    """
    return run_dense(config, prepare, count_answers, _finish)


def prepare(config: SegmentConfig, fabric: Fabric) -> DenseRun:
    """Load and check everything that a run needs; nothing is written.

    Raises:
        ValueError: bad data, or a backbone that cannot be used.
    """
    fabric.seed_everything(config.run.seed, verbose=False)
    splits = load_ade20k(config.data)
    splits.validation.check_images()
    splits.train.check_label_maps()
    model, card = build(config, len(splits.class_names))
    math_attention_on_cpu(model, fabric.device)
    view = SegmentationView(crop=config.crop, short_side=config.short_side, scale=config.scale)
    dataset = DenseDataset(splits.train, view, config.run.seed)

    def probe(module: Any) -> dict[str, float]:
        counts = count_answers(module, splits.validation, config, limit=PROBED)
        scores = score_counts(counts, splits.class_names) if counts[:, 2].any() else None
        return {"miou": scores.miou, "aacc": scores.aacc} if scores else {}

    return DenseRun(*dense_job(config, model, dataset, card, probe), splits, card)


def build(config: SegmentConfig, num_classes: int) -> tuple[Segmenter, TeacherCard]:
    """The network that a config asks for, its head with random weights, and the card of its backbone."""
    if not 0 < config.stride <= config.crop:
        raise ValueError(f"windows of {config.crop} pixels are at least 1 and at most as many apart; change --stride.")
    linear = config.head == "linear"
    maps, card = load_maps(config.backbone, config.crop, drop_path=config.drop_path, frozen=linear)
    return Segmenter(maps, num_classes, 0 if linear else config.channels, config.auxiliary), card


def count_answers(
    module: Segmenter, images: SegmentationImages, config: SegmentConfig, limit: int | None = None
) -> Int[Tensor, "n 3 C"]:
    """Count the pixels of the first ``limit`` images, all if None; see `count_pixels`."""
    counts = []
    with evaluating(module) as device, torch.autocast(device.type, config.run.autocast, bool(config.run.autocast)):
        count = min(len(images), limit or len(images))
        loaded = in_order(images.load, count, config.loader.num_workers)
        for image, truth in track(loaded, "segmenting", "images", count):
            answer = segment_image(module, image, config.short_side, config.crop, config.stride)
            counts.append(count_pixels(answer, truth, images.num_classes))
    return torch.stack(counts)


def _finish(config: SegmentConfig, splits: SegmentationSplits, module: Segmenter, card: TeacherCard) -> str:
    """Score the trained network on all validation images."""
    out = Path(config.run.out)
    counts = count_answers(module, splits.validation, config)
    score = score_counts(counts, splits.class_names)
    truth = counts[:, 2].sum(dim=0)
    absent = [name for name, pixels in zip(splits.class_names, truth, strict=True) if not pixels]
    images = len(splits.validation)
    write_json(
        out / "scores.json",
        {
            "backbone": card.name,
            "head": config.head,
            "images": images,
            "absent": absent,
            **score.as_dict(),
            "data": splits.summary().facts,
        },
    )
    write_arrays(out / "counts.npz", {"counts": counts.numpy().astype(np.int32)})
    _save_samples(config, splits, module, out)
    note = f"\n{len(absent)} classes have no pixel in the validation images: {', '.join(absent)}." if absent else ""
    return f"{card.summary()}\nmIoU {score.miou:.2f} %  aAcc {score.aacc:.2f} %  on {images} images{note}"


def _save_samples(config: SegmentConfig, splits: SegmentationSplits, module: Segmenter, out: Path) -> None:
    """Keep some images with truth and answer, for figures."""
    arrays: dict[str, Any] = {"names": np.array(splits.class_names)}
    images = splits.validation
    with evaluating(module):
        for number, index in enumerate(sampled(len(images))):
            image, truth = images.load(index)
            answer = segment_image(module, image, config.short_side, config.crop, config.stride)
            arrays |= {
                f"image{number}": image.numpy(),
                f"truth{number}": truth.numpy(),
                f"answer{number}": answer.numpy(),
            }
    write_arrays(out / "samples.npz", arrays)
