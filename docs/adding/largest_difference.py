"""A distance of your own, for every objective that has one.

comad distill --plugin docs/adding/largest_difference.py --preset comad --objectives.token.distance largest
"""

from __future__ import annotations

from torch import Tensor

from comad.distillation.objectives import DISTANCES


def largest(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Largest absolute difference over channels: (..., D) → (...)."""
    return (student - target).abs().amax(dim=-1)


DISTANCES["largest"] = largest
