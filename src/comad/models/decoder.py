"""A light transformer that fills in hidden patches: MAE's decoder, and the student's when it drops tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from comad.models.backbone import scatter_patches


class MaskedDecoder(nn.Module):
    """Embed visible tokens, put a mask token at every other position, add fixed positions, run blocks, predict.

    Args:
        in_width: channels of the encoder's tokens.
        grid: rows and columns of patches.
        width, depth, heads: of the decoder's blocks.
        out_width: channels predicted at every position.

    Source: arXiv:2111.06377, section 3 (decoder).
    """

    positions: Tensor

    def __init__(
        self, in_width: int, grid: tuple[int, int], out_width: int, width: int = 128, depth: int = 2, heads: int = 4
    ):
        super().__init__()
        self.num_heads = heads
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), width), persistent=False)
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm: nn.Module = nn.LayerNorm(width)
        self.predict = nn.Linear(width, out_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, cls: Float[Tensor, "B E"] | None, patches: Float[Tensor, "B V E"], visible: Int[Tensor, "B V"]
    ) -> Float[Tensor, "B N out"]:
        """Predict all N positions from the visible ones."""
        return self.predict(self.decode(cls, patches, visible))[:, -len(self.positions) :]

    def decode(
        self,
        cls: Float[Tensor, "B E"] | None,
        patches: Float[Tensor, "B V E"],
        visible: Int[Tensor, "B V"],
        blocks: int | None = None,
    ) -> Float[Tensor, "B n width"]:
        """Tokens after the last block and the norm, or after so many blocks; the last N are the patches."""
        num_patches = len(self.positions)
        assert patches.shape[:2] == visible.shape, "a decoder takes the visible patches and no others"
        known = self.embed(patches)
        x = scatter_patches(known, visible, self.mask_token.to(known.dtype).expand(num_patches, -1)) + self.positions
        if cls is not None:
            x = torch.cat([self.embed(cls).unsqueeze(1), x], dim=1)
        return self.norm(self.blocks(x)) if blocks is None else self.blocks[:blocks](x)
