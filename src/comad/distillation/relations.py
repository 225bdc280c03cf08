"""Relations in place of tokens: cosines to other tokens and to past targets, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Tokens
from comad.runtime.processes import mean_of_all, rows_of_all

EXCLUDED = -1e4
"""Logit of what must not count: its softmax is 0 in float32 at any temperature, and its logarithm finite."""


def cosine_rows(tokens: Float[Tensor, "*B n D"]) -> Float[Tensor, "*B n n"]:
    """Cosines between the tokens of an image, or of a position, in float32 at least."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(tokens, dim=-1).clamp(min=1e-12)
    with torch.autocast(tokens.device.type, enabled=False):
        return tokens @ tokens.mT / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))


def other_cosines(tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B n n"]:
    """Cosines of each token to the other tokens of the image; 0 to itself, where it says nothing."""
    return cosine_rows(tokens) * (1 - torch.eye(tokens.shape[1], device=tokens.device))


def token_logits(
    tokens: Float[Tensor, "B n D"], counts: Bool[Tensor, "B n"], with_itself: bool = False
) -> Float[Tensor, "B n n"]:
    """Cosines to the other tokens that count, and with ``with_itself`` the token's to itself, which is always 1."""
    itself = torch.eye(counts.shape[1], dtype=torch.bool, device=counts.device) & (not with_itself)
    return cosine_rows(tokens).masked_fill(itself | ~counts.unsqueeze(1), EXCLUDED)


def attention_logits(qkv: Float[Tensor, "B n E3"], heads: int, relation: str) -> Float[Tensor, "B n heads n"]:
    """QKᵀ/√d or VVᵀ/√d of every head, rows first (arXiv:2301.01296, Q-K and V-V relation)."""
    batch, count, width = qkv.shape
    queries, keys, values = qkv.float().view(batch, count, 3, heads, width // 3 // heads).unbind(dim=2)
    left, right = (queries, keys) if relation == "queries-keys" else (values, values)
    with torch.autocast(qkv.device.type, enabled=False):
        rows = left.transpose(1, 2) @ right.permute(0, 2, 3, 1)  # (B, heads, n, n)
    return rows.transpose(1, 2) / math.sqrt(left.shape[-1])


def mean_of_maps(logits: Sequence[Float[Tensor, "B n heads n"]]) -> Float[Tensor, "B n heads n"]:
    """Logits whose softmax is the mean of the softmaxes."""
    logs = torch.stack([F.log_softmax(part, dim=-1) for part in logits])
    return logs.logsumexp(dim=0) - math.log(len(logits))


def with_class_token(tokens: Tokens) -> Tensor:
    """Class token, if there is one, and patches as one sequence."""
    return tokens.patches if tokens.cls is None else torch.cat([tokens.cls.unsqueeze(1), tokens.patches], dim=1)


class Queue(nn.Module):
    """The last targets as directions, 0 at first; part of the state: a resumed run finds them as they were."""

    directions: Tensor
    next: Tensor

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("directions", torch.zeros(length, width))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B n length"]:
        """Cosines of tokens to the directions kept."""
        with torch.autocast(tokens.device.type, enabled=False):
            kept = self.directions.clone()  # `push` may write before the backward
            return F.normalize(tokens.float(), dim=-1) @ kept.T

    @torch.no_grad()
    def push(self, targets: Float[Tensor, "B D"]) -> None:
        """Put the targets of all processes in the place of the oldest."""
        length = len(self.directions)
        newest = F.normalize(rows_of_all(targets.detach()).float(), dim=-1)[-length:]
        rows = (self.next + torch.arange(len(newest), device=newest.device)) % length
        self.directions[rows] = newest
        self.next.copy_((self.next + len(newest)) % length)


class Dispersion(nn.Module):
    """Mean squared angle of targets to their mean direction, over all batches so far (arXiv:2601.17237, eqs. 5, 6)."""

    mean: Tensor
    angle: Tensor
    steps: Tensor

    def __init__(self, width: int):
        super().__init__()
        for name, value in (("mean", torch.zeros(width)), ("angle", torch.ones(())), ("steps", torch.zeros(()))):
            self.register_buffer(name, value)

    @torch.no_grad()
    def follow(self, targets: Float[Tensor, "B D"]) -> None:
        """Take a batch in."""
        self.steps += 1
        self.mean.lerp_(mean_of_all(targets.mean(dim=0)), 1 / self.steps)
        angles = angle(targets, self.mean.expand_as(targets)).square()
        self.angle.lerp_(mean_of_all(angles.mean()), 1 / self.steps)


def angle(x: Float[Tensor, "*n D"], y: Float[Tensor, "*n D"]) -> Float[Tensor, " *n"]:
    """Angle between vectors, in radians; from 0.0014, for an angle of 0 has no gradient."""
    return F.cosine_similarity(x, y, dim=-1).clamp(-1 + 1e-6, 1 - 1e-6).acos()


def relative_distances(tokens: Float[Tensor, "B D"]) -> Float[Tensor, "B B"]:
    """Distances between the images of a batch, as shares of their mean (arXiv:1904.05068, eq. 6)."""
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    count = len(tokens) * (len(tokens) - 1)
    return distances * (count / distances.sum().clamp(min=1e-12))
