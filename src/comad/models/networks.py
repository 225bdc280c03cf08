"""timm's Vision Transformers, built from the shapes of their weights and loaded strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.models.formats import Kind, Weights

KINDS: dict[Kind, type[nn.Module]] = {"vit": VisionTransformer, "eva": Eva, "beit": Beit}
TABLE = "rel_pos_bias.relative_position_bias_table"


def build_network(
    kind: Kind, weights: Weights, image_size: int, source: str, arguments: Mapping[str, Any]
) -> nn.Module:
    """Build the network that weights under timm's names are of, without a head, and load it strictly.

    Depth, width, patch size, registers and the kind of MLP follow from the weights; all else is in ``arguments`` of
    timm's constructor. A plain Vision Transformer is built for square images of ``image_size`` pixels; the others are
    brought to their size afterwards, by timm's ``set_input_size``.

    Raises:
        ValueError: the weights are no Vision Transformer's, or do not fit.
    """
    width_of(kind, weights, source)
    network = KINDS[kind](num_classes=0, **{"img_size": image_size, **arguments, **_shapes(kind, weights)})
    load_weights(network, weights, source)
    return network


def width_of(kind: Kind, weights: Weights, source: str) -> int:
    """Channels of a token.

    Raises:
        ValueError: the tensors that say the shapes of a network are missing, or have other axes.
    """
    needed = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc2.weight": 2} | ({"pos_embed": 3} if kind == "vit" else {})
    if any(key not in weights or weights[key].ndim != axes or not weights[key].numel() for key, axes in needed.items()):
        what = ", ".join(f"{key} of {axes} axes" for key, axes in needed.items())
        raise ValueError(f"{source}: no Vision Transformer, which has {what}; use an unmodified checkpoint.")
    return len(weights["patch_embed.proj.weight"])


def _shapes(kind: Kind, weights: Weights) -> dict[str, Any]:
    """The arguments of timm's constructor that weights tell."""
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    inner = weights["blocks.0.mlp.fc2.weight"].shape[1]
    depth = len({key.split(".")[1] for key in weights if re.match(r"blocks\.\d+\.", key)})
    shapes: dict[str, Any] = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "mlp_ratio": inner / width}
    if "reg_token" in weights and weights["reg_token"].ndim == 3:
        shapes["reg_tokens" if kind == "vit" else "num_reg_tokens"] = weights["reg_token"].shape[1]
    if "blocks.0.mlp.fc1_g.weight" in weights:
        shapes |= {"swiglu_mlp": True, "swiglu_align_to": 1}  # any hidden width
    elif kind == "vit" and weights.get("blocks.0.mlp.fc1.weight", torch.empty(0)).shape[0] == 2 * inner:
        shapes |= {"mlp_ratio": 2 * inner / width, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if kind == "beit":  # a table of (2w - 1)² offsets, and three for the class token
        shapes["img_size"] = patch_size * ((math.isqrt(max(len(weights[TABLE]) - 3, 1)) + 1) // 2)
    return shapes


def load_weights(network: nn.Module, weights: Weights, source: str) -> None:
    """Load every tensor in float32, with stored positions of a Vision Transformer resampled to its grid.

    Raises:
        ValueError: a key is missing or unexpected, a shape differs, or a weight is NaN or infinite.
    """
    loaded = dict(weights)
    if isinstance(network, VisionTransformer) and network.pos_embed is not None and "pos_embed" in weights:
        prefix, positions = 0 if network.no_embed_class else network.num_prefix_tokens, loaded["pos_embed"].float()
        patches = positions.shape[1] - prefix if positions.ndim == 3 else -1
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            raise ValueError(f"{source}: its positions of shape {tuple(positions.shape)} form no square grid.")
        grid = list(network.patch_embed.grid_size)
        loaded["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    load_strictly(network, loaded, source)


def load_strictly(network: nn.Module, weights: Weights, source: str) -> None:
    """Load every tensor, floating-point ones in float32.

    Raises:
        ValueError: a key is missing or unexpected, a shape differs, or a weight is NaN or infinite.
    """
    expected = network.state_dict()
    _refuse(source, "misses the keys", [key for key in expected if key not in weights])
    _refuse(source, "has unexpected keys", [key for key in weights if key not in expected])
    _refuse(source, "has other shapes in", [key for key, x in weights.items() if x.shape != expected[key].shape])
    _refuse(source, "has NaN or infinite weights in", [key for key, x in weights.items() if not x.isfinite().all()])
    network.load_state_dict({key: x.float() if x.is_floating_point() else x for key, x in weights.items()})


def _refuse(source: str, problem: str, keys: list[str]) -> None:
    """Raise if there are any such keys, naming the first few."""
    if keys:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        raise ValueError(f"{source}: {problem} {', '.join(keys[:6])}{more}; use an unmodified checkpoint.")


def gives_tokens(network: nn.Module) -> bool:
    """Whether timm's ``forward_features`` gives prefix tokens and patches, at any image size."""
    return all(hasattr(network, name) for name in ("num_prefix_tokens", "patch_embed", "set_input_size", "norm"))


def has_token_norm(network: nn.Module) -> bool:
    """Whether the last layer of timm's ``forward_features`` is a norm."""
    return hasattr(cast(Any, network).norm, "eps")
