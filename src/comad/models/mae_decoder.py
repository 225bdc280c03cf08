"""The decoder that a masked autoencoder was trained with: written beside an export, read from official files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from comad.models.checkpoints import recognise
from comad.models.decoder import MaskedDecoder
from comad.models.files import read_file
from comad.models.sources import BUNDLED, bundled_teachers

FILE = "decoder.safetensors"
HEAD_WIDTH = 32
"""Channels of a head in official decoders, whose files do not tell: 512 channels, 16 heads."""
OFFICIAL = {
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "predict.",
    "decoder_pos_embed": "positions",
    "mask_token": "mask_token",
}


def save_decoder(decoder: MaskedDecoder, folder: Path) -> None:
    """Write a decoder beside the export of its encoder."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    heads = torch.tensor(decoder.num_heads)
    save_file(state | {"positions": decoder.positions.cpu().contiguous(), "heads": heads}, str(folder / FILE))


def load_decoder(spec: str, grid: tuple[int, int]) -> MaskedDecoder:
    """The decoder that belongs to a teacher, frozen, for a grid of patches.

    Args:
        spec: the teacher: the folder that `comad pretrain mae` writes, or an official file with its decoder.
        grid: rows and columns.

    Raises:
        ValueError: it has none, or it is of other shapes.
    """
    where = re.sub(r":heads=\d+$", "", spec.partition("=")[2] or spec)
    path = BUNDLED / where if where in bundled_teachers() else Path(where)
    none = ValueError(
        f"{spec}: no MAE decoder lies with this teacher, and this preset learns from one; pass the folder of "
        "`comad pretrain mae` or mae_visualize_vit_*.pth, or take --preset dmae."
    )
    if (path / FILE).is_file():
        weights = read_file(path / FILE)
    elif path.is_file() and recognise(content := read_file(path), str(path)).format == "mae-full":
        weights = _renamed(content["model"])
    else:
        raise none
    try:
        return _build(weights, grid).eval().requires_grad_(False)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{spec}: its decoder is not that of a masked autoencoder; use an unmodified file.") from error


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; positions without the class token's."""
    found = {}
    for theirs, ours in OFFICIAL.items():
        found |= {ours + key.removeprefix(theirs): x for key, x in weights.items() if key.startswith(theirs)}
    positions = found["positions"].squeeze(0)[1:]
    heads = torch.tensor(positions.shape[1] // HEAD_WIDTH)
    return found | {"mask_token": found["mask_token"].flatten(), "positions": positions, "heads": heads}


def _build(weights: Mapping[str, Tensor], grid: tuple[int, int]) -> MaskedDecoder:
    state = {name: x.float() for name, x in weights.items() if name not in ("positions", "heads")}
    width, in_width = state["embed.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    decoder = MaskedDecoder(in_width, grid, len(state["predict.bias"]), width, depth, int(weights["heads"]))
    decoder.load_state_dict(state)
    positions = weights["positions"].float()
    if len(positions) != grid[0] * grid[1]:
        side = math.isqrt(len(positions))
        old = [side, side]
        positions = resample_abs_pos_embed(positions.unsqueeze(0), list(grid), old, num_prefix_tokens=0).squeeze(0)
    decoder.positions.copy_(positions)
    return decoder
