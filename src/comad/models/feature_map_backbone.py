"""Any network that computes on whole images as a `Backbone`: CNNs, hybrids, DINOv3, BEiT, your own module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Backbone, Hidden, Pool, Tokens, check_blocks, take_visible, visible_map
from comad.models.networks import OWN_SIZE, each_normalised, gives_tokens, norm_after_pooling, set_input_size


class FeatureMapBackbone(Backbone):
    """A network whose ``forward_features`` is a map of channels, or a sequence of prefix tokens and patches.

    If it is neither, the last of timm's ``forward_intermediates`` after the final norm. It cannot leave patches out: it
    sees all, or the pixels of hidden ones as the mean colour. Its patches are resampled to the wanted grid; the mean
    over a map stands for a class token. A sequence has one only if the network has a ``cls_token``; it is the first of
    its ``num_prefix_tokens``, and the others are dropped. Where timm's network has a norm between its pooling and its
    classifier, what stands for a class token is what its classifier sees, and every patch goes through that norm.

    Args:
        network: in eval mode; its classifier is ignored.
        mean, std: pixel normalisation, in units of [0, 1] pixels.
        image_size: pixels on the side of the images to come.
        rows: rows and columns of the grid of tokens; None keeps the network's own.
        token_types: the tokens that carry meaning.

    Raises:
        ValueError: the network gives neither, its patches form no square, or it takes no images of this size.
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
        self.memory_format = torch.channels_last if _may_be_channels_last(network) else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.norm_after_pooling = norm_after_pooling(network)
        self.pools = self.norm_after_pooling != ""
        self.gives_channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        own_size = getattr(getattr(network, "patch_embed", None), "img_size", None)
        if hasattr(network, "set_input_size") and own_size != (image_size, image_size):  # windows and positions follow
            set_input_size(network, image_size)
        self._image_size = image_size
        self.by_intermediates, self.has_norm = False, True
        with torch.no_grad():
            blank = torch.zeros(1, 3, image_size, image_size)
            features = cast(Any, network).forward_features(self._normalised(blank))
            self.by_intermediates = not self._is_known(features) and hasattr(network, "forward_intermediates")
            try:
                cls, patches = self._features(blank)
            except AssertionError:  # of timm's Hiera, whose only norm follows the pooling
                self.has_norm = not self.by_intermediates
                cls, patches = self._features(blank)
        self.width, *own_grid = patches.shape[1:]
        self.own_grid = self.grid = (own_grid[0], own_grid[1])
        if rows:
            self.resample_to(rows)
        stride = image_size // self.grid[0]
        self.patch_size = max(1, stride_and_size(network)[0] if gives_tokens(network) else stride)
        self.has_cls = cls is not None
        self.token_types = token_types if self.has_cls else ("patch",)

    @property
    def features_call(self) -> str:
        """How timm's users get what its patches are made of, with ``{}`` for normalised pixels."""
        if self.by_intermediates:
            return f"forward_intermediates({{}}, indices=1, norm={self.has_norm}, intermediates_only=True)[0]"
        return "forward_features({})"

    @property
    def image_size(self) -> int:
        """Pixels on the side of the square images to come; no multiple of the grid where a map is resampled."""
        return self._image_size

    def _normalised(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        pixels = (images - self.pixel_mean) / self.pixel_std
        return pixels.to(next(self.network.parameters(), pixels).dtype, memory_format=self.memory_format)

    def _without(
        self, images: Float[Tensor, "B 3 H W"], visible: Int[Tensor, "B V"] | Bool[Tensor, "B N"], hidden: Hidden
    ) -> Float[Tensor, "B 3 H W"]:
        """Images in which the pixels of hidden patches have the mean colour, which is 0 once it is normalised."""
        if hidden == "token":
            raise ValueError(f"{type(self.network).__name__} has no place for mask tokens; hide patches by zero.")
        cells = visible_map(visible, len(images), self.num_patches, images.device).unflatten(1, self.grid)
        shown = F.interpolate(cells.unsqueeze(1).to(images.dtype), images.shape[2:])
        return torch.lerp(self.pixel_mean.to(images.dtype), images, shown)

    def _is_known(self, features: Any) -> bool:
        has_prefix = getattr(self.network, "num_prefix_tokens", None) is not None
        return isinstance(features, Tensor) and (features.ndim == 4 or (features.ndim == 3 and has_prefix))

    def _features(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor | None, Float[Tensor, "B E rows columns"]]:
        """A class token, or what stands for it, and a map of patches, from whole images."""
        pixels, network = self._normalised(images), cast(Any, self.network)
        if self.by_intermediates:
            (features,) = network.forward_intermediates(pixels, indices=1, norm=self.has_norm, intermediates_only=True)
            return self._pooled_and_normalised(features)
        features = network.forward_features(pixels)
        if not self._is_known(features):
            name = type(getattr(self.network, "module", self.network)).__name__
            raise ValueError(f"{name!r} gives no map of features, nor tokens; its output is to be (B, E, h, w).")
        if features.ndim == 3:
            return self._split(features)
        patches = features.permute(0, 3, 1, 2) if self.gives_channels_last else features
        return self._pooled_and_normalised(patches)

    def _pooled_and_normalised(
        self, patches: Float[Tensor, "B E rows columns"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E rows columns"]]:
        """What stands for a class token, and the map, of a network without one."""
        mean = patches.mean(dim=(2, 3))
        if not self.norm_after_pooling:
            return mean, patches
        norm = self.network.get_submodule(self.norm_after_pooling)
        cells = each_normalised(norm, patches.permute(0, 2, 3, 1))
        return each_normalised(norm, mean), cells.permute(0, 3, 1, 2)

    def pooled(self, images: Float[Tensor, "B 3 H W"], pool: Pool) -> Float[Tensor, "B F"]:
        """What a head sees; of timm's networks without tokens what their own does, which may have layers before it."""
        network = cast(Any, self.network)
        if not gives_tokens(network) and hasattr(network, "forward_head"):
            vectors = network.forward_head(network.forward_features(self._normalised(images)), pre_logits=True)
            if isinstance(vectors, Tensor) and vectors.ndim == 2:
                return vectors.float()
        return super().pooled(images, pool)

    def _split(self, tokens: Float[Tensor, "B n E"]) -> tuple[Tensor | None, Float[Tensor, "B E rows columns"]]:
        """Class token and map of a sequence."""
        prefix = cast(Any, self.network).num_prefix_tokens
        patches = tokens[:, prefix:].transpose(1, 2)
        side = math.isqrt(patches.shape[2])
        if not side or side**2 != patches.shape[2]:
            what = f"{tokens.shape[1]} tokens less {prefix} of num_prefix_tokens"
            raise ValueError(f"{what} form no square of patches; give the right number of prefix tokens.")
        if self.norm_after_pooling:
            norm, network = self.network.get_submodule(self.norm_after_pooling), cast(Any, self.network)
            timms = hasattr(network, "forward_head")
            mean = network.forward_head(tokens, pre_logits=True) if timms else norm(tokens[:, prefix:].mean(dim=1))
            patches = each_normalised(norm, patches.transpose(1, 2)).transpose(1, 2)
            return mean, patches.unflatten(2, (side, side))
        has_cls = getattr(self.network, "cls_token", None) is not None
        return tokens[:, 0] if has_cls else None, patches.unflatten(2, (side, side))

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
        """Encode the whole image and give the visible patches; or, if the others are to be 0, all of an image without.

        Hidden pixels are those of the cells of the map, as far as its stride divides the image.
        """
        name = type(self.network).__name__
        if visible is not None and hidden != "drop":
            images, visible = self._without(images, visible, hidden), None
        if qkv:
            raise ValueError(f"{name} has no attention that can be read; name a plain Vision Transformer as teacher.")
        if not intermediates:
            cls, features = self._features(images)
            return take_visible(self._on_grid(Tokens(cls, _as_rows(features))), visible, hidden)
        if not gives_tokens(self.network) or not hasattr(self.network, "forward_intermediates"):
            raise ValueError(f"{name} has no blocks that can be read; name a plain Vision Transformer as teacher.")
        network = cast(Any, self.network)
        check_blocks(intermediates, 0, len(network.blocks), name)
        last, maps = network.forward_intermediates(
            self._normalised(images),
            indices=[number - 1 for number in intermediates],
            return_prefix_tokens=True,
            stop_early=stop_early,
        )
        pairs = [
            part if isinstance(part, tuple) else (part, None) for part in maps
        ]  # without prefix tokens: maps alone
        kept = tuple(self._kept(_as_rows(part), prefix) for part, prefix in pairs)
        if stop_early:
            tokens = kept[-1]
        else:
            cls, features = self._split(last)
            tokens = Tokens(cls, _as_rows(features))
        return take_visible(self._on_grid(tokens._replace(intermediates=kept)), visible, hidden)

    def _kept(self, patches: Float[Tensor, "B n E"], prefix: Tensor | None) -> Tokens:
        """Tokens after a block, what stands for a class token as at the end."""
        if self.pools:
            return Tokens(patches.mean(dim=1), patches)
        return Tokens(None if prefix is None else prefix[:, 0], patches)


def _as_rows(features: Float[Tensor, "B E rows columns"]) -> Float[Tensor, "B n E"]:
    return features.flatten(2).transpose(1, 2)


def _may_be_channels_last(network: nn.Module) -> bool:
    """Whether a network can compute with the channels of a place side by side, which is twice as fast on the CPU.

    Not with weights of five axes. And of fewer than 8 channels the gradient of a strided convolution of single places,
    as in FastViT's stem, writes beyond its memory in torch 2.15.
    """
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    breaks = any(c.kernel_size == (1, 1) and max(c.stride) > 1 and c.in_channels < 8 for c in convolutions)
    return not breaks and all(parameter.ndim < 5 for parameter in network.parameters())


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


def stride_and_size(network: Any) -> tuple[int, int]:
    """Pixels per row of the network's grid, and pixels on the side of the images it was made for."""
    made_for = (getattr(network, "default_cfg", None) or {}).get("input_size", (3, OWN_SIZE, OWN_SIZE))[-1]
    if gives_tokens(network):
        return network.patch_embed.patch_size[0], made_for
    info = getattr(network, "feature_info", None)
    return (info[-1]["reduction"] if info else 32), made_for


def create_whole(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """Build a timm network that is no plain Vision Transformer, without a classifier."""
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments).eval()
