"""An aligner of your own: fixed random directions of the teacher's tokens, which need no calibration.

comad distill --plugin docs/adding/random_projection.py --aligner random-projection --aligner.seed 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.aligners import Aligner
from comad.distillation.normalizers import fixed_linears


@dataclass(frozen=True, kw_only=True)
class RandomProjection(Aligner, name="random-projection"):
    """A random map from each teacher's width to the student's, then LayerNorm; it is never trained.

    Args:
        seed: of the maps.
    """

    seed: int = 0

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], one_target: bool) -> nn.Module:
        """Fixed maps; a part of the checkpoint."""
        linears = fixed_linears([(teacher_width, width) for teacher_width in teacher_widths])
        generator = torch.Generator().manual_seed(self.seed)
        for name, parameter in linears.named_parameters():
            if name.endswith("weight"):
                parameter.data.normal_(generator=generator)
        return linears

    def teacher(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """The target made of a teacher's tokens."""
        mapped = state[teacher](tokens.float())
        return F.layer_norm(mapped, mapped.shape[-1:])
