"""An objective of your own, with parameters: tokens pooled by a learnt query are compared.

comad distill --plugin docs/adding/attention_pooling.py --objectives.pool attention-pooled --objectives.pool.weight 0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from comad.distillation.features import StudentOutput, TeacherOutput
from comad.distillation.fusion import Pair
from comad.distillation.objectives import Compared, Objective, Shapes, cosine


@dataclass(frozen=True, kw_only=True)
class AttentionPooled(Objective, name="attention-pooled"):
    """1 - cosine of the student's tokens and of their targets, both pooled by the same attention.

    Args:
        queries: that are learnt; each pools by itself.
    """

    queries: int = 1

    def build(self, shapes: Shapes) -> nn.Module:
        """Queries for every pair."""
        return nn.ParameterList([nn.Parameter(torch.randn(self.queries, width)) for width in shapes.compared])

    def pairs(
        self,
        state: Any,
        pairs: Sequence[Pair],
        student: StudentOutput,
        teachers: Sequence[TeacherOutput],
        visible: Bool[Tensor, "B N"],
    ) -> Compared:
        """Pooled tokens, (B, queries, K)."""
        found = []
        for query, (prediction, target, valid, _) in zip(state, pairs, strict=True):
            scores = prediction @ query.T / query.shape[1] ** 0.5  # (B, n, queries)
            scores = scores.masked_fill(~valid.unsqueeze(2), torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=1).mT
            anywhere = valid.any(dim=1, keepdim=True).expand(-1, self.queries)
            found.append(Pair(weights @ prediction, weights @ target, anywhere, anywhere))
        return found, torch.stack([pair.valid for pair in found]).any(dim=0)

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """Of every pooled token."""
        return cosine(pair.prediction, pair.target, 1.0)
