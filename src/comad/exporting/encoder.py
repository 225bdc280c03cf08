"""The networks that leave: normalised pixels in, features or class scores out, and how their pixels are prepared."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from comad.models.backbone import Backbone, Pool, pooled
from comad.models.embedding import PatchProjection


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to an image before it is shown to an exported network.

    Attributes:
        size: pixels on the side of the square that the network sees.
        crop: share of the shorter side that the square shows; the shorter side is resized to ``size / crop``.
        mean, std: of the red, green and blue pixels, in units of [0, 1].
        interpolation: of the resize, with antialiasing.
    """

    size: int
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side before the crop."""
        return round(self.size / self.crop)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file; ``shorter`` is among them."""
        return {**asdict(self), "shorter": self.shorter, "crop_mode": "center", "channels": "RGB", "rescale": 1 / 255}

    def normalised(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """What the exported network is given for pixels in [0, 1]."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def preprocessing_of(backbone: Backbone, crop: float) -> Preprocessing:
    """The pixels that a backbone was built for."""
    return Preprocessing(
        size=backbone.image_size, crop=crop, mean=shortest(backbone.pixel_mean), std=shortest(backbone.pixel_std)
    )


def shortest(values: Float[Tensor, "3 1 1"]) -> tuple[float, ...]:
    """Give the shortest decimals that are the same in float32: 0.485, not 0.48500001430511475."""
    return tuple(float(str(value)) for value in values.flatten().float().cpu().numpy())


def pool_of(backbone: Backbone) -> Pool:
    """What stands for the image: the class token if it was trained, else the mean patch token."""
    return "cls" if "cls" in backbone.token_types else "patch"


class Encoder(nn.Module):
    """A copy of a backbone on the CPU that takes normalised pixels and gives ``outputs``, all in float32.

    Args:
        backbone: any; left as it is.
        dtype: of the weights and of the computation inside.
    """

    outputs: tuple[str, ...] = ("feature", "patches")

    def __init__(self, backbone: Backbone, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).cpu().eval().requires_grad_(False)
        _plain_convolutions(self.backbone)
        for network in self.backbone.children():
            network.to(dtype).to(memory_format=torch.contiguous_format)
        self.backbone.pixel_mean = torch.zeros_like(self.backbone.pixel_mean)  # normalisation is the caller's
        self.backbone.pixel_std = torch.ones_like(self.backbone.pixel_std)
        self.pool: Pool = pool_of(backbone)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """The image's vector (B, E) and its patch tokens (B, N, E)."""
        tokens = self.backbone(pixels)
        return pooled(tokens, self.pool), tokens.patches.float()


class ClassScorer(nn.Module):
    """An encoder with a linear head: the scores of the classes, before any softmax.

    Args:
        encoder: gives the tokens.
        head: of a fine-tuned classifier; a copy is made.
        pool: what the head sees.
    """

    outputs: tuple[str, ...] = ("logits",)

    def __init__(self, encoder: Encoder, head: nn.Linear, pool: Pool):
        super().__init__()
        self.encoder = encoder
        self.pool: Pool = pool
        self.head = copy.deepcopy(head).cpu().float().requires_grad_(False)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """Class scores (B, C)."""
        return (self.head(self.encoder.backbone.pooled(pixels, self.pool)),)


def _plain_convolutions(module: nn.Module) -> None:
    """Put the convolution back that a patch embedding was made of: what every converter and quantiser knows."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, PatchProjection):
                kernel = cast(tuple[int, int], part.kernel_size)
                plain = nn.Conv2d(part.in_channels, part.out_channels, kernel, kernel, device="meta")
                plain.weight, plain.bias = part.weight, part.bias
                setattr(parent, name, plain)
