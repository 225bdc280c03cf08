"""The convolution of a patch embedding as one matrix product: its kernel is its stride, so no pixel is used twice."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
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
        """Cut images into patches and map each; pixels that fill no patch are left out, as a convolution does."""
        rows, columns = self.weight.shape[2:]
        h, w = input.shape[2] // rows, input.shape[3] // columns
        cut = input[:, :, : h * rows, : w * columns].unflatten(3, (w, columns)).unflatten(2, (h, rows))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, C · rows · columns)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def project_patches(vit: VisionTransformer) -> None:
    """Put `PatchProjection` in the place of the network's convolution, if it is such a one."""
    conv = vit.patch_embed.proj
    plain = type(conv) is nn.Conv2d and conv.kernel_size == conv.stride and conv.padding == (0, 0)
    if plain and conv.groups == 1:
        vit.patch_embed.proj = PatchProjection(conv)
