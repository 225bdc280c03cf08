"""The verb `comad evaluate detect`: train a detector on a backbone and score it on the validation images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor

from comad.data.coco import DetectionImages, DetectionSplits, load_coco
from comad.data.dense import DenseDataset, DetectionView, in_order
from comad.evaluation.dense import PROBED, DenseRun, dense_job, run_dense, sampled, write_arrays, write_json
from comad.evaluation.detection.config import DetectConfig
from comad.evaluation.detection.detector import Detector, detect_in_image
from comad.evaluation.detection.scores import DetectionScore, as_results, score_results
from comad.evaluation.features import evaluating
from comad.models.maps import load_maps
from comad.models.teachers import TeacherCard
from comad.models.timm_backbone import math_attention_on_cpu
from comad.runtime.atomic import write_text
from comad.runtime.lock import holding_runs
from comad.runtime.progress import track

SURE, LIKELIEST = 0.5, 3


@holding_runs()
def detect(config: DetectConfig) -> str:
    """Train, score and write ``scores.json``, ``results.json`` and ``samples.npz`` into the run's folder.

    Of several processes the first scores; the others return an empty text.

    Returns:
        The scores, to be printed.

    Raises:
        ValueError: bad data, a backbone that cannot be used, a run folder in use, or a resume that does not fit.
        Interrupted: a signal came; a checkpoint is written.
    """
    return run_dense(config, prepare, score_detector, _finish)


def prepare(config: DetectConfig, fabric: Fabric) -> DenseRun:
    """Load and check everything that a run needs; nothing is written.

    Raises:
        ValueError: bad data, or a backbone that cannot be used.
    """
    fabric.seed_everything(config.run.seed, verbose=False)
    splits = load_coco(config.data)
    splits.validation.check_images()
    model, card = build(config, len(splits.class_names))
    math_attention_on_cpu(model, fabric.device)
    dataset = DenseDataset(splits.train, DetectionView(size=config.image_size, scale=config.scale), config.run.seed)

    def probe(module: Any) -> dict[str, float]:
        score, _ = score_detector(module, splits.validation, config, limit=PROBED)
        return {"box_ap": score.box["ap"], "mask_ap": score.mask["ap"]}

    return DenseRun(*dense_job(config, model, dataset, card, probe), splits, card)


def build(config: DetectConfig, num_classes: int) -> tuple[Detector, TeacherCard]:
    """The network that a config asks for, its heads with random weights, and the card of its backbone."""
    if config.image_size % 64:
        fit = max(1, round(config.image_size / 64)) * 64
        raise ValueError(f"--image-size {config.image_size} is no multiple of 64, the coarsest stride; use {fit}.")
    maps, card = load_maps(config.backbone, config.image_size, drop_path=config.drop_path, window=config.window)
    return Detector(maps, num_classes, config.detector), card


def score_detector(
    module: Detector, images: DetectionImages, config: DetectConfig, limit: int | None = None
) -> tuple[DetectionScore, list[dict[str, Any]]]:
    """Scores and results on the first ``limit`` images, all if None."""
    results, count = [], min(len(images), limit or len(images))
    with evaluating(module) as device, torch.autocast(device.type, config.run.autocast, bool(config.run.autocast)):
        loaded = in_order(images.load_image, count, config.loader.num_workers)
        for image, record in zip(track(loaded, "detecting", "images", count), images.records, strict=False):
            results += as_results(detect_in_image(module, image, config.image_size), record.id, images.categories)
    return score_results(images, results, [record.id for record in images.records[:count]]), results


def _finish(config: DetectConfig, splits: DetectionSplits, module: Detector, card: TeacherCard) -> str:
    """Score the trained network on all validation images."""
    out = Path(config.run.out)
    images = splits.validation
    score, results = score_detector(module, images, config)
    skipped = {"objects": dict(splits.train.skipped), "images": len(splits.train.missing)}
    facts = {"backbone": card.name, "detector": config.detector.kind, "images": len(images), "skipped": skipped}
    facts["data"] = splits.summary().facts
    write_json(out / "scores.json", {**facts, **score.as_dict()})
    write_text(out / "results.json", json.dumps(results))
    _save_samples(config, splits, module, out)
    lines = [card.summary()]
    for kind, values in score.as_dict().items():
        numbers = "  ".join(f"{name.upper().replace('_', ' ')} {values[name]:.2f}" for name in list(values)[:6])
        lines.append(f"{kind:4}  {numbers}")
    return "\n".join([*lines, f"on {len(images)} images, in percent; all twelve numbers: {out}/scores.json"])


def _save_samples(config: DetectConfig, splits: DetectionSplits, module: Detector, out: Path) -> None:
    """Keep some images with their objects and what was found, for figures."""
    arrays: dict[str, Any] = {"names": np.array(splits.class_names)}
    images = splits.validation
    with evaluating(module):
        for number, index in enumerate(sampled(len(images))):
            image, (masks, labels) = images.load(index)
            found = detect_in_image(module, image, config.image_size)
            arrays[f"image{number}"] = image.numpy()
            for name, part in _parts(masks, labels, found):
                arrays[f"{name}{number}"] = part.numpy()
    write_arrays(out / "samples.npz", arrays)


def shown(scores: Float[Tensor, " k"]) -> Tensor:
    """Pick the detections of an image that figures show: those of .5 and more, else the best three."""
    sure = scores >= SURE
    return sure if sure.any() else scores.argsort(descending=True)[:LIKELIEST]


def _parts(masks: Tensor, labels: Tensor, found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from (("truth_masks", masks.bool()), ("truth_labels", labels))
    chosen = shown(found["scores"])
    for name in ("boxes", "labels", "scores", "masks"):
        yield f"answer_{name}", found[name][chosen]
