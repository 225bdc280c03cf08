"""Attention within windows, for large images: a block of a plain Vision Transformer sees one window at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class WindowBlock(nn.Module):
    """A block on each window of patches on its own, as in ViTDet (arXiv:2203.16527, section 3).

    The grid is filled up with zeros to whole windows. Prefix tokens, which ViTDet does without, take part in every
    window, and the mean over windows goes on.

    Args:
        block: tokens (B, P + N, E) → the same shape.
        grid: rows and columns of the patches.
        window: patches on the side of a window.
        num_prefix_tokens: P, tokens before the patches.
    """

    def __init__(self, block: nn.Module, grid: tuple[int, int], window: int, num_prefix_tokens: int):
        super().__init__()
        self.block = block
        self.grid = grid
        self.window = window
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, tokens: Float[Tensor, "B n E"]) -> Float[Tensor, "B n E"]:
        """Cut into windows, run the block, put together."""
        (rows, columns), side, batch = self.grid, self.window, len(tokens)
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        down, across = -(-rows // side), -(-columns // side)
        patches = patches.unflatten(1, (rows, columns))
        patches = F.pad(patches, (0, 0, 0, across * side - columns, 0, down * side - rows))
        windows = patches.unflatten(1, (down, side)).unflatten(3, (across, side))  # (B, down, side, across, side, E)
        windows = windows.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B * windows, side * side, E)
        result = self.block(torch.cat([prefix.repeat_interleave(down * across, dim=0), windows], dim=1))
        prefix = result[:, : self.num_prefix_tokens].unflatten(0, (batch, down * across)).mean(dim=1)
        windows = result[:, self.num_prefix_tokens :].unflatten(0, (batch, down, across)).unflatten(3, (side, side))
        patches = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
        return torch.cat([prefix, patches.flatten(1, 2)], dim=1)


def use_windows(network: nn.Module, window: int, num_global: int = 4) -> None:
    """Let all blocks but the last of each of ``num_global`` equal parts of the network attend within windows.

    Raises:
        ValueError: the network is no plain Vision Transformer.
    """
    if not isinstance(network, VisionTransformer):
        raise ValueError("window attention needs a plain Vision Transformer; leave out --window.")
    depth, grid = len(network.blocks), network.patch_embed.grid_size
    whole = {(part + 1) * depth // num_global - 1 for part in range(num_global)}
    blocks = cast(Any, network.blocks)
    for number in set(range(depth)) - whole:
        blocks[number] = WindowBlock(blocks[number], grid, window, network.num_prefix_tokens)
