"""Relations in place of tokens: cosines to other tokens and to past targets, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Tokens

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


def token_logits(tokens: Float[Tensor, "B n D"], counts: Bool[Tensor, "B n"]) -> Float[Tensor, "B n n"]:
    """Cosines to the other tokens that count. A token's cosine to itself says nothing and is left out."""
    itself = torch.eye(counts.shape[1], dtype=torch.bool, device=counts.device)
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
    """The last targets as directions, part of the state: a resumed run finds them as they were."""

    directions: Tensor
    next: Tensor

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("directions", F.normalize(torch.randn(length, width), dim=-1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B n length"]:
        """Cosines of tokens to the directions kept."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.normalize(tokens.float(), dim=-1) @ self.directions.clone().T  # `push` writes before the backward

    @torch.no_grad()
    def push(self, targets: Float[Tensor, "B D"]) -> None:
        """Put targets in the place of the oldest."""
        length = len(self.directions)
        newest = F.normalize(targets.detach().float(), dim=-1)[-length:]
        rows = (self.next + torch.arange(len(newest), device=newest.device)) % length
        self.directions[rows] = newest
        self.next.copy_((self.next + len(newest)) % length)
