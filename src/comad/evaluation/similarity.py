"""How alike features are: those of two networks, and those of different images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def linear_cka(a: Float[Tensor, "n p"], b: Float[Tensor, "n q"]) -> float:
    """Linear centred kernel alignment of features of the same n images, 0 to 1 (arXiv:1905.00414, equation 4).

    0 where one of them is constant. Of fewer images than channels it reads too high.
    """
    a, b = (x.double() - x.double().mean(dim=0) for x in (a, b))
    size = (a.T @ a).square().sum().sqrt() * (b.T @ b).square().sum().sqrt()
    return float((a.T @ b).square().sum() / size) if size else 0.0


def centred_rows(unit: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    """Cosines of each image to the others, less their mean; 0 to itself. ``unit``: features of length 1."""
    count = len(unit)
    itself = torch.eye(count, dtype=torch.bool, device=unit.device)
    rows = (unit @ unit.T).masked_fill(itself, 0.0)
    return (rows - rows.sum(dim=1, keepdim=True) / max(1, count - 1)).masked_fill(itself, 0.0)


def cross_image_cosine(tokens: Float[Tensor, "b D"]) -> Float[Tensor, ""]:
    """Mean cosine over pairs of different images."""
    unit = F.normalize(tokens, dim=1)
    count = len(unit)
    return (unit.sum(dim=0).square().sum() - unit.square().sum()) / max(1, count * (count - 1))


def effective_rank(tokens: Float[Tensor, "b D"]) -> Float[Tensor, ""]:
    """Exponential of the entropy of the normalised singular values of the centred tokens (Roy & Vetterli, 2007)."""
    values = torch.linalg.svdvals(tokens - tokens.mean(dim=0))
    share = values / values.sum().clamp(min=1e-12)
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
