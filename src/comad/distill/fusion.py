"""How the teachers' tokens become one target. Add a fusion: a frozen dataclass, its name in `Fusion` at the foot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


class Fused(NamedTuple):
    """One target token per position; ``weights`` are the teachers' shares, 0 where a teacher did not see the token."""

    target: Float[Tensor, "B n D"]
    weights: Float[Tensor, "M B n"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The consensus gate (arXiv:2508.04816, "Joint Teachers Consensus Gating"); it has no parameters.

    Args:
        affinity: score a teacher by its cosine to the student's token.
        consensus: score it by its mean cosine to the other teachers that saw the token.
        temperature: of the softmax over teachers.
        detached: let no gradient through the weights.
        renormalise: normalise the fused token over its channels again, for a mean of unlike vectors is short.
    """

    kind: Literal["gate"] = "gate"
    affinity: bool = True
    consensus: bool = True
    temperature: float = 0.1
    detached: bool = True
    renormalise: bool = False

    def __call__(
        self, student: Float[Tensor, "B n D"], teachers: Float[Tensor, "M B n D"], valid: Bool[Tensor, "M B n"]
    ) -> Fused:
        """Weigh the teachers per token. A token that no teacher saw gets target 0 and weights 0."""
        scores = self.scores(student, teachers, valid) / self.temperature
        weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(dim=0) * valid  # α
        if self.detached:
            weights = weights.detach()
        target = (weights.unsqueeze(-1) * teachers).sum(dim=0)  # not einsum: autocast would round it to bfloat16
        return Fused(F.layer_norm(target, target.shape[-1:]) if self.renormalise else target, weights)

    def scores(
        self, student: Float[Tensor, "B n D"], teachers: Float[Tensor, "M B n D"], valid: Bool[Tensor, "M B n"]
    ) -> Float[Tensor, "M B n"]:
        """e = s + c: affinity to the student plus agreement with the other teachers."""
        directions = F.normalize(teachers, dim=-1)
        scores = torch.zeros_like(valid, dtype=teachers.dtype)
        if self.affinity:
            scores = scores + (F.normalize(student, dim=-1) * directions).sum(dim=-1)  # s
        if self.consensus:
            seen = directions * valid.unsqueeze(-1)
            others = seen.sum(dim=0) - seen  # Σ over k ≠ m
            count = (valid.sum(dim=0) - valid.to(torch.int64)).clamp(min=1)
            scores = scores + (directions * others).sum(dim=-1) / count  # c
        return scores


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The plain mean of the teachers that saw the token."""

    kind: Literal["mean"] = "mean"
    renormalise: bool = False

    def __call__(
        self, student: Float[Tensor, "B n D"], teachers: Float[Tensor, "M B n D"], valid: Bool[Tensor, "M B n"]
    ) -> Fused:
        """See `Gate`."""
        weights = valid / valid.sum(dim=0).clamp(min=1)
        target = (weights.to(teachers.dtype).unsqueeze(-1) * teachers).sum(dim=0)
        return Fused(F.layer_norm(target, target.shape[-1:]) if self.renormalise else target, weights)


Fusion = Gate | Mean
