"""A fusion of your own, with parameters: a router that learns which teacher a token is to follow.

comad distill --plugin docs/adding/learned_router.py --fusion router --fusion.temperature 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from comad.distillation.fusion import Fused, Fusion, Pair, fuse, stack_pairs


@dataclass(frozen=True, kw_only=True)
class Router(Fusion, name="router"):
    """Weights are the softmax of a trained linear map of the student's token.

    Args:
        temperature: of the softmax over teachers.
    """

    one_target: ClassVar[bool] = True
    temperature: float = 1.0

    def build(self, widths: Sequence[int]) -> nn.Module:
        """The map; it is trained with the student and kept in its checkpoints."""
        return nn.Linear(widths[0], len(widths))

    def __call__(self, state: nn.Module, pairs: Sequence[Pair]) -> Fused:
        """Fuse the targets of the teachers that saw the token."""
        teachers, valid = stack_pairs(pairs)
        student = pairs[0].prediction
        logits = state(student.detach()).float().permute(2, 0, 1) / self.temperature  # (M, B, n)
        weights = logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(dim=0) * valid
        return fuse(student, teachers, weights, valid)
