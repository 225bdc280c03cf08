"""Histograms of oriented gradients of an image's patches, as DMJD predicts them (arXiv:2301.00230, and its code)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from comad.models.backbone import patchify

DIRECTIONS = 9
CHANNELS = 2 * 2 * DIRECTIONS * 3
"""Of a patch: 2 x 2 cells, each of as many directions, of three colours."""
EPS = 1e-5 / 58**2
"""Of the variance in a cell: the published one, for pixels of 0 to 255, where a standard deviation is about 58."""


def hog(images: Float[Tensor, "B 3 H W"], cell: int) -> Float[Tensor, "B 3 h w 9"]:
    """Mean length of the gradients in each cell by direction, unsigned, bins of 20 degrees; 0 at the edges."""
    down = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    right = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
    bins = torch.atan2(down, right).rad2deg().remainder(180).div(180 / DIRECTIONS, rounding_mode="floor")
    length = torch.hypot(right, down)
    return torch.stack([F.avg_pool2d(length * (bins == k), cell) for k in range(DIRECTIONS)], dim=-1)


@torch.no_grad()
def hog_patches(images: Float[Tensor, "B 3 H W"], patch_size: int) -> Float[Tensor, "B N 108"]:
    """Histograms of 2 x 2 cells a patch, each normalised; in the order cell's row, cell's column, direction, colour.

    Args:
        images: pixels as a network takes them, of standard deviation about 1.
        patch_size: an even number.
    """
    found = F.layer_norm(hog(images.float(), patch_size // 2), (DIRECTIONS,), eps=EPS)
    return patchify(found.permute(0, 4, 1, 2, 3).flatten(1, 2), 2)
