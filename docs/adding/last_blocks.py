"""A feature spec of your own: teachers are read as the mean of their last blocks.

comad distill --plugin docs/adding/last_blocks.py --features last-blocks --features.count 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from comad.distillation.features import FeatureSpec, TeacherOutput
from comad.distillation.masking import Visible
from comad.models.backbone import Backbone, Hidden


@dataclass(frozen=True, kw_only=True)
class LastBlocks(FeatureSpec, name="last-blocks"):
    """The mean of the tokens after a teacher's last blocks.

    Args:
        count: how many blocks.
    """

    count: int = 2

    def read(
        self,
        backbone: Backbone,
        images: Float[Tensor, "B 3 H W"],
        visible: Visible,
        hidden: Hidden,
        needs: frozenset[str],
    ) -> TeacherOutput:
        """Run the teacher once and read it several times; queries, keys and values if an objective compares them."""
        last = len(backbone.blocks)
        numbers = range(max(1, last - self.count + 1), last + 1)
        qkv = last if "qkv" in needs else 0
        output = backbone(images, visible, hidden, intermediates=numbers, qkv=qkv)
        parts = output.intermediates
        patches = torch.stack([part.patches for part in parts]).mean(dim=0)
        classes = [part.cls for part in parts if part.cls is not None]
        return TeacherOutput(torch.stack(classes).mean(dim=0) if classes else None, patches, (), output.qkv)
