"""Pyramids of maps at strides 4, 8, 16 and 32 from networks that have one stride, or their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)

Map = Float[Tensor, "B _ _ _"]


def conv_norm(width: int, channels: int, kernel: int) -> nn.Sequential:
    """A convolution and a group norm, of 16 channels a group: the same at batch 1 and over any number of processes."""
    groups = max(1, channels // 16)
    conv = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(groups if channels % groups == 0 else 1, channels))


@contextmanager
def centring_norms(*heads: nn.Module) -> Iterator[None]:
    """Set the group norms of new heads by the first data that pass: channels leave with mean 0 and variance 1.

    That is over images and places, and an initial value of weights and biases (after arXiv:1511.06856), no more. Some
    channels of a Vision Transformer are large and all but constant, and stay so through random convolutions: group
    norm, which looks at one image, lets them hide the rest; batch norm would not, but needs a batch. Norms are set in
    the order in which data reach them, each behind those before it.
    """

    def centre(norm: nn.Module, inputs: object, output: Tensor) -> Tensor:
        norm = cast(nn.GroupNorm, norm)
        std, mean = torch.std_mean(output.float(), dim=(0, 2, 3), correction=0)
        std = torch.where(std > 1e-4, std, 1.0)  # a channel that is the same everywhere keeps its scale
        norm.weight.div_(std)
        norm.bias.sub_(mean).div_(std)
        return (output - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    norms = [part for head in heads for part in head.modules() if isinstance(part, nn.GroupNorm)]
    handles = [norm.register_forward_hook(centre) for norm in norms]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


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
