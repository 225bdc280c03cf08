"""torchvision's classification networks, read before their pooling and classifier."""

from __future__ import annotations

from typing import cast

import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from comad.runtime.spelling import hint

PREFIX = "torchvision:"
HEADS = ("avgpool", "flatten", "dropout", "classifier", "fc", "head")
"""Names of the children behind the last map."""


class TorchvisionFeatures(nn.Module):
    """A network of torchvision under the names that `FeatureMapBackbone` reads: its children in their order.

    Args:
        module: its classifier is taken off; networks whose children are no row of layers (Vision Transformers, MaxViT)
            fail when they are called.

    Attributes:
        layers: names of the children that make the map.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        names = [name for name, _ in module.named_children() if not name.lower().startswith("aux")]
        setattr(module, names[-1], nn.Identity())
        self.module = module
        self.layers = [name for name in names[:-1] if name not in HEADS]

    def forward_features(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E h w"]:
        """The last map."""
        for name in self.layers:
            pixels = cast(nn.Module, getattr(self.module, name))(pixels)
        return pixels


def is_torchvision(module: nn.Module) -> bool:
    """Whether a network is one of torchvision's classifiers."""
    return type(module).__module__.startswith("torchvision.models.")


def torchvision_network(name: str, pretrained: bool = False) -> nn.Module:
    """A classifier of torchvision by its name, with or without the prefix ``torchvision:``.

    Raises:
        ValueError: torchvision has none of that name, or its weights cannot be had.
    """
    short, known = name.removeprefix(PREFIX), torchvision.models.list_models(module=torchvision.models)
    if short not in known:
        raise ValueError(f"torchvision has no classifier {short!r}; {hint(short, known)}")
    try:
        return torchvision.models.get_model(short, weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise ValueError(f"{name}: torchvision cannot get its weights; train it without pretrained ones.") from error
