"""Folders and models of the transformers library. Those of `FAMILIES` become timm networks, without that library.

The others are built by transformers itself, see `OTHERS`. Add one: an entry in one of the two tables.

A teacher gives its tokens after the final norm. That is ``last_hidden_state`` of transformers' model, with two remarks:
CLIP's is before ``post_layernorm``, which is applied to every token here; ViTMAE's is of patches drawn at random and
shuffled, while a teacher sees all of them, in order.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

from comad.models.backbone import patchify
from comad.models.checkpoints import OWN_MODULE
from comad.models.files import checked_pixels, read_file, read_json
from comad.models.formats import DINOV3, HALVES, POSITION_RULES, REGISTERS, SCALED, Kind, Resampling, Triple, dinov2
from comad.models.networks import OWN_SIZE, build_network, stored_size, width_of

Rules = tuple[tuple[str, str], ...]
FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
MOST = 2**20  # of anything in a config: labels, channels, pixels, words
WRAPPER = re.compile(r"^(?:(?:vit|ijepa|dinov2|dinov2_with_registers|dinov3_vit|model|vision_model)\.)+")
"""What a model with a head puts before the keys of its backbone."""
REMEDY = "save the model again by save_pretrained"
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

VIT: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),  # as in memory, which torch.save(model.state_dict()) keeps
    (r"\.attention\.o_proj\.", ".attn.proj."),
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
        resampling: how transformers brings positions to another grid, a key of `POSITION_RULES`.
        image_size: pixels on the side of the images it is evaluated on, where its positions are for larger ones.
        network, arguments: timm's class and constructor arguments, see `build_network`.
        heads, norm_eps, activation: what a ``config.json`` that does not say it means.
        pixel_mean, pixel_std: pixel normalisation where no ``preprocessor_config.json`` says it.
        token_types: tokens that were trained, and so can be trusted.
    """

    rules: Rules
    ignore: tuple[str, ...]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    resampling: Resampling = "plain"
    image_size: int | None = None
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
    "ijepa": Family(
        rules=VIT,
        ignore=("pooler.", "classifier."),
        arguments={"class_token": False, "global_pool": ""},
        token_types=("patch",),
    ),
    "dinov2": Family(rules=DINOV2, ignore=("embeddings.mask_token", "classifier."), arguments=SCALED, image_size=224),
    "dinov2_with_registers": Family(
        rules=DINOV2,
        ignore=("embeddings.mask_token", "classifier."),
        convert=dinov2,
        resampling="antialias",
        image_size=224,
        arguments=REGISTERS,
    ),
    "dinov3_vit": Family(
        rules=DINOV3_RULES,
        ignore=("embeddings.mask_token", "rope_embeddings."),
        convert=_without_empty_registers,
        network="eva",
        resampling="none",
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


NO_CHANGE: tuple[Triple, Triple] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CLIP_PIXELS = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
OTHERS: dict[str, tuple[Triple, Triple]] = {
    "aimv2": CLIP_PIXELS,
    "beit": (HALVES, HALVES),
    "convnext": IMAGENET,
    "convnextv2": IMAGENET,
    "data2vec-vision": IMAGENET,
    "deit": IMAGENET,
    "dinov3_convnext": IMAGENET,
    "hiera": IMAGENET,
    "radio": NO_CHANGE,  # the network normalises by itself
    "resnet": IMAGENET,
    "siglip2": (HALVES, HALVES),
    "swin": IMAGENET,
    "swinv2": IMAGENET,
    "vit_msn": IMAGENET,
    "vjepa2": IMAGENET,
}
"""Pixel normalisation (mean, std) of kinds of networks that transformers builds."""


class Loaded(NamedTuple):
    """A network of transformers, as timm's where `FAMILIES` has its kind, and what its tensors cannot say."""

    network: nn.Module
    path: Path
    family: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    token_types: tuple[str, ...]
    licence: str
    positions: str


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of transformers, not of timm."""
    return "model_type" in config and "architecture" not in config


def weights_file(folder: Path) -> str:
    """Name of the file with weights in a folder: the first of `FILES` that is there, or the index of their shards.

    If there is none of these, the only file with weights, under whatever name.

    Raises:
        ValueError: there are several such, or none.
    """
    known = [name for file in FILES for name in (file, file + INDEX) if (folder / name).exists()]
    others = [path.name for end in ("*.safetensors", "*.bin", "*.pth", "*.pt") for path in folder.glob(end)]
    if not known and not others:
        raise ValueError(f"{folder}: no file with weights, such as {FILES[0]}; get the whole folder.")
    if not known and len(others) > 1:
        which = ", ".join(sorted(others)[:4])
        raise ValueError(f"{folder}: unclear which of {which} holds its weights; name it, as in NAME={folder}/FILE.")
    return (known or others)[0]


def load_folder(
    folder: Path, config: Mapping[str, Any], image_size: Callable[[int, int], int], file: str | None = None
) -> Loaded:
    """Load a folder that ``save_pretrained`` wrote: ``config.json``, and weights in ``file`` or by `weights_file`.

    Args:
        folder: where they are.
        config: the content of ``config.json``.
        image_size: pixels on the side of a patch, and of the images it was made for → of the images to come.
        file: name of the file with weights.

    Raises:
        ValueError: the kind of network is unknown, a file is missing or damaged, or the weights do not fit.
    """
    kind = str(config["model_type"])
    name = kind.removesuffix("_vision_model").removesuffix("_visual_model")
    path = folder / (file or weights_file(folder))
    if name in OTHERS:
        mean, std = _pixels(folder, *OTHERS[name])
        content = read_file(path)
        network = _by_transformers(folder, config, content)
        token_types = ("patch",) if "lm_head.weight" in content else ("cls", "patch")
        return Loaded(network, path, name, mean, std, token_types, licence_of(folder), POSITION_RULES["none"])
    if name not in FAMILIES:
        known = ", ".join([*FAMILIES, *OTHERS])
        raise ValueError(
            f"{folder}: its model_type is {name!r}; known are {known}. Others can be teachers as NAME=NET.py:FUNCTION, "
            "a function of yours that returns the model."
        )
    family, config = FAMILIES[name], config.get("vision_config", config)
    if not isinstance(config, dict):
        raise ValueError(f"{folder}: vision_config in config.json is no object; {REMEDY}.")
    network = network_of(family, read_file(path), config, str(path), str(folder), image_size)
    mean, std = _pixels(folder, family.pixel_mean, family.pixel_std)
    rule = POSITION_RULES[family.resampling]
    return Loaded(network, path, name, mean, std, family.token_types, licence_of(folder), rule)


def network_of(
    family: Family,
    content: Mapping[str, Any],
    config: Mapping[str, Any],
    source: str,
    place: str,
    image_size: Callable[[int, int], int],
) -> nn.Module:
    """Build timm's network of the state dict of a model of transformers.

    Raises:
        ValueError: the config or the weights do not fit.
    """
    weights = _named(content, family, bool(config.get("use_gated_mlp")), source)
    arguments = _arguments(config, family, weights, place)
    patch_size, own_size = stored_size(family.network, weights, source)
    side = image_size(patch_size, family.image_size or own_size)
    return build_network(family.network, weights, side, source, arguments, family.resampling)


def _by_transformers(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Any]) -> nn.Module:
    """Let transformers load a folder whose sizes were compared with its weights; it unpickles nothing either."""
    try:
        import transformers
    except ImportError as error:
        what = f"networks of the kind {config['model_type']!r} are built by transformers"
        raise ValueError(f"{folder}: {what}; run: pip install transformers.") from error
    _refuse_other_sizes(config, weights, folder)
    try:
        own = {"local_files_only": True, "trust_remote_code": False}
        facts: Any = transformers.AutoConfig.from_pretrained(str(folder), **own)
        if "lm_head.weight" in weights and "layernorm.weight" in weights:  # of BEiT, whose last norm is its head's
            facts.use_mean_pooling = False
        with torch.device("meta"):
            kind: Any = type(transformers.AutoModel.from_config(facts, trust_remote_code=False))
        given: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
        if "add_pooling_layer" in inspect.signature(kind).parameters:
            given["add_pooling_layer"] = any("pooler." in key for key in weights)
        model, found = kind.from_pretrained(None, config=facts, state_dict=dict(weights), **given)
    except Exception as error:  # transformers answers a config of no sense with errors of every kind
        told = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"{folder}: transformers cannot load it ({told}); {REMEDY}.") from error
    if missing := sorted(found["missing_keys"]):
        what = f"of what transformers.{kind.__name__} needs, its weights miss {', '.join(missing[:3])}"
        raise ValueError(f"{folder}: {what}; {REMEDY}, or {OWN_MODULE}.")
    model = getattr(model, "vision_model", getattr(model, "vision_tower", model))
    bad = [name for name, x in model.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise ValueError(f"{folder}: has NaN or infinite weights in {', '.join(bad[:3])}; {REMEDY}.")
    return TransformersFeatures(model)


def _refuse_other_sizes(config: Any, weights: Mapping[str, Any], folder: Path) -> None:
    """Refuse a config whose widths and depths go beyond the shapes in the weights, before anything is built."""
    shapes = [side for x in weights.values() if isinstance(x, Tensor) for side in x.shape]
    largest, pending = max(shapes, default=0), [("", config)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict | list):
            pending += list(value.items() if isinstance(value, dict) else ((name, part) for part in value))
        elif isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"{folder}: {name} in config.json is {value}, which no network has; {REMEDY}.")
        elif name.endswith("_eps") and not (isinstance(value, float) and 0 < value < 1):
            raise ValueError(f"{folder}: {name} in config.json is {value!r}; {REMEDY}.")
        elif isinstance(value, int) and re.search(r"layers|depth|blocks", name) and value > len(weights):
            raise ValueError(f"{folder}: {name} in config.json is {value}, its weights have fewer; {REMEDY}.")
        elif re.match(r"auxiliary_|decoder_", name):  # of heads that are not built
            continue
        elif isinstance(value, int) and re.search(r"hidden|width|dim|intermediate|channels", name) and value > largest:
            raise ValueError(f"{folder}: {name} in config.json is {value}, its weights are smaller; {REMEDY}.")


class TransformersFeatures(nn.Module):
    """A model of transformers under the names that `FeatureMapBackbone` reads.

    Its tokens are ``last_hidden_state``: a map, or patches after as many other tokens as are left over. Of several the
    first is taken for the class token. A network for videos sees one image as a film that stands still.

    Args:
        model: a `transformers.PreTrainedModel`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model
        config: Any = model.config
        sizes = [getattr(config, name, None) for name in ("image_size", "crop_size")]
        side = next((size[0] if isinstance(size, list | tuple) else size for size in sizes if size), OWN_SIZE)
        side = OWN_SIZE if config.model_type.startswith(("siglip2", "radio")) else int(side)
        self.default_cfg = {"input_size": (3, side, side)}
        patch = getattr(config, "patch_size", None)
        self.patch_size = patch if isinstance(patch, int) else None
        flat = self.patch_size if config.model_type not in ("swin", "swinv2", "hiera") else None
        self.feature_info = [{"reduction": flat or 32}]
        self.takes_patches = config.model_type.startswith("siglip2")
        self.num_prefix_tokens: int | None = None
        self.cls_token: bool | None = None

    @property
    def fc_norm(self) -> nn.Module | None:
        """The norm between its pooling and its classifier, under timm's name."""
        model = cast(Any, self.module)
        norm = model.layernorm if model.config.model_type in ("convnext", "convnextv2") else None
        return getattr(getattr(model, "pooler", None), "layernorm", norm)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The model's last hidden state."""
        model, arguments = cast(Any, self.module), {}
        if self.takes_patches:
            patches = patchify(pixels, self.patch_size or 16)
            rows = pixels.shape[-1] // (self.patch_size or 16)
            shape = torch.tensor([[rows, rows]], device=pixels.device).expand(len(pixels), -1)
            mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
            found = model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shape)
        elif model.main_input_name == "pixel_values_videos":
            frames = int(getattr(model.config, "tubelet_size", 2))
            found = model(pixel_values_videos=pixels.unsqueeze(1).expand(-1, frames, -1, -1, -1), skip_predictor=True)
        else:
            if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
                arguments = {"interpolate_pos_encoding": True}
            found = model(pixel_values=pixels, **arguments)
        tokens = getattr(found, "last_hidden_state", None)
        if tokens is None:
            what = f"transformers.{type(model).__name__} gives no last_hidden_state"
            raise ValueError(f"{what}; pass the model without a head, as transformers.AutoModel loads it.")
        if tokens.ndim == 3:
            side = pixels.shape[-1] // self.patch_size if self.patch_size else 0
            side = side if 0 < side**2 <= tokens.shape[1] else math.isqrt(tokens.shape[1])
            self.num_prefix_tokens = tokens.shape[1] - side**2
            self.cls_token = True if self.num_prefix_tokens else None
        return tokens


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
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or width % heads:
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


def _pixels(folder: Path, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel normalisation by the folder's image processor, else as given."""
    facts: Any = {}
    if (folder / "preprocessor_config.json").exists():
        facts = read_json(folder / "preprocessor_config.json", REMEDY)
    elif (folder / "processor_config.json").exists():
        facts = read_json(folder / "processor_config.json", REMEDY).get("image_processor")
    facts = facts if isinstance(facts, dict) else {}
    what = f"{folder}: image_mean and image_std of its image processor"
    mean, std = checked_pixels(facts.get("image_mean", mean), facts.get("image_std", std), what, REMEDY)
    scale = facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 1.0
    if not isinstance(scale, float) or not math.isclose(scale, 1 / 255, rel_tol=0.01):
        raise ValueError(f"{folder}: its image processor does not bring pixels to [0, 1]; use another model.")
    return (mean, std) if facts.get("do_normalize", True) else NO_CHANGE


def pixels_of(model: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Pixel normalisation of a model of transformers: by the image processor where it came from, else its kind's."""
    name = str(model.config.model_type).removesuffix("_vision_model").removesuffix("_visual_model")
    family = FAMILIES.get(name)
    known = (family.pixel_mean, family.pixel_std) if family else OTHERS.get(name)
    folder = Path(str(getattr(model, "name_or_path", "")) or ".nowhere")
    processed = any((folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor"))
    if processed or known:
        return _pixels(folder, *(known or IMAGENET))
    return None


def licence_of(folder: Path) -> str:
    """The licence in the front matter of the folder's README.md."""
    try:
        text = (folder / "README.md").read_bytes()[: 2**16].decode("utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = dict(re.findall(r"^(license(?:_name)?):[ \t]*['\"]?([\w.+-]+)", front[1], re.MULTILINE)) if front else {}
    return found.get("license_name") or found.get("license") or "unknown"
