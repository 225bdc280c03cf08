"""Networks to be trained: by timm's or torchvision's name, from a Python file, or at hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.models.backbone import Backbone
from comad.models.feature_map_backbone import FeatureMapBackbone, ModuleFeatures, create_whole
from comad.models.huggingface import TransformersFeatures, pixels_of
from comad.models.networks import has_token_norm
from comad.models.objects import IMAGENET, Pixels, from_python_file, own_facts, timm_facts, vision_part
from comad.models.teachers import load_teacher, start_from
from comad.models.timm_backbone import TimmBackbone, create_vit, refuse_unknown, takes_size
from comad.models.torchvision_features import PREFIX, TorchvisionFeatures, is_torchvision, torchvision_network

SHAPE = ("patch_size", "width", "depth", "heads")
"""Options of a plain Vision Transformer; of other networks the first is the stride of the map."""


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A network to be trained. What is None stays as ``name`` has it.

    Args:
        name: of a timm model; torchvision:NAME; or NAME=NET.py:FUNCTION, whose function returns a network.
        image_size: pixels on the side of the training views; scores use the same.
        pretrained: start from timm's, or torchvision's, pretrained weights.
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

    @property
    def label(self) -> str:
        """The name as that of a folder, without the path of a file."""
        return self.name.partition("=")[0].replace(":", "-")

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

    def build(self) -> Backbone:
        """Make the network, randomly initialised from torch's generator unless it is ``pretrained`` or has a ``start``.

        Raises:
            ValueError: nobody knows the name, sizes do not fit each other, weights cannot be had, or the network
                cannot be trained here.
        """
        backbone = self.build_vit() if is_plain(self.name) else self._build_other()
        if self.start:
            start_from(self.start, backbone)
        return backbone

    def _build_other(self) -> Backbone:
        """Any other network than a plain Vision Transformer."""
        if names := [name for name in SHAPE[1:] if getattr(self, name) is not None]:
            options = ", ".join(f"--student.{name}" for name in names)
            raise ValueError(f"{self.name} is no plain Vision Transformer, and has no {options}; leave them out.")
        if made := from_python_file(self.name):
            return to_be_trained(made[1], self.name, self.image_size)
        if self.name.startswith(PREFIX):
            return to_be_trained(torchvision_network(self.name, self.pretrained), self.name, self.image_size)
        if not timm.is_model(self.name):
            refuse_unknown(self.name)
        arguments = self.arguments | ({"drop_path_rate": self.drop_path} if self.drop_path else {})
        remedy = "set another --student.image-size, and leave out --student.patch-size and --student.drop-path."
        with told_of_network(f"{self.name} cannot be built like that", remedy):
            network = self._create(lambda: create_whole(self.name, self.pretrained, **arguments))
        return to_be_trained(network, self.name, self.image_size)

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
        return vit_to_be_trained(vit, self.name)

    def _create(self, create: Any) -> Any:
        try:
            return create()
        except Exception as error:  # every version of the hub client has its own error for a missing network
            if isinstance(error, ValueError | AssertionError) or not self.pretrained:
                raise
            raise ValueError(f"{self.name}: timm cannot get its weights; train it without pretrained ones.") from error


@functools.cache
def is_plain(name: str) -> bool:
    """Whether it is timm's name of a plain Vision Transformer."""
    try:
        with torch.device("meta"):
            create_vit(name, None)
        return True
    except ValueError:  # the answer of `create_vit`
        return False
    except RuntimeError:  # on meta tensors; plain ones compute with no number of a tensor
        return False


def to_be_trained(module: nn.Module, name: str, image_size: int) -> Backbone:
    """A network as a student: a plain Vision Transformer of timm can leave out patches, others see whole images.

    Args:
        module: a model of timm, of torchvision or of transformers, your own, see `comad.models.objects.own_facts`, or a
            `Backbone`; it is trained in place.
        name: what messages call it.
        image_size: pixels on the side of the square images to come.

    Raises:
        ValueError: it gives no features, not of such images, or cannot be trained here.
    """
    if isinstance(module, Backbone):
        return module
    if type(module) is VisionTransformer:
        return vit_to_be_trained(module, name)
    features = _as_features(module, image_size)
    remedy = "set another --student.image-size, or name another network."
    with told_of_network(f"{name} cannot compute on {image_size} pixels", remedy):
        return map_to_be_trained(*features, image_size)


def _as_features(module: Any, image_size: int) -> tuple[nn.Module, Pixels]:
    """A network under the names that `FeatureMapBackbone` reads, and its pixel normalisation."""
    if hasattr(module, "config") and hasattr(module.config, "model_type"):
        return TransformersFeatures(vision_part(module)), pixels_of(module) or IMAGENET
    if is_torchvision(module):
        return TorchvisionFeatures(module), IMAGENET
    if hasattr(module, "forward_features") and (facts := timm_facts(module)):
        return module, (facts["mean"], facts["std"])
    pixels, prefix, has_cls = own_facts(module)
    return ModuleFeatures(module, prefix, has_cls, image_size), pixels


def vit_to_be_trained(vit: VisionTransformer, name: str) -> TimmBackbone:
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
    facts = timm_facts(vit)
    return TimmBackbone(vit, *((facts["mean"], facts["std"]) if facts else IMAGENET))


def map_to_be_trained(network: nn.Module, pixels: Pixels, image_size: int) -> FeatureMapBackbone:
    """A network that is read at its end; parameters that its features do not depend on are frozen."""
    backbone = FeatureMapBackbone(network.eval(), *pixels, image_size)
    tokens = backbone(torch.zeros(1, 3, image_size, image_size))
    read = tokens.patches.sum() if tokens.cls is None else tokens.patches.sum() + tokens.cls.sum()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(read, trained, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)
    return backbone.train()


@contextmanager
def told_of_network(fault: str, remedy: str) -> Iterator[None]:
    """Code of others, which says in its own ways that it cannot do what was asked: one line, with a remedy.

    Raises:
        ValueError: it could not.
    """
    try:
        yield
    except (AssertionError, RuntimeError, IndexError, TypeError) as error:
        said = str(error).partition("\n")[0][:160]
        raise ValueError(f"{fault} ({said}); {remedy}") from error
