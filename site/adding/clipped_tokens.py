"""A normaliser of your own: channels far from a token's mean, which some large teachers have, are clipped.

comad distill --plugin docs/adding/clipped_tokens.py --normalizer clip --normalizer.limit 3
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.normalizers import Normalizer
from comad.models.backbone import Tokens, map_tokens


@dataclass(frozen=True, kw_only=True)
class Clip(Normalizer, name="clip"):
    """Each token to mean 0 and variance 1 over its channels, and then into an interval.

    Args:
        limit: largest magnitude that is left.
    """

    limit: float = 3.0

    def __call__(self, state: nn.Module, tokens: Tokens, teacher: int) -> Tokens:
        """Normalise the tokens of one teacher."""

        def clip(row: Tensor) -> Tensor:
            return F.layer_norm(row.float(), row.shape[-1:]).clamp(-self.limit, self.limit)

        return map_tokens(clip, tokens)
