"""Checkpoint files of published teachers: recognised by their keys, and loaded strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from comad.models.formats import FORMATS, NAME_IT, Format, Layout
from comad.models.networks import build_network, width_of


class Checkpoint(NamedTuple):
    """The backbone in a file, under timm's names: no container, prefix, head or decoder. ``format`` keys `FORMATS`."""

    source: str
    format: str
    weights: dict[str, Tensor]


def recognise(content: Mapping[str, Any], source: str) -> Checkpoint:
    """Take the backbone out of the content of a file.

    Raises:
        ValueError: the layout is none of `FORMATS`, or the tensors are not of its shapes.
    """
    for name, layout in FORMATS.items():
        state: Any = content.get(layout.container) if layout.container else content
        if _fits(layout, state):
            kept = [key for key in state if not key.startswith(layout.ignore)]
            weights = {key.removeprefix(layout.prefix): state[key] for key in kept}
            return Checkpoint(source, name, _converted(layout, weights, f"{source}: taken for {name}"))
    keys = _some_keys(content)
    hint = "; a Hugging Face file needs its config.json beside it" if any("embeddings." in key for key in keys) else ""
    raise ValueError(
        f"{source}: unknown layout, with keys {', '.join(keys)}; known formats: {', '.join(FORMATS)}{hint}."
    )


def _converted(layout: Format, weights: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The weights under timm's names."""
    if layout.convert is None or layout.refusal:
        return weights
    try:
        return layout.convert(weights)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{what}: its tensors have other shapes; use an unmodified file.") from error


def _fits(layout: Format, state: Any) -> bool:
    """Whether a state dict has the keys of a format."""
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return False
    return all(key in state for key in layout.detect) and not any(key in state for key in layout.absent)


def _some_keys(content: Mapping[str, Any]) -> list[str]:
    """A few keys of a file, for a message: up to three of each container."""
    inner = {key: list(value)[:3] if isinstance(value, Mapping) else [""] for key, value in content.items()}
    return [f"{key}/{name}".rstrip("/") for key, names in inner.items() for name in names][:8] or ["(none)"]


def build(checkpoint: Checkpoint, image_size: int, heads: int | None = None) -> nn.Module:
    """Build the network a checkpoint is of, see `build_network`, and load it strictly.

    Depth, width and patch size follow from the shapes; the number of heads from the format, or from ``heads``.

    Raises:
        ValueError: the format cannot be a teacher, the heads are unknown, or the weights do not fit.
    """
    source, layout, weights = checkpoint.source, FORMATS[checkpoint.format], checkpoint.weights
    if layout.refusal:
        raise ValueError(f"{source}: {layout.refusal}.")
    width = width_of(layout.network, weights, source)
    if layout.positions != "none" and (positions := position_layout(weights["pos_embed"])) != layout.positions:
        own = f"not {layout.positions} as in a file of format {checkpoint.format}"
        raise ValueError(f"{source}: its positions are {positions}, {own}; {NAME_IT}.")
    arguments = {**layout.arguments, "num_heads": num_heads(checkpoint, width, heads)}
    arguments["norm_layer"] = partial(nn.LayerNorm, eps=layout.norm_eps)
    return build_network(layout.network, weights, image_size, source, arguments)


def num_heads(checkpoint: Checkpoint, width: int, heads: int | None = None) -> int:
    """Number of attention heads: as given, else by the rule of the format, since no shape tells it.

    Raises:
        ValueError: the format has no rule for this width, or the heads do not divide it.
    """
    layout = FORMATS[checkpoint.format]
    if heads is None:
        heads = layout.heads.get(width)
    if heads is None and layout.head_width and width % layout.head_width == 0:
        heads = width // layout.head_width
    if not heads or width % heads:
        known = "unknown" if heads is None else f"not {heads}"
        what = f"the number of heads of a {checkpoint.format} of width {width} is {known}"
        raise ValueError(f"{checkpoint.source}: {what}; add it to the name of the teacher, as in NAME=FILE:heads=12.")
    return heads


def position_layout(positions: Float[Tensor, "1 n E"]) -> Layout:
    """Recognise fixed sin-cos positions after a class token; the two layouts are transposes of each other."""
    _, length, width = positions.shape
    side = math.isqrt(length - 1)
    if side**2 != length - 1 or width % 4:
        return "learnt"
    angles = torch.arange(side).unsqueeze(1) / 10000 ** (torch.arange(width // 4) / (width // 4))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    grid = positions[0, 1:].float()
    if torch.allclose(grid, torch.cat([column, row], dim=1), atol=5e-3):
        return "mae"
    return "mocov3" if torch.allclose(grid, torch.cat([row, column], dim=1), atol=5e-3) else "learnt"
