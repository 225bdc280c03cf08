"""A backbone with a segmentation head: its loss, and its answer for a whole image by a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from comad.data.ade20k import IGNORED
from comad.data.dense import GREY
from comad.evaluate.segmentation.heads import ConvHead, LinearHead, UPerHead
from comad.models.maps import FeatureMaps
from comad.runtime.run import LossAndMetrics

WINDOWS_AT_ONCE = 8


class Segmenter(nn.Module):
    """Images in, class scores per pixel out.

    Args:
        maps: the backbone; frozen for a linear head.
        num_classes: C.
        channels: of UPerNet's maps; 0 makes a linear head.
        auxiliary: weight of the auxiliary head's loss; 0 leaves that head out.
    """

    def __init__(self, maps: FeatureMaps, num_classes: int, channels: int, auxiliary: float):
        super().__init__()
        self.maps = maps
        self.auxiliary_weight = auxiliary if channels else 0.0
        if channels:
            self.head: nn.Module = UPerHead(maps.widths, maps.strides, channels, num_classes)
        else:
            self.head = LinearHead(maps.widths[-1], num_classes)
        self.auxiliary = (
            ConvHead(maps.widths[2], max(16, channels // 2), num_classes) if self.auxiliary_weight else None
        )

    def forward(self, images: UInt8[Tensor, "B 3 H W"], classes: UInt8[Tensor, "B H W"]) -> LossAndMetrics:
        """Cross-entropy over the pixels that have a class, 0 if none has, and the share of them named rightly."""
        maps = self.maps(images.float() / 255)
        scores = self._enlarged(self.head(maps), images)
        loss = main = _cross_entropy(scores, classes)
        if self.auxiliary is not None:
            loss = main + self.auxiliary_weight * _cross_entropy(
                self._enlarged(self.auxiliary(maps[2]), images), classes
            )

        def metrics() -> dict[str, Tensor]:
            known = classes != IGNORED
            right = (scores.argmax(dim=1) == classes) & known
            return {"loss_main": main.detach(), "pixel_accuracy": 100 * right.sum() / known.sum().clamp_min(1)}

        return loss, metrics

    def scores(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C H W"]:
        """Class scores for views in [0, 1] of the size that the backbone was loaded for."""
        return self._enlarged(self.head(self.maps(images)), images)

    def _enlarged(self, scores: Float[Tensor, "B C h w"], images: Tensor) -> Float[Tensor, "B C H W"]:
        return F.interpolate(scores.float(), images.shape[2:], mode="bilinear", align_corners=False)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the backbone, for layer decay; the heads are the last one."""
        return self.maps.group_matcher("maps.")


def _cross_entropy(scores: Float[Tensor, "B C H W"], classes: UInt8[Tensor, "B H W"]) -> Float[Tensor, ""]:
    total = F.cross_entropy(scores, classes.long(), ignore_index=IGNORED, reduction="sum")
    return total / (classes != IGNORED).sum().clamp_min(1)


@torch.inference_mode()
def segment_image(
    segmenter: Segmenter, image: UInt8[Tensor, "3 h w"], short_side: int, crop: int, stride: int
) -> UInt8[Tensor, "h w"]:
    """The class of every pixel of an image: the mean score over windows, at the image's own size.

    Args:
        segmenter: in eval mode; its device is used.
        image: the image.
        short_side: pixels on its shorter side when it is looked at.
        crop: pixels on the side of a window.
        stride: pixels from one window to the next; the last one ends with the image.
    """
    device = segmenter.maps.pixel_mean.device
    height, width = image.shape[1:]
    factor = short_side / min(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    pixels = F.interpolate(image[None].to(device).float() / 255, size, mode="bilinear", antialias=True)
    grey = torch.tensor(GREY, device=device).view(1, 3, 1, 1) / 255
    filled = grey.expand(1, 3, max(size[0], crop), max(size[1], crop)).clone()
    filled[:, :, : size[0], : size[1]] = pixels
    corners = [
        (top, left) for top in _starts(filled.shape[2], crop, stride) for left in _starts(filled.shape[3], crop, stride)
    ]
    total, seen = None, torch.zeros(1, 1, *filled.shape[2:], device=device)
    for (top, left), scores in zip(corners, _window_scores(segmenter, filled, corners, crop), strict=True):
        total = scores.new_zeros(1, len(scores), *filled.shape[2:]) if total is None else total
        total[0, :, top : top + crop, left : left + crop] += scores
        seen[..., top : top + crop, left : left + crop] += 1
    assert total is not None
    mean = (total / seen)[:, :, : size[0], : size[1]]
    whole = F.interpolate(mean, (height, width), mode="bilinear", align_corners=False)
    return whole[0].argmax(dim=0).to(torch.uint8).cpu()


def _window_scores(
    segmenter: Segmenter, image: Float[Tensor, "1 3 h w"], corners: list[tuple[int, int]], crop: int
) -> Iterator[Float[Tensor, "C crop crop"]]:
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        chosen = corners[start : start + WINDOWS_AT_ONCE]
        views = [image[0, :, top : top + crop, left : left + crop] for top, left in chosen]
        yield from segmenter.scores(torch.stack(views))


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side."""
    return sorted({min(start, length - crop) for start in range(0, max(1, length - crop + stride), stride)})
