"""Slot `fusion`: how teachers become one target, or their losses one loss. Yours: subclass `Fusion`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.relations import cosine_rows
from comad.models.backbone import Tokens
from comad.runtime.processes import sum_of_all
from comad.runtime.slots import Slot


class Pair(NamedTuple):
    """What the student gives and what it is to give.

    Attributes:
        prediction, target: (B, n, K); K may be several axes.
        valid: where there is a target.
        weight: of the comparison, by the fusion; 0 where it is not valid.
    """

    prediction: Float[Tensor, "B n *K"]
    target: Float[Tensor, "B n *K"]
    valid: Bool[Tensor, "B n"]
    weight: Float[Tensor, "B n"] | Bool[Tensor, "B n"]


Fused = tuple[list[Pair], Tensor]
"""The pairs to compare, one if the targets were fused, else one per teacher; and each teacher's share, (M, B, n)."""


@dataclass(frozen=True, kw_only=True)
class Fusion(Slot, slot="fusion", default="gate"):
    """Makes of one pair per teacher one pair with a fused target (``one_target``), or weighs the pairs.

    Attributes:
        one_target: all teachers are compared with the same prediction.
        own_positions: a teacher's loss is the mean over the positions that it saw, not over those that any saw.
    """

    one_target: ClassVar[bool] = False
    own_positions: ClassVar[bool] = False

    @property
    def num_calibration_images(self) -> int:
        """Images whose targets `calibrate` wants; 0: it is not called."""
        return 0

    def build(self, widths: Sequence[int]) -> nn.Module:
        """What it trains; ``widths`` are the channels of what is compared, one entry per teacher."""
        return nn.Module()

    def calibrate(self, state: Any, targets: Sequence[Tokens]) -> None:
        """Fit on aligned targets of the same images and positions, (n, K) and (n, k, K), one entry per teacher."""

    @abstractmethod
    def __call__(self, state: Any, pairs: Sequence[Pair]) -> Fused:
        """Fuse or weigh. A position that no teacher saw has weight 0."""

    def reweigh(
        self, losses: Float[Tensor, "M B"], has_target: Bool[Tensor, "M B"], noise: Float[Tensor, "B M"]
    ) -> Float[Tensor, "M B"] | None:
        """Factors of the losses of each teacher on each image, from the losses themselves; None: as they are.

        Args:
            losses: sum of the objectives, without gradient.
            has_target: whether the teacher has a target there at all.
            noise: uniform in [0, 1), of the sample.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Mean(Fusion, name="mean"):
    """The plain mean of the teachers that saw the token.

    Args:
        renormalize: normalise the fused token over its channels again, for a mean of unlike vectors is short.
    """

    one_target: ClassVar[bool] = True
    renormalize: bool = False

    def __call__(self, state: nn.Module, pairs: Sequence[Pair]) -> Fused:
        """See `Fusion`."""
        teachers, valid = stack_pairs(pairs)
        weights = (valid / valid.sum(dim=0).clamp(min=1)).to(teachers.dtype)
        return fuse(pairs[0].prediction, teachers, weights, valid, self.renormalize)


@dataclass(frozen=True, kw_only=True)
class Gate(Fusion, name="gate"):
    """The consensus gate (arXiv:2508.04816, "Joint Teachers Consensus Gating"); it has no parameters.

    Args:
        affinity: score a teacher by its cosine to the student's token.
        consensus: score it by its mean cosine to the other teachers that saw the token.
        temperature: of the softmax over teachers.
        detached: let no gradient through the weights.
        renormalize: normalise the fused token over its channels again, for a mean of unlike vectors is short.
    """

    one_target: ClassVar[bool] = True
    affinity: bool = True
    consensus: bool = True
    temperature: float = 0.1
    detached: bool = True
    renormalize: bool = False

    def __call__(self, state: nn.Module, pairs: Sequence[Pair]) -> Fused:
        """Weigh the teachers per token. A token that no teacher saw gets target 0 and weights 0."""
        (teachers, valid), student = stack_pairs(pairs), pairs[0].prediction
        scores = self.scores(student, teachers, valid) / self.temperature
        weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(dim=0) * valid  # α
        return fuse(student, teachers, weights.detach() if self.detached else weights, valid, self.renormalize)

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
class Sum(Fusion, name="sum"):
    """The sum of the teachers' losses, each the mean where it saw the token.

    Args:
        average: their mean in place of the sum.
    """

    own_positions: ClassVar[bool] = True
    average: bool = False

    def __call__(self, state: nn.Module, pairs: Sequence[Pair]) -> Fused:
        """See `Fusion`."""
        weights = torch.stack([pair.valid for pair in pairs]).to(pairs[0].target.dtype)
        return weigh(pairs, weights / len(pairs) if self.average else weights)


@dataclass(frozen=True, kw_only=True)
class LossGate(Fusion, name="loss-gate"):
    """The consensus gate as weights of the losses: each teacher is met in its own space, which needs no common basis.

    A teacher's score is the cosine of the student's prediction to its token, plus its agreement with the others: the
    mean cosine between its and their row of cosines from this token to the tokens that both saw. No gradient passes
    through the weights.

    Args:
        affinity: score a teacher by its cosine to the student's prediction.
        consensus: score it by its agreement with the other teachers.
        temperature: of the softmax over teachers.
    """

    affinity: bool = True
    consensus: bool = True
    temperature: float = 0.1

    @torch.no_grad()
    def __call__(self, state: nn.Module, pairs: Sequence[Pair]) -> Fused:
        """Weights of the losses, 0 where a teacher did not see the token, else with sum 1 over the teachers."""
        valid = torch.stack([pair.valid for pair in pairs])
        scores = torch.zeros(valid.shape, dtype=pairs[0].target.dtype, device=valid.device)
        if self.affinity:
            scores = scores + torch.stack([F.cosine_similarity(pair.prediction, pair.target, dim=-1) for pair in pairs])
        if self.consensus:
            scores = scores + agreement([pair.target for pair in pairs], valid)
        scores = (scores / self.temperature).masked_fill(~valid, torch.finfo(scores.dtype).min)
        return weigh(pairs, scores.softmax(dim=0) * valid)


class Anchors(nn.Module):
    """One teacher's class tokens and mean patches of the same images as every other teacher's."""

    cls: Tensor
    patches: Tensor

    def __init__(self, count: int, width: int):
        super().__init__()
        for name in ("cls", "patches"):
            self.register_buffer(name, torch.zeros(count, width))

    @torch.no_grad()
    def fit(self, targets: Tokens) -> None:
        """Keep the first images, again from the start if there are too few."""
        chosen = torch.arange(len(self.patches), device=self.patches.device) % len(targets.patches)
        self.patches.copy_(targets.patches.mean(dim=1)[chosen])
        if targets.cls is not None:
            self.cls.copy_(targets.cls[chosen])

    def forward(self, target: Float[Tensor, "B n K"]) -> Float[Tensor, "B n anchors"]:
        """Each token's row of cosines to the anchors, centred by their mean; the row has mean 0 and length 1."""
        rows = []
        for anchors, tokens in ((self.cls, target[:, :1]), (self.patches, target[:, 1:])):
            centre = anchors.mean(dim=0)
            rows.append(F.normalize(tokens.float() - centre, dim=-1) @ F.normalize(anchors - centre, dim=-1).T)
        row = torch.cat(rows, dim=1)
        return F.normalize(row - row.mean(dim=-1, keepdim=True), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Consensus(Fusion, name="consensus"):
    """Weights of the losses by what teachers know about images: whether they agree on which images are alike.

    A teacher describes a token by its row of cosines to anchors, its own features of a few images of the run. Rows of
    different teachers are of the same images, so they can be compared without a common basis: two teachers agree as
    far as their rows correlate (per row what centred kernel alignment is for a set, arXiv:1905.00414). The score of a
    teacher is its mean agreement with the others. Features of a random network are easy to match, but agree with
    nobody. Of two teachers each weighs one half.

    Args:
        power: a weight is the score to this power, over the sum of all teachers'.
        anchors: images that tokens are compared with.
    """

    power: float = 3.0
    anchors: int = 256

    @property
    def num_calibration_images(self) -> int:
        """See `Fusion`."""
        return self.anchors

    def build(self, widths: Sequence[int]) -> nn.Module:
        """Anchors of every teacher, which calibration fills."""
        return nn.ModuleList([Anchors(self.anchors, width) for width in widths])

    def calibrate(self, state: Any, targets: Sequence[Tokens]) -> None:
        """See `Fusion`."""
        for own, part in zip(state, targets, strict=True):
            own.fit(part)

    @torch.no_grad()
    def __call__(self, state: Any, pairs: Sequence[Pair]) -> Fused:
        """Weights of the losses, 0 where a teacher did not see the token, else with sum 1 over the teachers."""
        valid = torch.stack([pair.valid for pair in pairs])
        with torch.autocast(valid.device.type, enabled=False):
            rows = torch.stack([own(pair.target) for own, pair in zip(state, pairs, strict=True)])
            agreements = torch.stack([(row * rows).sum(dim=-1) for row in rows])  # (M, M, B, n)
        others = valid & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)[:, :, None, None]
        scores = (agreements * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)
        weights = (scores.clamp(min=0) ** self.power + torch.finfo(scores.dtype).tiny) * valid
        return weigh(pairs, weights / weights.sum(dim=0).clamp(min=torch.finfo(scores.dtype).tiny))


@dataclass(frozen=True, kw_only=True)
class DropEasiest(Fusion, name="drop-easiest"):
    """Teacher dropping (arXiv:2408.05088): of each image the teacher with the largest loss stays, others by chance.

    The loss is the mean over all that stay in the batch, so that its size does not depend on the chance.

    Args:
        probability: of leaving out a teacher that is not the hardest.
    """

    own_positions: ClassVar[bool] = True
    probability: float = 0.5

    def __call__(self, state: nn.Module, pairs: Sequence[Pair]) -> Fused:
        """Weight 1 where a teacher saw the token."""
        return weigh(pairs, torch.stack([pair.valid for pair in pairs]).to(pairs[0].target.dtype))

    def reweigh(
        self, losses: Float[Tensor, "M B"], has_target: Bool[Tensor, "M B"], noise: Float[Tensor, "B M"]
    ) -> Float[Tensor, "M B"] | None:
        """One decision per image; the factors of the teachers that stay are equal, and have mean 1 over the images."""
        if len(losses) == 1:
            return None
        hardest = losses.masked_fill(~has_target, -1.0).argmax(dim=0)
        stays = (self.probability <= noise.T).scatter(0, hardest.unsqueeze(0), True) & has_target
        return stays * sum_of_all(has_target.any(dim=0).sum()) / sum_of_all(stays.sum()).clamp(min=1)


def stack_pairs(pairs: Sequence[Pair]) -> tuple[Float[Tensor, "M B n D"], Bool[Tensor, "M B n"]]:
    """Targets, in float32 at least, and validity of all teachers, for a fusion of targets."""
    targets = torch.stack([pair.target for pair in pairs])
    targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
    return targets, torch.stack([pair.valid for pair in pairs])


def fuse(student: Tensor, teachers: Tensor, weights: Tensor, valid: Tensor, renormalize: bool = False) -> Fused:
    """One pair, whose target is the weighted sum over the teachers."""
    target = (weights.unsqueeze(-1) * teachers).sum(dim=0)  # not einsum: autocast would round it to bfloat16
    target = F.layer_norm(target, target.shape[-1:]) if renormalize else target
    anywhere = valid.any(dim=0)
    return [Pair(student, target, anywhere, anywhere)], weights


def weigh(pairs: Sequence[Pair], weights: Float[Tensor, "M B n"]) -> Fused:
    """One pair per teacher, with these weights."""
    weighed = [pair._replace(weight=weight) for pair, weight in zip(pairs, weights, strict=True)]
    return weighed, weights / weights.sum(dim=0).clamp(min=1e-12)


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
