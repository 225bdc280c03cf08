"""Any network that turns a whole image into a map of features as a `Backbone`: convolutional teachers, for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Backbone, Hidden, Tokens, gather_patches, seen


class WholeBackbone(Backbone):
    """A timm network whose ``forward_features`` is a map of channels. It cannot leave patches out, so it sees all.

    Its map is resampled to the wanted grid; the mean over the map stands for a class token.

    Args:
        network: frozen; its classifier is ignored.
        mean, std: pixel normalisation, in units of [0, 1] pixels.
        image_size: pixels on the side of the images to come, if ``rows`` is None.
        rows: rows and columns of the grid of tokens. The images to come are then as large as gives a map of this size,
            but not larger than those the network was made for. None keeps the map's own.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    sees_whole = True

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], image_size: int, rows: int | None = None
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
            self.width, own_rows, _ = self._map(torch.zeros(1, 3, image_size, image_size))[0].shape
        rows = rows or own_rows
        self.grid = (rows, rows)
        self.patch_size = image_size // rows
        self.token_types = ("cls", "patch")

    def _map(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E rows columns"]:
        pixels = (images - self.pixel_mean) / self.pixel_std
        pixels = pixels.to(next(self.network.parameters()).dtype, memory_format=torch.channels_last)
        features = cast(Any, self.network).forward_features(pixels)
        return features.permute(0, 3, 1, 2) if self.gives_channels_last else features

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"] | None = None,
        hidden: Hidden = "drop",
        mask_token: Float[Tensor, " E"] | None = None,
    ) -> Tokens:
        """Encode the whole image; of the patches of the map give the visible ones (the others as 0 if not dropped)."""
        features = self._map(images)
        cls = features.mean(dim=(2, 3))
        if features.shape[2:] != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", antialias=True)
        patches = features.flatten(2).transpose(1, 2)
        if visible is not None and hidden == "drop":
            patches = gather_patches(patches, visible)
        elif visible is not None:
            patches = patches * seen(visible, len(patches), patches.shape[1], patches.device).unsqueeze(-1)
        return Tokens(cls, patches)


def _stride_and_size(network: Any) -> tuple[int, int]:
    """Pixels per row of the network's map, and pixels on the side of the images it was made for."""
    return network.feature_info[-1]["reduction"], network.default_cfg["input_size"][-1]


def create_whole(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Build a timm network whose ``forward_features`` is a map, without a classifier.

    Raises:
        ValueError: the network gives no map.
    """
    network = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments).eval()
    side = cast(Any, network).default_cfg["input_size"][-1]
    with torch.no_grad():
        features = cast(Any, network).forward_features(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise ValueError(f"{name!r} gives no map of features; name a Vision Transformer or a convolutional network.")
    return network
