"""How alike two networks' features are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def linear_cka(a: Float[Tensor, "n p"], b: Float[Tensor, "n q"]) -> float:
    """Linear centred kernel alignment of features of the same n images, 0 to 1 (arXiv:1905.00414, equation 4)."""
    a, b = (x.double() - x.double().mean(dim=0) for x in (a, b))
    cross = (a.T @ b).square().sum()
    return float(cross / ((a.T @ a).square().sum().sqrt() * (b.T @ b).square().sum().sqrt()))
