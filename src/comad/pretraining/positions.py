"""Fixed sin-cos positions, as MAE and MoCo v3 use them."""

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer


@torch.no_grad()
def fix_positions(vit: VisionTransformer) -> None:
    """Replace learned positions by two-dimensional sines and cosines that are not trained; prefix tokens get 0."""
    table = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim)
    assert vit.pos_embed is not None, "a plain Vision Transformer has positions"
    vit.pos_embed.zero_()
    vit.pos_embed[0, -len(table) :] = table
    vit.pos_embed.requires_grad_(False)
