"""Masked autoencoder (arXiv:2111.06377)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor, nn

from comad.data.loader import Batch, Sample
from comad.data.transforms import Crop
from comad.models.backbone import normalised_patches, random_visible, visible_map
from comad.models.decoder import MaskedDecoder
from comad.models.timm_backbone import TimmBackbone
from comad.runtime.options import COMMON
from comad.runtime.run import LossAndMetrics


@dataclass(frozen=True, kw_only=True)
class Mae:
    """Mask most patches, encode the rest, reconstruct the pixels of the masked ones.

    Args:
        mask_ratio: share of hidden patches.
        decoder_width: of the decoder, which is kept beside the teacher, for `g2sd`.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        crop_scale: of the random resized crop; the only augmentation besides the flip.
    """

    vit_arguments: ClassVar[dict[str, Any]] = {}
    fixed_positions: ClassVar[bool] = True
    kind: tyro.conf.Suppress[Literal["mae"]] = "mae"
    token_types: ClassVar[tuple[str, ...]] = ("patch",)
    mask_ratio: float = field(default=0.75, metadata=COMMON)
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    crop_scale: tuple[float, float] = (0.2, 1.0)

    def build(self, backbone: TimmBackbone) -> MaeModel:
        """Add the decoder to a backbone."""
        return MaeModel(backbone, self)

    def views(self, image_size: int, num_patches: int) -> MaeViews:
        """The views of one training image."""
        return MaeViews(Crop(size=image_size, scale=self.crop_scale), num_patches)


@dataclass(frozen=True)
class MaeViews:
    """One crop, and a number per patch to draw the mask from."""

    crop: Crop
    num_patches: int

    def __call__(self, image: Tensor) -> Sample:
        """uint8 image → one view."""
        return Sample((self.crop(image),), torch.rand(self.num_patches))


class MaeModel(nn.Module):
    """Encoder, decoder and the loss on hidden patches."""

    def __init__(self, backbone: TimmBackbone, config: Mae):
        super().__init__()
        self.backbone = backbone
        self.num_visible = max(1, round(backbone.num_patches * (1 - config.mask_ratio)))
        size = config.decoder_width, config.decoder_depth, config.decoder_heads
        self.decoder = MaskedDecoder(backbone.width, backbone.grid, 3 * backbone.patch_size**2, *size)

    @property
    def trained(self) -> TimmBackbone:
        """The encoder."""
        return self.backbone

    def forward(self, batch: Batch, progress: float) -> LossAndMetrics:
        """One step: squared error to the normalised pixels of the hidden patches (section 3, reconstruction target)."""
        images = batch.views[0].float() / 255
        visible = random_visible(batch.noise, self.num_visible)
        tokens = self.backbone(images, visible)
        prediction = self.decoder(tokens.cls, tokens.patches, visible).float()
        hidden = ~visible_map(visible, len(images), self.backbone.num_patches, images.device)
        return mae_loss(prediction, images, self.backbone.patch_size, hidden), dict


def mae_loss(
    prediction: Float[Tensor, "B N pixels"],
    images: Float[Tensor, "B 3 H W"],
    patch_size: int,
    hidden: Bool[Tensor, "B N"],
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden patches, each patch's pixels normalised by its own mean and variance."""
    error = (prediction - normalised_patches(images, patch_size)).square().mean(dim=-1)
    return (error * hidden).sum() / hidden.sum()
