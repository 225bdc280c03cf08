"""mIoU and pixel accuracy of a whole data set, from counts that add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from comad.data.ade20k import IGNORED


class SegmentationScore(NamedTuple):
    """Percentages over a data set.

    Attributes:
        miou: mean over the classes that occur, in the truth or in an answer, of intersection over union.
        aacc: share of the labelled pixels that are named rightly.
        iou: class → its intersection over union; None where it does not occur.
    """

    miou: float
    aacc: float
    iou: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self._asdict()


def count_pixels(answer: UInt8[Tensor, "h w"], truth: UInt8[Tensor, "h w"], num_classes: int) -> Int[Tensor, "3 C"]:
    """Of the labelled pixels of one image, per class: named rightly, named so, truly so."""
    known = truth != IGNORED
    answer, truth = answer[known], truth[known]
    parts = (truth[answer == truth], answer, truth)
    return torch.stack([part.long().bincount(minlength=num_classes) for part in parts])


def score_counts(counts: Int[Tensor, "n 3 C"], names: Sequence[str]) -> SegmentationScore:
    """Scores from the counts of n images, added up before anything is divided.

    Raises:
        ValueError: no pixel has a class.
    """
    right, answer, truth = counts.sum(dim=0).double()
    if not truth.sum():
        raise ValueError("no pixel of the validation images has a class; check the label maps, where 0 is ignored.")
    union = answer + truth - right
    iou = [float(100 * r / u) if u else None for r, u in zip(right, union, strict=True)]
    occurring = [value for value in iou if value is not None]
    mean = sum(occurring) / len(occurring)
    return SegmentationScore(mean, float(100 * right.sum() / truth.sum()), dict(zip(names, iou, strict=True)))
