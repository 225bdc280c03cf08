"""Pyramids of maps at strides 4, 8, 16 and 32 from networks that have one stride, or their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from timm.layers.norm import LayerNorm2d
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)

Map = Float[Tensor, "B _ _ _"]


def conv_norm(width: int, channels: int, kernel: int) -> nn.Sequential:
    """A convolution with standardised weights and a group norm, of 16 channels a group.

    Both are the same at batch 1 and over any number of processes. Group norm alone learns far slower than batch norm
    here; with weight standardisation (arXiv:1903.10520) it keeps up.
    """
    groups = max(1, channels // 16)
    norm = nn.GroupNorm(groups if channels % groups == 0 else 1, channels)
    return nn.Sequential(StdConv2d(width, channels, kernel, padding=kernel // 2), norm)


class Rescale(nn.Sequential):
    """A map at another stride: transposed convolutions enlarge it, a maximum over cells shrinks it.

    Args:
        width: channels that come in.
        times: how much larger the map is to be: 4, 2, 1, 1/2, ...
        halve: half as many channels after each enlargement, as in ViTDet.

    Attributes:
        width: channels that go out.
    """

    def __init__(self, width: int, times: float, halve: bool = False):
        doublings, layers = round(math.log2(times)), []
        for number in range(doublings):
            layers += [LayerNorm2d(width), nn.GELU()] if number else []
            layers.append(nn.ConvTranspose2d(width, wider := width // 2 if halve else width, 2, stride=2))
            width = wider
        if doublings < 0:
            layers.append(nn.MaxPool2d(2**-doublings))
        super().__init__(*layers)
        self.width = width


class FourScales(nn.Module):
    """One map per stride of `STRIDES`, each from its own depth: the neck of UPerNet on a plain Vision Transformer.

    Args:
        widths, strides: of the four maps that come in, channels and pixels per cell.

    Attributes:
        widths: of the maps that go out.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.scales = nn.ModuleList(
            Rescale(width, stride / wanted) for width, stride, wanted in zip(widths, strides, STRIDES, strict=True)
        )
        self.widths = list(widths)

    def forward(self, maps: list[Map]) -> list[Map]:
        """Rescale each map."""
        return [scale(part) for scale, part in zip(self.scales, maps, strict=True)]


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid (arXiv:2203.16527, section 3): every level from the last map, and one more level.

    A network with maps of several strides gives each level from its own map, without a path from the top down.

    Args:
        widths, strides: of the four maps that come in, channels and pixels per cell.
        channels: of every level.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], channels: int):
        super().__init__()
        self.sources = [-1] * len(STRIDES) if len(set(strides)) == 1 else list(range(len(STRIDES)))
        levels = []
        for source, wanted in zip(self.sources, STRIDES, strict=True):
            scale = Rescale(widths[source], strides[source] / wanted, halve=True)
            smooth = (conv_norm(scale.width, channels, 1), conv_norm(channels, channels, 3))
            levels.append(nn.Sequential(scale, *smooth))
        self.levels = nn.ModuleList(levels)
        self.coarsest = nn.MaxPool2d(1, stride=2)

    def forward(self, maps: list[Map]) -> dict[str, Map]:
        """Four maps → levels "0" to "3" at strides 4 to 32, and "pool" at 64."""
        levels = [level(maps[source]) for source, level in zip(self.sources, self.levels, strict=True)]
        named = {str(number): level for number, level in enumerate(levels)}
        return {**named, "pool": self.coarsest(levels[-1])}
