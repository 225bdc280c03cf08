"""A folder with weights, config and model card that is loaded without comad: by timm and transformers, or torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.exporting import programs
from comad.exporting.card import ModelCard, model_card
from comad.exporting.encoder import Preprocessing, pool_of, preprocessing_of
from comad.exporting.formats import Graph, timm_outputs
from comad.models.backbone import Backbone, Pool, pooled
from comad.models.feature_map_backbone import FeatureMapBackbone
from comad.models.files import read_json, sha256
from comad.models.huggingface import TransformersFeatures, weights_file
from comad.models.networks import KINDS, gives_tokens, is_of_maps, norm_after_pooling
from comad.models.teachers import load_teacher
from comad.models.timm_backbone import TimmBackbone
from comad.models.torchvision_features import PREFIX, TorchvisionFeatures
from comad.runtime.atomic import check_name, replacing
from comad.runtime.seal import sealed

__all__ = ["ModelCard", "export_backbone", "programs_of", "verify_export", "write_timm"]

TOLERANCE = 1e-4
"""Largest difference between the tokens of a float32 export and of the backbone, relative to the largest above 1."""
HALF_TOLERANCE = 2e-2
"""Largest difference for a 16-bit export, relative to the largest token value."""


def export_backbone(
    backbone: Backbone,
    folder: Path,
    *,
    model_args: dict[str, Any],
    card: ModelCard,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads offline, and verify it.

    Of a network that is not timm's it is transformers' own folder, or holds its state dict. The folder holds
    ``model.safetensors``, ``config.json`` (with the card under the key ``comad``) and ``README.md``. It is written
    beside its place and renamed when it is verified; an earlier export at its place is replaced. Of a Vision
    Transformer ``model(images)`` then gives the class token, or the mean of the patches if the class token carries no
    meaning.

    Args:
        backbone: the network, on any device; left as it is.
        folder: where to.
        model_args: arguments that make ``card.architecture`` this network: ``{"img_size": 48, "patch_size": 8, …}``.
        card: about the model.
        dtype: of the weights in the file.

    Raises:
        ValueError: timm knows no such architecture, or the place is taken by something else than an export.
        RuntimeError: what is loaded does not give the same tokens as the backbone; nothing is written.
    """
    module = module_of(backbone)
    if module is None:
        check_architecture(card.architecture)
    check_place(folder)
    with replacing(folder) as partial:
        if module is None:
            card = write_timm(backbone, partial, model_args=model_args, card=card, dtype=dtype)
        else:
            card = write_module(backbone, module, partial, card)
        text = model_card(card, programs_of(backbone, Path(folder.name), card))
        (partial / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        if module is None:
            verify_export(backbone, partial, dtype)
        else:
            verify_module(backbone, partial)
    return folder


def module_of(backbone: Backbone) -> nn.Module | None:
    """The network inside a backbone as its authors made it; None if that is timm's."""
    network = next(backbone.children())
    if isinstance(inner := getattr(network, "module", None), nn.Module):
        return inner
    return None if isinstance(backbone, TimmBackbone | FeatureMapBackbone) else backbone


def write_module(backbone: Backbone, module: nn.Module, folder: Path, card: ModelCard) -> ModelCard:
    """Write a network that is not timm's: by its ``save_pretrained``, else its state dict and what is known of it."""
    own = cast(Any, copy.deepcopy(module).cpu().to(memory_format=torch.contiguous_format))
    config, pixels, size = folder / "config.json", preprocessing_of(backbone, card.eval_crop), backbone.image_size
    if hasattr(own, "save_pretrained"):
        own.save_pretrained(folder)
        processor = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": pixels.shorter},
            "crop_size": {"height": size, "width": size},
            "image_mean": list(pixels.mean),
            "image_std": list(pixels.std),
            "resample": 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.clone() for key, value in own.state_dict().items() if isinstance(value, Tensor)}
        save_file(tensors, folder / "model.safetensors")
        config.write_text(json.dumps({"architecture": card.architecture, "num_classes": 0}), encoding="utf-8")
    card = replace(card, sha256=sha256(folder / weights_file(folder)))
    content = json.loads(config.read_text(encoding="utf-8"))
    content |= {"pretrained_cfg": _pretrained_cfg(backbone, module, card), "comad": asdict(card)}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return card


def verify_module(backbone: Backbone, folder: Path) -> None:
    """Load what `write_module` wrote, and compare its tokens of a random image with the backbone's.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE`.
    """
    network = copy.deepcopy(backbone).cpu().eval()
    image = torch.rand(1, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))
    again = copy.deepcopy(network)
    module = cast(nn.Module, module_of(again))
    if hasattr(module, "save_pretrained"):
        again = load_teacher(f"student={folder}", backbone.image_size).backbone
    else:
        for tensor in module.state_dict().values():
            tensor.zero_()
        module.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.inference_mode():
        expected, found = network(image).patches, again(image).patches
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"the export at {folder} gives other tokens than the model: {difference:.2e}.")


def write_timm(
    backbone: Backbone,
    folder: Path,
    *,
    model_args: dict[str, Any],
    card: ModelCard,
    dtype: torch.dtype = torch.float32,
    head: tuple[nn.Linear, Pool] | None = None,
) -> ModelCard:
    """Write ``model.safetensors`` and ``config.json``; see `export_backbone`.

    Args:
        head: a linear head on a pool of the tokens, for the classes ``card.labels``.

    Returns:
        The card with the hash of the weights.

    Raises:
        ValueError: the network has no place for this head.
    """
    network = timm_network(backbone, head)
    network.to(dtype).to(memory_format=torch.contiguous_format)  # as safetensors wants it
    arguments = timm_arguments(backbone, model_args, head[1] if head else pool_of(backbone))
    save_for_hf(network, str(folder), model_args=arguments, safe_serialization=True)
    card = replace(card, sha256=sha256(folder / "model.safetensors"))
    _complete_config(folder / "config.json", _pretrained_cfg(backbone, network, card), card)
    return card


def verify_export(backbone: Backbone, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Load a folder by timm and compare the tokens of a random image, and what they are pooled to, with the backbone's.

    Raises:
        RuntimeError: they differ by more than `TOLERANCE`, or in 16 bits by more than `HALF_TOLERANCE`.
    """
    network = copy.deepcopy(backbone).cpu().float().eval()
    side = backbone.image_size
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    model = cast(Any, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    config, graph = resolve_model_data_config(model), timm_facts(network, preprocessing_of(network, 1.0))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        tokens, pixels = network(image), (image - mean) / std
        pairs = [
            (x, y)
            for x, y in zip(
                [pooled(tokens, pool_of(backbone)), tokens.patches], timm_outputs(model, pixels, graph), strict=True
            )
        ]
        if isinstance(model, tuple(KINDS.values())) or graph.norm:  # what a user of timm gets by calling it
            pairs.append((pairs[0][0], model(pixels)))
    difference = max((a - b).abs().max().item() if a.shape == b.shape else float("inf") for a, b in pairs)
    largest = max(a.abs().max().item() for a, _ in pairs)
    limit = TOLERANCE * max(1.0, largest) if dtype == torch.float32 else HALF_TOLERANCE * largest
    if not difference <= limit:  # so that NaN fails too
        raise RuntimeError(f"the export at {folder} gives other tokens than the model: {difference:.2e} > {limit:.2e}.")


def programs_of(backbone: Backbone, folder: Path, card: ModelCard) -> Sequence[tuple[str, str]]:
    """The ways to use the folder of a backbone without comad, with their titles."""
    graph = replace(timm_facts(backbone, preprocessing_of(backbone, card.eval_crop)), labels=card.labels)
    module = module_of(backbone)
    if module is None:
        return both_programs(graph, str(folder))
    if hasattr(module, "save_pretrained"):
        return both_programs(graph, str(folder))[1:]
    if card.architecture.startswith(PREFIX):
        network = cast(TorchvisionFeatures, next(backbone.children()))
        return [("With torchvision", programs.torchvision(graph, str(folder), card.architecture, network.layers))]
    return [("With its own class", programs.own(graph, str(folder)))]


def both_programs(graph: Graph, folder: str) -> Sequence[tuple[str, str]]:
    """The ways to use timm's folder, with their titles."""
    file = "model.safetensors"
    return [
        ("With timm", programs.timm(graph, folder, file)),
        ("With transformers", programs.transformers(graph, folder, file)),
    ]


def timm_facts(backbone: Backbone, preprocessing: Preprocessing) -> Graph:
    """A graph without a module: how timm's output is read."""
    network = cast(Any, next(backbone.children()))
    norm = norm_after_pooling(network)
    return Graph(
        module=nn.Identity(),
        outputs=("feature", "patches"),
        preprocessing=preprocessing,
        num_prefix_tokens=network.num_prefix_tokens
        if gives_tokens(network) or isinstance(network, TransformersFeatures)
        else None,
        channels_last=getattr(network, "output_fmt", "NCHW") == "NHWC" and not getattr(backbone, "by_intermediates", 0),
        features=getattr(backbone, "features_call", "forward_features({})"),
        norm=norm,
        norm_of_maps=bool(norm) and is_of_maps(network.get_submodule(norm)),
        pool=pool_of(backbone),
    )


def check_architecture(name: str) -> None:
    """Refuse a network that timm does not know.

    Raises:
        ValueError: it does not.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r}; give the name the student was built by.")


def check_place(folder: Path) -> None:
    """Refuse a place that is taken by something else than an export.

    Raises:
        ValueError: it is, or its name is no UTF-8.
    """
    check_name(folder, "--out")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config, rows = folder / "config.json", folder / "exports.json"
    if rows.is_file() or (config.is_file() and "comad" in read_json(config, "name another folder")):
        return
    raise ValueError(f"{folder} exists and is not an export of comad; name another folder.")


TIMM_POOL: dict[Pool, str] = {"cls": "token", "patch": "avg"}


def timm_network(backbone: Backbone, head: tuple[nn.Linear, Pool] | None = None) -> Any:
    """A copy of timm's network that pools what carries meaning, with a head in the place of its own.

    Raises:
        ValueError: it has no place for this head.
    """
    network = cast(Any, copy.deepcopy(next(backbone.children()))).cpu()
    linear, pool = head or (None, pool_of(backbone))
    classes = 0 if linear is None else linear.out_features
    if _pools_as_told(network):
        network.reset_classifier(classes, TIMM_POOL[pool])
    else:
        network.reset_classifier(classes)
    if linear is not None:
        own = network.get_classifier()
        if not isinstance(own, nn.Linear) or own.weight.shape != linear.weight.shape or linear.bias is None:
            raise ValueError(f"{type(network).__name__} has no such linear classifier in timm.")
        own.load_state_dict(linear.state_dict())
    return network


def timm_arguments(backbone: Backbone, model_args: dict[str, Any], pool: Pool) -> dict[str, Any]:
    """Timm's arguments of a network that pools so; the norm stays before the pool, as in the backbone."""
    network = next(backbone.children())
    arguments = {key: value for key, value in model_args.items() if key not in ("num_classes", "in_chans")}
    if _pools_as_told(network) and cast(Any, network).global_pool != TIMM_POOL[pool]:
        norm = "fc_norm" if isinstance(network, VisionTransformer) else "use_fc_norm"
        arguments |= {"global_pool": TIMM_POOL[pool], norm: False}
    return arguments


def _pools_as_told(network: nn.Module) -> bool:
    """Whether timm can be told what a Transformer's classifier sees, with the norm before it."""
    return isinstance(network, tuple(KINDS.values())) and not norm_after_pooling(network)


def _pretrained_cfg(backbone: Backbone, network: nn.Module, card: ModelCard) -> dict[str, Any]:
    """Describe our weights, and none of the origin, licence and labels that timm keeps for its own weights."""
    known, pixels = getattr(network, "pretrained_cfg", None) or {}, preprocessing_of(backbone, card.eval_crop)
    fixed = not network.dynamic_img_size if isinstance(network, VisionTransformer) else known.get("fixed_input_size")
    return {
        "input_size": [3, backbone.image_size, backbone.image_size],
        "fixed_input_size": bool(fixed),
        "interpolation": pixels.interpolation,
        "crop_pct": card.eval_crop,
        "crop_mode": "center",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "num_classes": len(card.labels),
        "pool_size": known.get("pool_size"),
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "license": card.licence,
    }


def _complete_config(path: Path, pretrained_cfg: dict[str, Any], card: ModelCard) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("num_classes", "in_chans"):  # transformers passes these itself and fails if they come twice
        config["model_args"].pop(key, None)
    config |= {"architecture": card.architecture, "num_classes": len(card.labels), "pretrained_cfg": pretrained_cfg}
    if card.labels:
        config["label_names"] = list(card.labels)
    config["comad"] = asdict(card)
    path.write_text(json.dumps(sealed(config), indent=2) + "\n", encoding="utf-8")
