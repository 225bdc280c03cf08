"""Any network that computes on whole images as a `Backbone`: convolutional teachers, DINOv3, BEiT, your own module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Backbone, Hidden, Tokens, gather_patches, visible_map
from comad.models.networks import gives_tokens


class FeatureMapBackbone(Backbone):
    """A network whose ``forward_features`` is a map of channels, or a sequence of prefix tokens and patches.

    It cannot leave patches out, so it sees all. Its patches are resampled to the wanted grid; the mean over a map
    stands for a class token. A sequence has one only if the network has a ``cls_token``; it is the first of its
    ``num_prefix_tokens``, and the others are dropped.

    Args:
        network: frozen; its classifier is ignored.
        mean, std: pixel normalisation, in units of [0, 1] pixels.
        image_size: pixels on the side of the images to come, if ``rows`` is None.
        rows: rows and columns of the grid of tokens. The images to come are then as large as gives this grid, but not
            larger than those a network with a map was made for. None keeps the network's own grid.
        token_types: the tokens that carry meaning.

    Raises:
        ValueError: the network gives neither, or its patches form no square.
    """

    supports_masking = False

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        rows: int | None = None,
        token_types: tuple[str, ...] = ("cls", "patch"),
    ):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on the CPU
        self.gives_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if rows:
            stride, made_for = _stride_and_size(network)
            image_size = rows * max(1, min(stride, made_for // rows))
        if hasattr(network, "set_input_size"):  # windows and positions follow the image
            cast(Any, network).set_input_size(img_size=(image_size, image_size))
        with torch.no_grad():
            cls, patches = self._features(torch.zeros(1, 3, image_size, image_size))
        self.width, own_rows, _ = patches.shape[1:]
        rows = rows or own_rows
        self.grid = (rows, rows)
        self.patch_size = _stride_and_size(network)[0] if gives_tokens(network) else image_size // rows
        self.token_types = token_types if cls is not None else ("patch",)

    def _features(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor | None, Float[Tensor, "B E rows columns"]]:
        pixels = (images - self.pixel_mean) / self.pixel_std
        pixels = pixels.to(next(self.network.parameters(), pixels).dtype, memory_format=torch.channels_last)
        features = cast(Any, self.network).forward_features(pixels)
        prefix = getattr(self.network, "num_prefix_tokens", None)
        if isinstance(features, Tensor) and features.ndim == 3 and prefix is not None:
            patches = features[:, prefix:].transpose(1, 2)
            side = math.isqrt(patches.shape[2])
            if not side or side**2 != patches.shape[2]:
                what = f"{features.shape[1]} tokens less {prefix} of num_prefix_tokens"
                raise ValueError(f"{what} form no square of patches; give the right number of prefix tokens.")
            has_cls = getattr(self.network, "cls_token", None) is not None
            return features[:, 0] if has_cls else None, patches.unflatten(2, (side, side))
        if not isinstance(features, Tensor) or features.ndim != 4:
            name = type(getattr(self.network, "module", self.network)).__name__
            raise ValueError(f"{name!r} gives no map of features, nor tokens; its output is to be (B, E, h, w).")
        patches = features.permute(0, 3, 1, 2) if self.gives_channels_last else features
        return patches.mean(dim=(2, 3)), patches

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None = None,
        hidden: Hidden = "drop",
        mask_token: Float[Tensor, " E"] | None = None,
        *,
        intermediates: Sequence[int] = (),
        qkv: int = 0,
        stop_early: bool = False,
    ) -> Tokens:
        """Encode the whole image; of the patches of the map give the visible ones (the others as 0 if not dropped)."""
        if intermediates or qkv:
            name = type(self.network).__name__
            raise ValueError(f"{name} has no blocks that can be read; name a plain Vision Transformer as teacher.")
        cls, features = self._features(images)
        if features.shape[2:] != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", antialias=True)
        patches = features.flatten(2).transpose(1, 2)
        if visible is not None and hidden == "drop":
            patches = gather_patches(patches, visible)
        elif visible is not None:
            patches = patches * visible_map(visible, len(patches), patches.shape[1], patches.device).unsqueeze(-1)
        return Tokens(cls, patches)


class ModuleFeatures(nn.Module):
    """A module's ``forward`` under the names that `FeatureMapBackbone` reads.

    Args:
        module: (B, 3, H, W) → a map (B, E, h, w), or tokens (B, prefix + N, E).
        num_prefix_tokens: tokens before the patches.
        has_cls: the first of them is a class token.
        image_size: pixels on the side of the images that the module is made for.
    """

    def __init__(self, module: nn.Module, num_prefix_tokens: int, has_cls: bool, image_size: int):
        super().__init__()
        self.module = module
        self.num_prefix_tokens = num_prefix_tokens
        self.cls_token = True if has_cls else None
        self.default_cfg = {"input_size": (3, image_size, image_size)}
        self.feature_info = [{"reduction": image_size}]  # any stride: the images are always of that size

    def forward_features(self, pixels: Float[Tensor, "B 3 H W"]) -> Any:
        """What the module gives; `FeatureMapBackbone` says what it may be."""
        return self.module(pixels)


def _stride_and_size(network: Any) -> tuple[int, int]:
    """Pixels per row of the network's grid, and pixels on the side of the largest images it takes."""
    if gives_tokens(network):
        return network.patch_embed.patch_size[0], 2**30
    return network.feature_info[-1]["reduction"], network.default_cfg["input_size"][-1]


def create_whole(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Build a timm network whose ``forward_features`` is a map or a sequence of tokens, without a classifier.

    Raises:
        ValueError: the network gives neither.
    """
    network = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments).eval()
    if gives_tokens(network):
        return network
    side = cast(Any, network).default_cfg["input_size"][-1]
    with torch.no_grad():
        features = cast(Any, network).forward_features(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise ValueError(f"{name!r} gives no map of features; name a Vision Transformer or a convolutional network.")
    return network
