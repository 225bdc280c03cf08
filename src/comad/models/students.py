"""Networks to be trained: any that timm knows by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.models.backbone import Backbone
from comad.models.feature_map_backbone import FeatureMapBackbone, create_whole
from comad.models.networks import has_token_norm
from comad.models.teachers import load_teacher, start_from
from comad.models.timm_backbone import NotPlainError, TimmBackbone, create_vit

SHAPE = ("patch_size", "width", "depth", "heads")
"""Options of a plain Vision Transformer; of other networks the first is the stride of the map."""


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A network to be trained: of timm by its name. What is None stays as ``name`` has it.

    Args:
        name: a timm model name.
        image_size: pixels on the side of the training views; scores use the same.
        pretrained: start from timm's pretrained weights.
        start: or from others of the same architecture, named as a teacher is: a file, an exported folder.
        patch_size: pixels on the side of a patch; of a network with a map its stride, where timm can change it.
        width: channels of a token, of a plain Vision Transformer.
        depth: its blocks.
        heads: attention heads of a block.
        drop_path: stochastic depth rate.
    """

    name: str = "vit_tiny_patch16_224"
    image_size: int = 224
    pretrained: bool = False
    start: str | None = None
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.pretrained and self.start:
            raise ValueError("a student has one start; leave out --student.pretrained or --student.start.")
        for name in ("image_size", *SHAPE):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"a network's {name.replace('_', ' ')} of {value} is too small; use 1 or more.")

    def called(self, name: str) -> VitConfig:
        """The same of another name; what it cannot have as no plain Vision Transformer is as the name has it."""
        return replace(self, name=name, **({} if is_plain(name) else dict.fromkeys(SHAPE)))

    @property
    def arguments(self) -> dict[str, Any]:
        """timm's constructor arguments that differ from the named architecture; ``img_size`` where it has one."""
        plain = is_plain(self.name)
        given = {
            "img_size": self.image_size if plain or takes_size(self.name) else None,
            "patch_size" if plain else "output_stride": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
        }
        return {key: value for key, value in given.items() if value is not None}

    @property
    def from_scratch(self) -> VitConfig:
        """The same with random weights; equal to it if it begins with them."""
        return replace(self, pretrained=False, start=None)

    @property
    def start_licences(self) -> tuple[str, ...]:
        """The licence of the weights it starts from, if any."""
        if self.start:
            return (load_teacher(self.start, self.image_size).card.licence,)
        if not self.pretrained:
            return ()
        known = timm.get_pretrained_cfg(self.name)
        return (known.license if known and known.license else "unknown",)

    def build(self, **extra: Any) -> Backbone:
        """Make the network, randomly initialised from torch's generator unless it is ``pretrained`` or has a ``start``.

        Raises:
            ValueError: see `create_vit`; its sizes do not fit each other, or its weights cannot be had; or its tokens
                have no norm, no method here trains one of its tokens, or its CNN would see what is hidden.
        """
        backbone = self.build_vit(**extra) if is_plain(self.name) else self._build_map()
        if self.start:
            start_from(self.start, backbone)
        return backbone

    def _build_map(self) -> FeatureMapBackbone:
        """Any other network than a plain Vision Transformer."""
        if names := [name for name in SHAPE[1:] if getattr(self, name) is not None]:
            options = ", ".join(f"--student.{name}" for name in names)
            raise ValueError(f"{self.name} is no plain Vision Transformer, and has no {options}; leave them out.")
        arguments = self.arguments | ({"drop_path_rate": self.drop_path} if self.drop_path else {})
        try:
            network = self._create(lambda: create_whole(self.name, self.pretrained, **arguments))
            return map_to_be_trained(network, self.image_size)
        except (AssertionError, NotImplementedError, RuntimeError, IndexError, TypeError) as error:
            told = str(error).partition("\n")[0][:160]
            raise ValueError(
                f"{self.name} cannot be built like that ({told}); set another --student.image-size, and leave out "
                "--student.patch-size and --student.drop-path."
            ) from error

    def build_vit(self, **extra: Any) -> TimmBackbone:
        """`build`, of a plain Vision Transformer; ``extra`` are further arguments of timm's."""
        arguments = {key: value for key, value in self.arguments.items() if key != "img_size"} | extra
        rate = self.drop_path
        try:
            vit = self._create(
                lambda: create_vit(self.name, self.image_size, self.pretrained, drop_path_rate=rate, **arguments)
            )
        except AssertionError as error:
            raise ValueError(f"{self.name}: its width is no multiple of its heads; change one of them.") from error
        patch = vit.patch_embed.patch_size[0]
        if self.image_size % patch:
            fit = max(1, round(self.image_size / patch)) * patch
            raise ValueError(
                f"{self.name}: {self.image_size} pixels are no multiple of its {patch}-pixel patch; use {fit}."
            )
        return to_be_trained(vit, self.name)

    def _create(self, create: Any) -> Any:
        try:
            return create()
        except Exception as error:  # every version of the hub client has its own error for a missing network
            if isinstance(error, ValueError | AssertionError) or not self.pretrained:
                raise
            raise ValueError(f"{self.name}: timm cannot get its weights; train it without pretrained ones.") from error


@functools.cache
def is_plain(name: str) -> bool:
    """Whether timm's network of that name is a plain Vision Transformer.

    Raises:
        ValueError: timm knows none of that name.
    """
    try:
        with torch.device("meta"):
            create_vit(name, None)
        return True
    except NotPlainError:
        return False
    except (NotImplementedError, RuntimeError):  # a constructor that computes with numbers
        return False


def takes_size(name: str) -> bool:
    """Whether timm's network of that name is built for one image size."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    return bool(known and known.fixed_input_size)


def to_be_trained(vit: VisionTransformer, name: str) -> TimmBackbone:
    """A plain Vision Transformer of timm as a student, with the pixel normalisation that timm knows of it.

    Raises:
        ValueError: no method here trains one of its tokens, its tokens have no norm, or its CNN would see what is
            hidden.
    """
    if not has_token_norm(vit) or hasattr(vit, "dist_token") or hasattr(vit.patch_embed, "backbone"):
        raise ValueError(
            f"{name} cannot be trained here: it has a CNN before its blocks, a distillation token, or a norm "
            "after pooling; name a plain one such as vit_tiny_patch16_224."
        )
    return TimmBackbone(vit, *_pixels_of(vit))


def map_to_be_trained(network: nn.Module, image_size: int) -> FeatureMapBackbone:
    """Any other network as a student, read at its end; parameters that its features do not depend on are frozen.

    Raises:
        ValueError: it gives no features; and what the network raises for images that it does not take.
    """
    backbone = FeatureMapBackbone(network.eval(), *_pixels_of(network), image_size)
    tokens = backbone(torch.zeros(1, 3, image_size, image_size))
    read = tokens.patches.sum() if tokens.cls is None else tokens.patches.sum() + tokens.cls.sum()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(read, trained, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)
    return backbone.train()


def _pixels_of(network: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels, as timm knows them of a network."""
    known = getattr(network, "pretrained_cfg", None) or {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return known["mean"], known["std"]
