"""How teachers become one target, or their losses one loss. Add one: a frozen dataclass, its name in `Fusion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from comad.distill.relations import cosine_rows


class Pair(NamedTuple):
    """What the student says and what it is to say. ``weight`` is 0 where the pair must not be compared."""

    prediction: Float[Tensor, "B n K"]
    target: Float[Tensor, "B n K"]
    weight: Float[Tensor, "B n"] | Bool[Tensor, "B n"]


class Joined(NamedTuple):
    """Pairs to compare: one whose target is fused, or one per teacher; and each teacher's share of a position."""

    pairs: tuple[Pair, ...]
    shares: Float[Tensor, "M B n"]


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
        rows = torch.cat([student.unsqueeze(0), teachers]).permute(1, 2, 0, 3)  # the student first
        cosines = cosine_rows(rows).permute(2, 3, 0, 1)
        scores = torch.zeros_like(valid, dtype=teachers.dtype)
        if self.affinity:
            scores = scores + cosines[0, 1:]  # s
        if self.consensus:
            others = valid & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)[:, :, None, None]  # k ≠ m
            scores = scores + (cosines[1:, 1:] * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)  # c
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


@dataclass(frozen=True, kw_only=True)
class LossGate:
    """The consensus gate as weights of the losses: each teacher is met in its own space, which needs no common basis.

    A teacher's score is the cosine of the student's prediction to its token, plus its agreement with the others: the
    mean cosine between its and their row of cosines from this token to the tokens that both saw.

    Args:
        affinity, consensus, temperature: see `Gate`. No gradient passes through the weights.
    """

    kind: Literal["loss-gate"] = "loss-gate"
    affinity: bool = True
    consensus: bool = True
    temperature: float = 0.1

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair], valid: Bool[Tensor, "M B n"]) -> Float[Tensor, "M B n"]:
        """Weights of the losses, 0 where a teacher did not see the token, else with sum 1 over the teachers."""
        scores = torch.zeros(valid.shape, dtype=pairs[0].target.dtype, device=valid.device)
        if self.affinity:
            scores = scores + torch.stack([F.cosine_similarity(pair.prediction, pair.target, dim=-1) for pair in pairs])
        if self.consensus:
            scores = scores + agreement([pair.target for pair in pairs], valid)
        scores = (scores / self.temperature).masked_fill(~valid, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=0) * valid


def agreement(targets: Sequence[Tensor], valid: Bool[Tensor, "M B n"]) -> Float[Tensor, "M B n"]:
    """Mean cosine of a teacher's token-token row to those of the other teachers that saw the token; 0 if none did."""
    rows = [cosine_rows(target) for target in targets]  # (B, n, n) each
    itself = torch.eye(valid.shape[2], dtype=torch.bool, device=valid.device)
    total, count = torch.zeros_like(valid, dtype=rows[0].dtype), torch.zeros_like(valid, dtype=rows[0].dtype)
    for m in range(len(rows)):
        for k in range(m):
            both = valid[m] & valid[k]
            columns = both.unsqueeze(1) & ~itself
            cosine = F.cosine_similarity(rows[m] * columns, rows[k] * columns, dim=-1)
            for teacher in (m, k):
                total[teacher] += cosine * both
                count[teacher] += both
    return total / count.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Sum:
    """The sum of the teachers' losses, each where it saw the token."""

    kind: Literal["sum"] = "sum"

    def __call__(self, pairs: Sequence[Pair], valid: Bool[Tensor, "M B n"]) -> Float[Tensor, "M B n"]:
        """Weight 1 where a teacher saw the token."""
        return valid.to(pairs[0].target.dtype)


@dataclass(frozen=True, kw_only=True)
class DropEasiest:
    """Teacher dropping (arXiv:2408.05088): of each image the teacher with the largest loss stays, others by chance.

    The loss is the mean over those that stay, so that its size does not depend on the chance.

    Args:
        probability: of leaving out a teacher that is not the hardest.
    """

    kind: Literal["drop-easiest"] = "drop-easiest"
    probability: float = 0.5

    def __call__(self, pairs: Sequence[Pair], valid: Bool[Tensor, "M B n"]) -> Float[Tensor, "M B n"]:
        """Weight 1 where a teacher saw the token."""
        return valid.to(pairs[0].target.dtype)

    def keep(
        self, losses: Float[Tensor, "M B"], speaks: Bool[Tensor, "M B"], chance: Float[Tensor, "M B"]
    ) -> Float[Tensor, "M B"]:
        """Factors of the losses of each image, with sum 1 over the teachers that stay.

        Args:
            losses: of each teacher on each image.
            speaks: whether the teacher has a token there at all.
            chance: uniform in [0, 1).
        """
        hardest = losses.masked_fill(~speaks, -1.0).argmax(dim=0)
        stays = (chance >= self.probability).scatter(0, hardest.unsqueeze(0), True) & speaks
        return stays / stays.sum(dim=0).clamp(min=1)


Fusion = Gate | Mean | LossGate | Sum | DropEasiest


def fuses_targets(fusion: Fusion) -> bool:
    """Whether teachers are fused before the comparison, so that there is one target."""
    return isinstance(fusion, Gate | Mean)


def join(fusion: Fusion, pairs: Sequence[Pair]) -> Joined:
    """Fuse the targets of pairs with the same prediction into one pair, or weigh the pairs."""
    valid = torch.stack([pair.weight for pair in pairs]).bool()
    if isinstance(fusion, Gate | Mean):
        student = pairs[0].prediction
        target, weights = fusion(student, torch.stack([pair.target for pair in pairs]).float(), valid)
        return Joined((Pair(student, target, valid.any(dim=0)),), weights)
    weights = fusion(pairs, valid)
    weighed = tuple(pair._replace(weight=weight) for pair, weight in zip(pairs, weights, strict=True))
    return Joined(weighed, weights / weights.sum(dim=0).clamp(min=1e-12))
