"""Heads that turn maps of features into classes per pixel. Add one: a module, a branch in `Segmenter`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.pyramid import FourScales, conv_norm

POOLED = (1, 2, 3, 6)
"""Cells on the side of the pooled maps."""

Map = Float[Tensor, "B _ _ _"]


def conv_block(width: int, channels: int, kernel: int) -> nn.Sequential:
    """Convolution, group norm, ReLU."""
    return nn.Sequential(conv_norm(width, channels, kernel), nn.ReLU())


def resize(maps: Map, like: Map) -> Map:
    """Bilinear, to the size of another map."""
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """What a map shows as a whole, beside what it shows at each place (arXiv:1612.01105)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.stages = nn.ModuleList(conv_block(width, channels, 1) for _ in POOLED)
        self.join = conv_block(width + len(POOLED) * channels, channels, 3)

    def forward(self, deepest: Map) -> Map:
        """(B, width, h, w) → (B, channels, h, w)."""
        pooled = [stage(F.adaptive_avg_pool2d(deepest, side)) for stage, side in zip(self.stages, POOLED, strict=True)]
        return self.join(torch.cat([deepest, *(resize(part, deepest) for part in pooled)], dim=1))


class UPerHead(nn.Module):
    """UPerNet (arXiv:1807.10221): pyramid pooling on the deepest map, a path from the top down, all levels joined.

    Args:
        widths, strides: of the four maps of the backbone.
        channels: of every level.
        num_classes: C.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], channels: int, num_classes: int):
        super().__init__()
        self.neck = FourScales(widths, strides)
        *lower, deepest = self.neck.widths
        self.pooling = PyramidPooling(deepest, channels)
        self.laterals = nn.ModuleList(conv_block(width, channels, 1) for width in lower)
        self.smooths = nn.ModuleList(conv_block(channels, channels, 3) for _ in lower)
        self.join = conv_block(len(widths) * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: list[Map]) -> Float[Tensor, "B C h w"]:
        """Four maps → class scores at the largest of them."""
        *lower, deepest = self.neck(maps)
        levels = [lateral(part) for lateral, part in zip(self.laterals, lower, strict=True)] + [self.pooling(deepest)]
        for number in reversed(range(len(lower))):
            levels[number] = levels[number] + resize(levels[number + 1], levels[number])
        smooth = [smooth(level) for smooth, level in zip(self.smooths, levels[:-1], strict=True)]
        joined = [resize(level, levels[0]) for level in (*smooth, levels[-1])]
        return self.classify(self.join(torch.cat(joined, dim=1)))


class ConvHead(nn.Module):
    """The auxiliary head: one convolution and a classifier on one map."""

    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv_block(width, channels, 3), nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1)
        )

    def forward(self, part: Map) -> Float[Tensor, "B C h w"]:
        """A map → class scores at its size."""
        return self.layers(part)


class LinearHead(nn.Module):
    """One linear map on the last map of features, each place normalised without learnt values."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = LayerNorm2d(width, affine=False)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Map]) -> Float[Tensor, "B C h w"]:
        """Four maps → class scores at the last one's size."""
        return self.classify(self.norm(maps[-1]))
