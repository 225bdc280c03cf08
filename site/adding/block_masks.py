"""A masking policy of your own: the student sees one square block, every teacher sees all.

comad distill --plugin docs/adding/block_masks.py --masking block --masking.mask-ratio 0.6
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from comad.distillation.masking import HidingPatches, Masks


@dataclass(frozen=True, kw_only=True)
class Block(HidingPatches, name="block"):
    """The patches that are nearest to a random centre are visible to the student.

    Args:
        norm: of the distance: 1 gives a diamond, 2 a disc, a large one a square.
    """

    norm: float = 8.0

    def policy(self, noise: Float[Tensor, "B M1 N"], count: int) -> Masks:
        """Masks are functions of the noise alone, so that a sample has the same one again."""
        side = round(noise.shape[2] ** 0.5)
        axis = torch.arange(side, device=noise.device, dtype=noise.dtype)
        places = torch.cartesian_prod(axis, axis)  # (N, 2)
        centres = places[noise[:, 0].argmax(dim=1)]  # (B, 2)
        distances = torch.cdist(centres, places, p=self.norm)  # (B, N)
        nearest = distances.argsort(dim=1, stable=True)[:, :count]
        return Masks(nearest.sort(dim=1).values, (None,) * (noise.shape[1] - 1))
