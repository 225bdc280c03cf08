"""timm's Vision Transformers, built from the shapes of their weights and loaded strictly."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers.mlp import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.formats import Kind, Resampling, Weights

KINDS: dict[Kind, type[nn.Module]] = {"vit": VisionTransformer, "eva": Eva, "beit": Beit}
OFFSETS = "relative_position_bias_table"
TABLE = f"rel_pos_bias.{OFFSETS}"
OWN_SIZE = 224
"""Pixels on the side of the images of a network whose weights and facts do not say it."""


def build_network(
    kind: Kind,
    weights: Weights,
    image_size: int,
    source: str,
    arguments: Mapping[str, Any],
    resampling: Resampling = "antialias",
) -> nn.Module:
    """Build the network that weights under timm's names are of, without a head, and load it strictly.

    Depth, width, patch size, registers and the kind of MLP follow from the weights; all else is in ``arguments`` of
    timm's constructor. Shapes are compared before anything takes memory.

    Raises:
        ValueError: the weights are no Vision Transformer's, or do not fit.
    """
    width_of(kind, weights, source)
    shapes = {"img_size": image_size, **arguments, **shapes_of(kind, weights), "num_classes": 0}
    weights = on_grid(kind, weights, image_size // shapes["patch_size"], source, resampling, arguments)
    check_shapes(lambda: KINDS[kind](**shapes), weights, source)
    network = KINDS[kind](**shapes)
    load_strictly(network, weights, source)
    return network


def check_shapes(make: Any, weights: Weights, source: str) -> None:
    """Compare the shapes of weights with those of the network that ``make`` builds, without memory for its numbers.

    Raises:
        ValueError: ``make`` fails, a key is missing or unexpected, or a shape differs.
    """
    try:
        with torch.device("meta"):
            expected = make().state_dict()
    except Exception as error:  # timm answers arguments of no sense with errors of every kind
        told = str(error).partition("\n")[0][:200]
        raise ValueError(f"{source}: no network can be built of it ({told}); use an unmodified checkpoint.") from error
    _refuse(source, "misses the keys", [key for key in expected if key not in weights])
    _refuse(source, "has unexpected keys", [key for key in weights if key not in expected])
    _refuse(source, "has other shapes in", [key for key, x in weights.items() if x.shape != expected[key].shape])


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


def stored_size(kind: Kind, weights: Weights, source: str) -> tuple[int, int]:
    """Pixels on the side of a patch, and of the images that the stored positions are for."""
    width_of(kind, weights, source)
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    if kind == "vit":
        rows = math.isqrt(weights["pos_embed"].shape[1])  # prefix tokens are fewer than a row
    elif kind == "beit" and TABLE in weights:
        rows = _table_rows(weights[TABLE])
    else:
        rows = OWN_SIZE // patch_size
    return patch_size, max(1, rows) * patch_size


def shapes_of(kind: Kind, weights: Weights) -> dict[str, Any]:
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
    return shapes


def on_grid(
    kind: Kind,
    weights: Weights,
    rows: int,
    source: str,
    resampling: Resampling,
    arguments: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Bring positions to a grid of ``rows`` × ``rows``; a table of relative ones as the authors of BEiT do."""
    loaded = dict(weights)
    if kind == "beit" and TABLE in weights and weights[TABLE].ndim == 2:
        table = weights[TABLE].float()
        if len(table) == (2 * _table_rows(table) - 1) ** 2 + 3:
            loaded[TABLE] = resample_offsets(table, rows)
    if kind == "vit" and "pos_embed" in weights:
        class_token = arguments.get("class_token", True)
        prefix = 0 if arguments.get("no_embed_class") or not class_token else 1
        prefix += 0 if arguments.get("no_embed_class") else weights.get("reg_token", torch.empty(1, 0)).shape[1]
        loaded["pos_embed"] = resample_positions(weights["pos_embed"], rows, prefix, source, resampling)
    return loaded


def resample_positions(
    positions: Tensor, rows: int, prefix: int, source: str, resampling: Resampling = "antialias"
) -> Float[Tensor, "1 n E"]:
    """Bring learnt or fixed positions to a grid of ``rows`` × ``rows`` by the rule of those who trained them.

    Args:
        positions: (1, prefix + n, E), of a square grid.
        rows: rows and columns of the new grid.
        prefix: positions of tokens before the patches; they stay.
        source: what to call the file in a message.
        resampling: a key of `comad.models.formats.POSITION_RULES`.

    Raises:
        ValueError: they form no square grid.
    """
    positions = positions.float()
    patches = positions.shape[1] - prefix if positions.ndim == 3 else -1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side**2 != patches:
        raise ValueError(
            f"{source}: its positions of shape {tuple(positions.shape)} form no square grid; use an unmodified file."
        )
    if side == rows:
        return positions
    if resampling == "rebuild":
        grid = sincos_table(rows, positions.shape[2]).unsqueeze(0)
    else:
        square = positions[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        to: dict[str, Any] = {"size": (rows, rows), "antialias": resampling == "antialias"}
        if resampling == "offset":  # rows + 0.1 keeps the size from falling by rounding, and moves every position
            to = {"scale_factor": ((rows + 0.1) / side,) * 2}
        grid = F.interpolate(square, mode="bicubic", **to).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :prefix], grid], dim=1)


def sincos_table(rows: int, width: int) -> Float[Tensor, "n E"]:
    """Fixed sin-cos positions as in MoCo v3: the first half of the channels tells the row, the second the column."""
    angles = torch.arange(rows).unsqueeze(1) / 10000 ** (torch.arange(width // 4) / (width // 4))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat_interleave(rows, dim=0), axis.repeat(rows, 1)], dim=1)


def resample_offsets(table: Float[Tensor, "n heads"], rows: int) -> Float[Tensor, "m heads"]:
    """Bring BEiT's table of (2w - 1)² offsets, and three for the class token, to a grid of ``rows``, as its authors do.

    The old offsets are placed on the new ones by a geometric progression, dense in the middle; between them runs a
    cubic spline.
    """
    old, new = 2 * _table_rows(table) - 1, 2 * rows - 1
    if old == new:
        return table
    low, high, ratio = 1.01, 1.5, 1.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        too_far = (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2
        low, high = (low, ratio) if too_far else (ratio, high)
    steps = torch.cumsum(ratio ** torch.arange(old // 2, dtype=torch.float64), dim=0)
    places = torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])
    spline = spline_matrix(places, torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64))
    square = table[:-3].double().view(old, old, -1)
    grid = torch.einsum("ia,jb,abh->ijh", spline, spline, square).flatten(0, 1)
    return torch.cat([grid.to(table.dtype), table[-3:]])


def set_input_size(network: nn.Module, side: int) -> None:
    """Bring a network of timm to images of ``side`` pixels: by timm, but offsets of BEiT as its authors do."""
    offsets = [name for name, _ in network.named_parameters() if isinstance(network, Beit) and name.endswith(OFFSETS)]
    tables = {name: network.get_parameter(name).detach() for name in offsets}
    cast(Any, network).set_input_size(img_size=(side, side))
    for name, table in tables.items():
        network.get_parameter(name).data = resample_offsets(table, cast(Any, network).patch_embed.grid_size[0])


def position_rule(network: nn.Module) -> Resampling:
    """How a network that timm built is brought to another grid."""
    if isinstance(network, Beit) and network.pos_embed is None:
        return "spline"
    return "none" if getattr(network, "pos_embed", None) is None else "antialias"


def spline_matrix(x: Float[Tensor, " n"], at: Float[Tensor, " m"]) -> Float[Tensor, "m n"]:
    """Weights of n values at ``x`` in their cubic spline (not-a-knot) at the m places ``at``, kept within the ends."""
    n, h, one = len(x), x.diff(), torch.eye(len(x), dtype=x.dtype)
    if n < 4:
        raise ValueError("a cubic spline needs four values; use an unmodified file.")
    slope = (one[1:] - one[:-1]) / h[:, None]
    system, right = torch.zeros_like(one), torch.zeros_like(one)
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i] = 6 * (slope[i] - slope[i - 1])
    for row, i in ((0, 1), (n - 1, n - 2)):  # the third derivative goes on through the second place from each end
        system[row, i - 1 : i + 2] = torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    bend = torch.linalg.solve(system, right)
    at = at.clamp(x[0], x[-1])
    i = torch.searchsorted(x, at).clamp(1, n - 1)
    width, left, after = h[i - 1][:, None], (at - x[i - 1])[:, None], (x[i] - at)[:, None]
    linear = (after * one[i - 1] + left * one[i]) / width
    bent = (after**3 / width - after * width) * bend[i - 1] + (left**3 / width - left * width) * bend[i]
    return linear + bent / 6


def _table_rows(table: Tensor) -> int:
    """Rows w of the grid of a table of (2w - 1)² offsets, and three for the class token."""
    return (math.isqrt(max(len(table) - 3, 1)) + 1) // 2


def load_weights(network: nn.Module, weights: Weights, source: str) -> None:
    """Load every tensor in float32, stored positions of a Vision Transformer resampled to its grid as timm does.

    Names of the authors that timm knows for this network are renamed.

    Raises:
        ValueError: a key is missing or unexpected, a shape differs, or a weight is NaN or infinite.
    """
    computed = ("relative_position_index", "attn_mask")  # which the authors of BEiT and Swin keep
    loaded = _timm_names(network, {key: x for key, x in weights.items() if not key.endswith(computed)})
    if isinstance(network, VisionTransformer) and network.pos_embed is not None and "pos_embed" in loaded:
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        loaded["pos_embed"] = resample_positions(loaded["pos_embed"], network.patch_embed.grid_size[0], prefix, source)
    load_strictly(network, loaded, source)


def _timm_names(network: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Weights under timm's names: as they are, or by timm's function for this kind of network if then more fit."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    expected = network.state_dict()
    if convert is None or weights.keys() == expected.keys():
        return dict(weights)
    visual = "visual." if "class_embedding" in weights else ""  # OpenCLIP's part that sees, saved alone
    try:
        named = convert({visual + key: x for key, x in weights.items()}, network)
    except Exception:  # not one of the layouts that it is for; told by the names that miss
        return dict(weights)
    named = without_classifier(named, getattr(network, "pretrained_cfg", {}))
    return min(dict(weights), named, key=lambda part: len(part.keys() ^ expected.keys()))


def without_classifier(weights: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Weights but for those of the classifier, or of each if timm's facts name several."""
    named = facts.get("classifier") or "head"
    heads = tuple(f"{name}." for name in (named if isinstance(named, list | tuple) else [named]))
    return {key: tensor for key, tensor in weights.items() if not key.startswith(heads)}


def load_strictly(network: nn.Module, weights: Weights, source: str) -> None:
    """Load every tensor, floating-point ones in float32.

    Raises:
        ValueError: a key is missing or unexpected, a shape differs, or a weight is no finite number of float32.
    """
    expected = network.state_dict()
    _refuse(source, "misses the keys", [key for key in expected if key not in weights])
    _refuse(source, "has unexpected keys", [key for key in weights if key not in expected])
    _refuse(source, "has other shapes in", [key for key, x in weights.items() if x.shape != expected[key].shape])
    whole = {key: x.float() if x.is_floating_point() else x for key, x in weights.items()}
    _refuse(source, "has NaN or infinite weights in", [key for key, x in whole.items() if not x.isfinite().all()])
    network.load_state_dict(whole)


def _refuse(source: str, problem: str, keys: list[str]) -> None:
    """Raise if there are any such keys, naming the first few."""
    if keys:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        remedy = "use an unmodified checkpoint" + (", or save it without these" if "unexpected" in problem else "")
        raise ValueError(f"{source}: {problem} {', '.join(keys[:6])}{more}; {remedy}.")


def gives_tokens(network: nn.Module) -> bool:
    """Whether timm's ``forward_features`` gives prefix tokens and patches, at any image size."""
    return all(hasattr(network, name) for name in ("num_prefix_tokens", "patch_embed", "set_input_size", "norm"))


def norm_after_pooling(network: nn.Module) -> str:
    """Name of the norm that the authors of a network put between its pooling and its classifier; empty: there is none.

    It is the mean of the patches that it was trained on.
    """
    for name in ("fc_norm", "head.norm"):
        try:
            module = network.get_submodule(name)
        except AttributeError:
            continue
        if hasattr(module, "eps") and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return name
    return ""


def is_of_maps(norm: nn.Module) -> bool:
    """Whether a norm takes maps (B, E, h, w), not rows (B, N, E)."""
    return "2d" in type(norm).__name__ or isinstance(norm, nn.GroupNorm)


def each_normalised(norm: nn.Module, vectors: Float[Tensor, "*B E"]) -> Float[Tensor, "*B E"]:
    """Vectors, one by one, by a norm of timm's that may be one of maps."""
    flat = vectors.flatten(0, -2)
    normed = norm(flat[..., None, None]).flatten(1) if is_of_maps(norm) else norm(flat)
    return normed.view(vectors.shape)


def depth_of(network: nn.Module) -> int:
    """Number of equal blocks whose outputs can be read; 0 of networks without."""
    readable = gives_tokens(network) and hasattr(network, "blocks") and hasattr(network, "forward_intermediates")
    return len(cast(Any, network).blocks) if readable else 0


def final_norm(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a network does to its tokens, or to what is pooled of them, behind its last block."""
    norms = [getattr(network, name) for name in ("norm", "fc_norm") if hasattr(getattr(network, name, None), "eps")]
    return nn.Sequential(*norms)


def has_token_norm(network: nn.Module) -> bool:
    """Whether the last layer of timm's ``forward_features`` is a norm."""
    return hasattr(cast(Any, network).norm, "eps")
