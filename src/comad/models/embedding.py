"""The convolution of a patch embedding as one matrix product: its kernel is its stride, so no pixel is used twice."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjection(nn.Conv2d):
    """Patches to tokens: the convolution it is made of, with the same parameters, and the same sums.

    On a CPU it is faster in bf16, most of all its gradient (docs/performance.md).

    Args:
        convolution: without padding; its stride is its kernel.
    """

    def __init__(self, convolution: nn.Conv2d):
        kernel = cast(tuple[int, int], convolution.kernel_size)
        super().__init__(convolution.in_channels, convolution.out_channels, kernel, kernel, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        """Map every patch; pixels that fill no patch are left out, as by a convolution."""
        return self.project(self.cut(input)).permute(0, 3, 1, 2)

    def cut(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w C rows columns"]:
        """The patches of images, where they lie."""
        rows, columns = self.weight.shape[2:]
        h, w = images.shape[2] // rows, images.shape[3] // columns
        whole = images[:, :, : h * rows, : w * columns].unflatten(3, (w, columns)).unflatten(2, (h, rows))
        return whole.permute(0, 2, 4, 1, 3, 5)

    def pick(
        self, images: Float[Tensor, "B C H W"], visible: Int[Tensor, "B V"]
    ) -> Float[Tensor, "B V C rows columns"]:
        """The pixels of the named patches, numbered row by row."""
        patches = self.cut(images)
        image = torch.arange(len(images), device=images.device).unsqueeze(1)
        return patches[image, visible // patches.shape[2], visible % patches.shape[2]]

    def project(self, patches: Float[Tensor, "*n C rows columns"]) -> Float[Tensor, "*n E"]:
        """Map pixels of patches to tokens."""
        return F.linear(patches.flatten(-3), self.weight.flatten(1), self.bias)


def project_patches(vit: VisionTransformer) -> None:
    """Put `PatchProjection` in the place of the network's convolution, if it is such a one and sees the pixels."""
    embed = vit.patch_embed
    if type(embed) is PatchEmbed and not embed.dynamic_img_pad:
        conv = embed.proj
        plain = type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and conv.padding == (0, 0)
        if plain and conv.groups == 1:
            embed.proj = PatchProjection(conv)
