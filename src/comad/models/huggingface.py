"""Folders of the transformers library as timm networks, read without that library. Add one: an entry in `FAMILIES`.

A teacher gives its tokens after the final norm. That is ``last_hidden_state`` of transformers' model, with two remarks:
CLIP's is before ``post_layernorm``, which is applied to every token here; ViTMAE's is of patches drawn at random and
shuffled, while a teacher sees all of them, in order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from comad.models.files import read_file, read_json
from comad.models.formats import DINOV3, HALVES, REGISTERS, SCALED, Kind, Triple, dinov2
from comad.models.networks import build_network, width_of

Rules = tuple[tuple[str, str], ...]
FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPER = re.compile(r"^(?:(?:vit|dinov2|dinov2_with_registers|dinov3_vit|model|vision_model)\.)+")
"""What a model with a head puts before the keys of its backbone."""
REMEDY = "save the model again by save_pretrained"
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

VIT: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
DINOV2: Rules = (
    *VIT,
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
DINOV3_RULES: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
PLAIN_MLP: Rules = ((r"\.mlp\.up_proj\.", ".mlp.fc1."),)
GATED_MLP: Rules = ((r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.", ".mlp.fc1_x."))
TOWER: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
)
TOWER_IGNORED = ("text_model.", "logit_", "visual_projection.", "text_projection.", "head.", "embeddings.position_ids")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How transformers stores one kind of network.

    Attributes:
        rules: patterns of keys, and timm's names; applied in order.
        ignore: beginnings of keys that are no part of the backbone.
        convert: brings the renamed tensors into timm's form.
        network, arguments: timm's class and constructor arguments, see `build_network`.
        heads, norm_eps, activation: what a ``config.json`` that does not say it means.
        pixel_mean, pixel_std: pixel normalisation where no ``preprocessor_config.json`` says it.
        token_types: tokens that were trained, and so can be trusted.
    """

    rules: Rules
    ignore: tuple[str, ...]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    network: Kind = "vit"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    heads: int = 12
    norm_eps: float = 1e-6
    activation: str = "gelu"
    pixel_mean: Triple = IMAGENET_DEFAULT_MEAN
    pixel_std: Triple = IMAGENET_DEFAULT_STD
    token_types: tuple[str, ...] = ("cls", "patch")


def _tower(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the class embedding (E,) and the positions (n, E) the axes of a batch."""
    axes = {"cls_token": (1, 1, -1), "pos_embed": (1, *weights.get("pos_embed", torch.empty(0, 0)).shape)}
    return {key: tensor.reshape(axes[key]) if key in axes else tensor for key, tensor in weights.items()}


def _without_empty_registers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != "reg_token" or tensor.numel()}


FAMILIES = {
    "vit": Family(rules=VIT, ignore=("pooler.", "classifier."), norm_eps=1e-12, pixel_mean=HALVES, pixel_std=HALVES),
    "vit_mae": Family(rules=VIT, ignore=("decoder.",), norm_eps=1e-12, token_types=("patch",)),
    "dinov2": Family(rules=DINOV2, ignore=("embeddings.mask_token", "classifier."), arguments=SCALED),
    "dinov2_with_registers": Family(
        rules=DINOV2, ignore=("embeddings.mask_token", "classifier."), convert=dinov2, arguments=REGISTERS
    ),
    "dinov3_vit": Family(
        rules=DINOV3_RULES,
        ignore=("embeddings.mask_token", "rope_embeddings."),
        convert=_without_empty_registers,
        network="eva",
        arguments=DINOV3,
        heads=6,
        norm_eps=1e-5,
    ),
    "siglip": Family(
        rules=TOWER,
        ignore=TOWER_IGNORED,
        convert=_tower,
        arguments={"class_token": False, "global_pool": ""},
        activation="gelu_pytorch_tanh",
        pixel_mean=HALVES,
        pixel_std=HALVES,
        token_types=("patch",),
    ),
    "clip": Family(
        rules=TOWER,
        ignore=TOWER_IGNORED,
        convert=_tower,
        arguments={"pre_norm": True},
        norm_eps=1e-5,
        activation="quick_gelu",
        pixel_mean=OPENAI_CLIP_MEAN,
        pixel_std=OPENAI_CLIP_STD,
    ),
}


class Loaded(NamedTuple):
    """A network of transformers as timm's, and what its tensors cannot say."""

    network: nn.Module
    path: Path
    family: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    token_types: tuple[str, ...]
    licence: str


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of transformers, not of timm."""
    return "model_type" in config and "architecture" not in config


def weights_file(folder: Path) -> str:
    """Name of the file with weights in a folder: the first of `FILES` that is there."""
    return next((name for name in FILES if (folder / name).exists()), FILES[0])


def load_folder(folder: Path, config: Mapping[str, Any], image_size: int, file: str | None = None) -> Loaded:
    """Load a folder that ``save_pretrained`` wrote: ``config.json``, and weights, in ``file`` or the first of `FILES`.

    Raises:
        ValueError: the kind of network is unknown, a file is missing or damaged, or the weights do not fit.
    """
    name = str(config["model_type"]).removesuffix("_vision_model")
    if name not in FAMILIES:
        raise ValueError(f"{folder}: its model_type is {name!r}; known are {', '.join(FAMILIES)}.")
    family, config = FAMILIES[name], config.get("vision_config", config)
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: vision_config in config.json is no object; {REMEDY}.")
    path = folder / (file or weights_file(folder))
    if not path.exists() and any(folder.glob("*.index.json")):
        raise ValueError(f"{folder}: its weights are in several files; {REMEDY}(FOLDER, max_shard_size='100GB').")
    weights = _named(read_file(path), family, bool(config.get("use_gated_mlp")), str(path))
    arguments = _arguments(config, family, weights, str(folder))
    network = build_network(family.network, weights, image_size, str(path), arguments)
    mean, std = _pixels(folder, family)
    return Loaded(network, path, name, mean, std, family.token_types, licence_of(folder))


def _named(content: Mapping[str, Any], family: Family, gated: bool, source: str) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names."""
    rules = (*family.rules, *((GATED_MLP if gated else PLAIN_MLP) if family.network == "eva" else ()))
    named: dict[str, Tensor] = {}
    for key, tensor in content.items():
        inner = WRAPPER.sub("", key)
        if key.startswith(family.ignore) or inner.startswith(family.ignore) or not isinstance(tensor, Tensor):
            continue
        for pattern, name in rules:
            inner = re.sub(pattern, name, inner)
        if inner in named:
            raise ValueError(f"{source}: two of its keys mean {inner}; {REMEDY}.")
        named[inner] = tensor
    try:
        return family.convert(_fused(named, family.network == "eva"))
    except (IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{source}: its tensors are not those of its model_type; {REMEDY}.") from error


def _fused(weights: dict[str, Tensor], bias_apart: bool) -> dict[str, Tensor]:
    """Join query, key and value. timm's Eva keeps the biases of query and value apart, and has none of the key."""
    fused = dict(weights)
    for part in ("weight", "bias"):
        for stem in [key.removesuffix(f"q.{part}") for key in weights if key.endswith(f".attn.q.{part}")]:
            if part == "bias" and bias_apart:
                fused |= {f"{stem}{x}_bias": fused.pop(f"{stem}{x}.bias") for x in "qv"}
            else:
                fused[f"{stem}qkv.{part}"] = torch.cat([fused.pop(f"{stem}{x}.{part}") for x in "qkv"])
    return fused


def _arguments(config: Mapping[str, Any], family: Family, weights: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """timm's constructor arguments that ``config.json`` tells, checked against the weights."""
    width = width_of(family.network, weights, what)
    heads = config.get("num_attention_heads", family.heads)
    eps = config.get("layer_norm_eps", family.norm_eps)
    act = str(config.get("hidden_act", family.activation))
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{what}: num_attention_heads in config.json is {heads!r} at a width of {width}; {REMEDY}.")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"{what}: layer_norm_eps in config.json is {eps!r}; {REMEDY}.")
    if (said := config.get("num_hidden_layers", depth)) != depth:
        raise ValueError(f"{what}: config.json says {said} layers, its weights are of {depth}; {REMEDY}.")
    arguments = {**family.arguments, "num_heads": heads, "norm_layer": partial(nn.LayerNorm, eps=eps)}
    if family.network == "eva":
        return arguments | _eva_arguments(config, weights, act, what)
    if act not in ACTIVATIONS:
        raise ValueError(f"{what}: hidden_act {act!r} is none of {', '.join(ACTIVATIONS)}; use another model.")
    return arguments | {"qkv_bias": bool(config.get("qkv_bias", True)), "act_layer": ACTIVATIONS[act]}


def _eva_arguments(config: Mapping[str, Any], weights: Mapping[str, Tensor], act: str, what: str) -> dict[str, Any]:
    """Of DINOv3: timm's Eva has one activation per kind of MLP."""
    expected = "silu" if "blocks.0.mlp.fc1_g.weight" in weights else "gelu"
    if act != expected:
        raise ValueError(f"{what}: hidden_act {act!r} is not {expected!r} as in every DINOv3; use another model.")
    inner = config.get("rope_parameters")
    theta = config.get("rope_theta", inner.get("rope_theta", 100.0) if isinstance(inner, dict) else 100.0)
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(f"{what}: rope_theta in config.json is {theta!r}; {REMEDY}.")
    return {"rope_temperature": float(theta), "qkv_bias": bool(config.get("query_bias", True))}


def _pixels(folder: Path, family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel normalisation by the folder's image processor, else the family's."""
    facts: Any = {}
    if (folder / "preprocessor_config.json").exists():
        facts = read_json(folder / "preprocessor_config.json", REMEDY)
    elif (folder / "processor_config.json").exists():
        facts = read_json(folder / "processor_config.json", REMEDY).get("image_processor")
    facts = facts if isinstance(facts, dict) else {}
    mean, std = facts.get("image_mean", family.pixel_mean), facts.get("image_std", family.pixel_std)
    if not _is_triple(mean) or not _is_triple(std) or min(std) <= 0:
        raise ValueError(f"{folder}: image_mean and image_std of its image processor are {mean} and {std}; {REMEDY}.")
    scale = facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 1.0
    if not isinstance(scale, float) or not math.isclose(scale, 1 / 255, rel_tol=0.01):
        raise ValueError(f"{folder}: its image processor does not bring pixels to [0, 1]; use another model.")
    if not facts.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    return tuple(mean), tuple(std)


def _is_triple(values: Any) -> bool:
    numbers = isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(x, int | float) for x in values)
    return numbers and all(math.isfinite(x) for x in values)


def licence_of(folder: Path) -> str:
    """The licence in the front matter of the folder's README.md."""
    try:
        text = (folder / "README.md").read_bytes()[: 2**16].decode("utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = dict(re.findall(r"^(license(?:_name)?):[ \t]*['\"]?([\w.+-]+)", front[1], re.MULTILINE)) if front else {}
    return found.get("license_name") or found.get("license") or "unknown"
