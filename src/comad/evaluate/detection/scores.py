"""Average precision of boxes and masks, by COCO's rules, computed by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from comad.data.coco import DetectionImages, Id, coco_tools

SIZES = ("small", "medium", "large")
NAMES = ("ap", "ap50", "ap75", *(f"ap_{s}" for s in SIZES), "ar1", "ar10", "ar100", *(f"ar_{s}" for s in SIZES))
"""COCO's twelve numbers, in its order."""


class DetectionScore(NamedTuple):
    """Percentages over a data set; -1 where there is no such object.

    Attributes:
        box, mask: name of `NAMES` → its value. ``ap`` is the mean over overlaps of .5 to .95.
    """

    box: dict[str, float]
    mask: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self._asdict()


def as_results(found: Mapping[str, Tensor], image_id: Id, categories: list[Id]) -> list[dict[str, Any]]:
    """Detections in one image in COCO's format of results.

    Args:
        found: what `detect_in_image` gives.
        image_id: of the image.
        categories: id of the category of each label, from label 1 on.
    """
    encode = coco_tools("mask").encode
    masks = np.asfortranarray(found["masks"].permute(1, 2, 0).numpy().astype(np.uint8))
    lengths = encode(masks) if masks.shape[2] else []
    corners = found["boxes"].double()
    boxes = (corners[:, :2], corners[:, 2:] - corners[:, :2])
    columns = (found["labels"], found["scores"], *boxes)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label - 1],
            "bbox": [*corner, *size],
            "score": score,
            "segmentation": {"size": list(run["size"]), "counts": _text(run["counts"])},
        }
        for label, score, corner, size, run in zip(*(part.tolist() for part in columns), lengths, strict=True)
    ]


def score_results(images: DetectionImages, results: Iterable[Mapping[str, Any]], ids: list[Id]) -> DetectionScore:
    """Score results against the objects of the JSON file that can be used, crowd regions and all.

    Args:
        images: the part that was looked at.
        results: of all images together; may be empty.
        ids: the images that were looked at.
    """
    api, evaluator = coco_tools("coco").COCO, coco_tools("faster_eval_api").COCOeval_faster
    truth, listed = api(images.as_coco()), _renumbered(images, results)
    numbers = {record.id: number for number, record in enumerate(images.records, start=1)}
    scores = []
    for kind in ("bbox", "segm"):
        if not listed:
            scores.append(dict.fromkeys(NAMES, 0.0))
            continue
        dropped = () if kind == "segm" else ("segmentation",)  # or the areas of masks would tell small from large
        own = [{key: value for key, value in entry.items() if key not in dropped} for entry in listed]
        found = evaluator(truth, truth.loadRes(own), iouType=kind, print_function=lambda *text: None)
        found.params.imgIds = [numbers[number] for number in ids]
        found.evaluate()
        found.accumulate()
        found.summarize()
        values = [float(value) for value in found.stats[: len(NAMES)]]
        scores.append({name: 100 * value if value >= 0 else -1.0 for name, value in zip(NAMES, values, strict=True)})
    return DetectionScore(*scores)


def _renumbered(images: DetectionImages, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results with the numbers of `DetectionImages.as_coco` in place of the file's ids."""
    numbers = {record.id: number for number, record in enumerate(images.records, start=1)}
    labels = {category: label for label, category in enumerate(images.categories, start=1)}
    return [
        {**entry, "image_id": numbers[entry["image_id"]], "category_id": labels[entry["category_id"]]}
        for entry in results
    ]


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
