"""Maps of features from several depths of any network, for dense tasks: it is trained, or stays frozen."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Backbone
from comad.models.networks import gives_tokens
from comad.models.teachers import TeacherCard, load_teacher
from comad.models.windows import use_windows

NUM_MAPS = 4


class FeatureMaps(nn.Module):
    """Four maps of one network, from shallow to deep, after its final norm where it has one for tokens.

    A Vision Transformer gives the patches of the last block of each quarter, all on one grid; a convolutional network
    its last four maps. Strides are powers of two: images for a Vision Transformer whose patches are not so large are
    resized to give the grid of the nearest power.

    Args:
        backbone: holds a timm network and the pixel normalisation.
        image_size: pixels on the side of the square images to come.
        frozen: the network stays as it is, in eval mode, without gradients.

    Attributes:
        widths, strides: channels and pixels per cell of each map.

    Raises:
        ValueError: the network gives no maps of inner blocks.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: Backbone, image_size: int, frozen: bool = False):
        super().__init__()
        self.network = cast(Any, next(backbone.children()))
        if not hasattr(self.network, "forward_intermediates"):
            raise ValueError(f"{type(self.network).__name__} gives no maps of inner blocks; name a network of timm.")
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, cast(Tensor, getattr(backbone, name)), persistent=False)
        info = self.network.feature_info
        depth = len(info)
        self.has_tokens = gives_tokens(self.network)
        quarters = [max(0, (part + 1) * depth // NUM_MAPS - 1) for part in range(NUM_MAPS)]
        last = [max(0, depth - NUM_MAPS + part) for part in range(NUM_MAPS)]
        self.taps = quarters if self.has_tokens else last
        self.widths = [info[tap]["num_chs"] for tap in self.taps]
        self.image_size = backbone.image_size if self.has_tokens else image_size
        stride = image_size // backbone.grid[0]
        self.strides = [stride if self.has_tokens else info[tap]["reduction"] for tap in self.taps]
        self.network.prune_intermediate_layers(sorted(set(self.taps)), prune_norm=False, prune_head=True)
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> FeatureMaps:
        """A frozen network stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Images of ``image_size`` pixels with values in [0, 1] → four maps."""
        if self.image_size != images.shape[-1]:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        pixels = (images - self.pixel_mean) / self.pixel_std
        indices = sorted(set(self.taps))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.network.forward_intermediates(
                pixels, indices=indices, norm=self.has_tokens, intermediates_only=True
            )
        return [maps[indices.index(tap)] for tap in self.taps]

    def group_matcher(self, prefix: str) -> dict[str, Any]:
        """timm's patterns of the network's layers, for layer decay, with the names as a module around this has them."""
        return {key: _rooted(pattern, f"{prefix}network.") for key, pattern in self.network.group_matcher().items()}


def _rooted(pattern: Any, prefix: str) -> Any:
    """A pattern, or a list of (pattern, group), for names that begin with ``prefix``."""
    if isinstance(pattern, str):
        return rf"^{prefix.replace('.', chr(92) + '.')}(?:{pattern.replace('^', '')})"
    return [(_rooted(part, prefix), group) for part, group in pattern]


def load_maps(
    spec: str, image_size: int, *, drop_path: float = 0.0, window: int = 0, frozen: bool = False
) -> tuple[FeatureMaps, TeacherCard]:
    """Load a network for dense tasks on square images, ready to be trained, and the card of where it comes from.

    Args:
        spec: what `load_teacher` takes.
        image_size: pixels on the side of the images; positions are resampled to it.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
        window: patches on the side of the windows that most blocks attend within; 0: all see the whole image.
        frozen: see `FeatureMaps`.

    Raises:
        ValueError: the network cannot be loaded, does not fit the image size, or cannot have windows or drop path.
    """
    teacher = load_teacher(spec, "grid", rows=max(1, image_size // 16))
    backbone = teacher.backbone
    if gives_tokens(cast(nn.Module, next(backbone.children()))):
        patch = 2 ** round(math.log2(backbone.patch_size))
        if image_size % patch:
            fit = max(1, round(image_size / patch)) * patch
            raise ValueError(f"{spec}: {image_size} pixels are no multiple of {patch}, the side of a patch; use {fit}.")
        size = image_size // patch * backbone.patch_size
        if size != backbone.image_size:
            teacher = load_teacher(spec, size)
    else:
        teacher = load_teacher(spec, image_size)
    maps = FeatureMaps(teacher.backbone, image_size, frozen)
    if window:
        use_windows(maps.network, window)
    if drop_path and not frozen:
        _use_drop_path(maps.network, drop_path)
    return maps, teacher.card


def _use_drop_path(network: nn.Module, rate: float) -> None:
    """Put stochastic depth into a network that was built without it."""
    blocks = [part for part in network.modules() if hasattr(part, "drop_path1") and hasattr(part, "drop_path2")]
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no blocks for stochastic depth; set --drop-path 0.")
    for number, block in enumerate(cast(list[Any], blocks)):
        share = rate * number / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
