"""The views of one training image: shared by student and teachers but for the colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from comad.data.loader import Sample
from comad.data.transforms import ColourChange, Crop


@dataclass(frozen=True)
class DistillViews:
    """One crop and flip for all, colours changed for the student alone, noise to draw the masks from.

    Args:
        crop: the shared crop.
        colour: the student's change of colours; None changes nothing.
        noise_rows: one row for the student and one per teacher.
        num_patches: N.
    """

    crop: Crop
    colour: ColourChange | None
    noise_rows: int
    num_patches: int

    def __call__(self, image: Tensor) -> Sample:
        """uint8 image → (teachers' view, student's view) and uniform noise (1 + M, N)."""
        shared = self.crop(image)
        student = self.colour(shared) if self.colour else shared
        return Sample((shared, student), torch.rand(self.noise_rows, self.num_patches))
