"""MoCo v3 (arXiv:2104.02057)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import tyro
from jaxtyping import Float
from lightly.models.modules import MoCoProjectionHead
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor, nn
from torch.nn import functional as F

from comad.data.loader import Batch, Sample
from comad.data.transforms import ColourChange, Crop, random_views
from comad.models.timm_backbone import TimmBackbone
from comad.pretrain.momentum import Momentum
from comad.runtime.run import LossAndMetrics


@dataclass(frozen=True, kw_only=True)
class MoCoV3:
    """Two views; each must find the other's momentum key among those of the batch.

    Args:
        temperature: of InfoNCE.
        momentum: of the momentum encoder at the start; it rises to 1 along a cosine.
        hidden_width: hidden units of projector and predictor.
        out_width: outputs of projector and predictor.
        freeze_patches: do not train the patch projection (section 4.1 of the paper).
        crop_scale: smallest and largest share of the image's area in a view.
        jitter: strength of brightness, contrast, saturation and hue changes.
        grey: how often a view loses its colours.
        blur: how often a view is blurred.
    """

    vit_arguments: ClassVar[dict[str, Any]] = {}
    fixed_positions: ClassVar[bool] = True
    kind: tyro.conf.Suppress[Literal["mocov3"]] = "mocov3"
    token_types: ClassVar[tuple[str, ...]] = ("cls", "patch")
    temperature: float = 0.2
    momentum: float = 0.99
    hidden_width: int = 1024
    out_width: int = 128
    freeze_patches: bool = True
    crop_scale: tuple[float, float] = (0.2, 1.0)
    jitter: float = 0.4
    grey: float = 0.1
    blur: float = 0.2

    def build(self, backbone: TimmBackbone) -> MoCoV3Model:
        """Add projector, predictor and the momentum encoder to a backbone."""
        return MoCoV3Model(backbone, self)

    def views(self, image_size: int, num_patches: int) -> MoCoV3Views:
        """The views of one training image."""
        crop = Crop(size=image_size, scale=self.crop_scale)
        return MoCoV3Views(crop, ColourChange(strength=self.jitter, grey=self.grey, blur=self.blur))


@dataclass(frozen=True)
class MoCoV3Views:
    """Two crops with colours changed."""

    crop: Crop
    colour: ColourChange

    def __call__(self, image: Tensor) -> Sample:
        """uint8 image → two views."""
        return Sample(random_views(image, [(self.crop, self.colour)] * 2), torch.zeros(0))


class MoCoV3Model(nn.Module):
    """Encoder, projector, predictor, their momentum copies and the symmetrised loss."""

    def __init__(self, backbone: TimmBackbone, config: MoCoV3):
        super().__init__()
        if config.freeze_patches:
            backbone.vit.patch_embed.requires_grad_(False)
        self.config = config
        self.backbone = backbone
        hidden, out = config.hidden_width, config.out_width
        self.projector = MoCoProjectionHead(backbone.width, hidden, out, num_layers=3, batch_norm=True)
        self.predictor = MoCoProjectionHead(out, hidden, out, num_layers=2, batch_norm=True)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        pairs = (self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)
        self.momentum = Momentum(config.momentum, pairs)

    @property
    def trained(self) -> TimmBackbone:
        """The encoder, not its momentum copy, as the official files."""
        return self.backbone

    def forward(self, batch: Batch, progress: float) -> LossAndMetrics:
        """One step of the symmetrised loss; the momentum encoder moves first (algorithm 1)."""
        if self.training:
            self.momentum.move(progress)
        images = torch.cat([view.float() / 255 for view in batch.views])
        first, second = (self.predictor(self.projector(half)) for half in self.backbone(images).cls.chunk(2))
        with torch.no_grad():
            halves = self.momentum_backbone(images).cls.chunk(2)
            first_key, second_key = (self.momentum_projector(half) for half in halves)
        tau = self.config.temperature
        return info_nce(first, second_key, tau) + info_nce(second, first_key, tau), dict


def info_nce(queries: Float[Tensor, "B out"], keys: Float[Tensor, "B out"], temperature: float) -> Float[Tensor, ""]:
    """Cross-entropy of finding one's own key in the batch, times 2τ (arXiv:2104.02057, equation 1 and algorithm 1).

    The batch is that of all processes.
    """
    own = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
    if world_size() > 1:
        keys = torch.cat(gather(keys))
    with torch.autocast(queries.device.type, enabled=False):
        logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, own)
