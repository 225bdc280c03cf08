"""Where a teacher's weights come from: a file, an exported folder, timm, an installed package. Add one: see `find`."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.models import efficientnet_lite, huggingface
from comad.models.backbone import Backbone
from comad.models.checkpoints import build, recognise
from comad.models.feature_map_backbone import FeatureMapBackbone, create_whole
from comad.models.files import read_file, read_json, sha256, sha256_of
from comad.models.formats import FORMATS
from comad.models.networks import gives_tokens, has_token_norm, load_weights
from comad.models.timm_backbone import NotPlainError, TimmBackbone, create_vit

BUNDLED = Path(__file__).parent / "bundled"
WAYS = "name a teacher by NAME=FILE_OR_FOLDER, by a bundled name, or by a timm model"
HEADS = re.compile(r"(.+):heads=(\d+)")


class Source(NamedTuple):
    """A loaded network, and what its own tensors cannot say; see `comad.models.teachers.TeacherCard`."""

    name: str
    backbone: Backbone
    source: str
    format: str
    architecture: str
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    about: str = ""


class Request(NamedTuple):
    """A teacher's name, and the images and the grid that it is wanted for; see `comad.models.teachers.load_teacher`."""

    name: str
    image_size: int
    rows: int | None
    heads: int | None = None


def bundled_teachers() -> tuple[str, ...]:
    """Names of the teachers that come with the package."""
    return tuple(sorted(config.parent.name for config in BUNDLED.glob("*/config.json")))


def find(spec: str, image_size: int, rows: int | None = None) -> Source:
    """Take a spec apart and load what it names; see `comad.models.teachers.load_teacher`."""
    found = HEADS.fullmatch(spec)
    text = found[1] if found else spec
    name, separator, where = text.partition("=")
    if text and os.path.exists(text):
        path = Path(text)
        name = path.absolute().name if path.is_dir() else path.name.split(".")[0]
    elif separator:
        path = Path(where)
        if not name or not where or not os.path.exists(where):
            raise ValueError(f"{spec!r}: no file or folder {where!r}; write NAME=FILE_OR_FOLDER, with a path to it.")
    elif text in bundled_teachers():
        path = BUNDLED / text
    elif text in efficientnet_lite.PACKAGES:
        path = efficientnet_lite.installed_file(text)
    elif "/" in text or text.endswith((".pth", ".pt", ".tar", ".bin", ".safetensors")):
        raise ValueError(f"{spec!r}: no such file or folder; check the path.")
    else:
        return _from_timm(Request(spec, image_size, rows))
    request = Request(name, image_size, rows, int(found[2]) if found else None)
    if path.is_dir() and not found:
        return _from_folder(path, request)
    return _from_file(path, request)


def _from_file(path: Path, request: Request) -> Source:
    """Load a checkpoint file: by its format, or as the timm model it is named after if it is flat."""
    is_named = "." in request.name and timm.is_model(request.name)
    if not is_named and not request.heads and _has_config(path):
        return _from_folder(path.parent, request, path.name)
    content, digest = read_file(path), sha256(path)
    flat = all(isinstance(value, Tensor) for value in content.values())
    if is_named and flat and not _is_original(content):
        config = _timm_config(request.name)
        return _timm(request, config, content, str(path))._replace(source=path.name, sha256=digest)
    checkpoint = recognise(content, str(path))
    layout = FORMATS[checkpoint.format]
    if checkpoint.format == "ibot/dino" and (path.suffix == ".safetensors" or timm.is_model(request.name)):
        raise ValueError(
            f"{path}: files of DINO and of timm's models without a head have the same keys; say which it is by "
            "TIMM_NAME.TAG=FILE, such as vit_base_patch16_224.dino=FILE or vit_base_patch16_224.augreg_in21k=FILE."
        )
    if checkpoint.format == "efficientnet-lite":
        architecture, weights = efficientnet_lite.renamed(checkpoint)
        loaded = _timm(request, _timm_config(architecture), weights, str(path))
        return loaded._replace(source=path.name, format=checkpoint.format, sha256=digest, licence=layout.licence)
    network, mean, std = build(checkpoint, request.image_size, request.heads), layout.pixel_mean, layout.pixel_std
    backbone = _backbone(network, mean, std, layout.token_types, request)
    return Source(
        request.name, backbone, path.name, checkpoint.format, layout.network, digest, mean, std, layout.licence
    )


def _has_config(path: Path) -> bool:
    """Whether a file lies where it was saved with the facts about it."""
    if path.name not in huggingface.FILES or not (path.parent / "config.json").is_file():
        return False
    config = read_json(path.parent / "config.json", "move the file to a folder of its own, or save it again")
    return huggingface.is_ours(config) or "architecture" in config


def _is_original(content: Mapping[str, Any]) -> bool:
    """Whether a flat file has its authors' names, which timm renames: then the format tells more than the name."""
    try:
        return FORMATS[recognise(content, "").format].convert is not None
    except ValueError:
        return False


def _from_folder(folder: Path, request: Request, file: str | None = None) -> Source:
    """Load a folder of transformers, or one as `timm.models.save_for_hf` writes it: ``config.json`` and weights."""
    config = read_json(folder / "config.json", "name a file, or an exported folder")
    if huggingface.is_ours(config):
        return _from_transformers(folder, config, request, file)
    _check_config(config, folder)
    path, facts, ours, name = (
        folder / (file or huggingface.weights_file(folder)),
        config["pretrained_cfg"],
        config.get("comad", {}),
        config["architecture"],
    )
    arguments = {"in_chans": 3, **config.get("model_args", {})}
    unknown = arguments.keys() - inspect.signature(VisionTransformer).parameters.keys()
    if unknown or arguments["in_chans"] != 3:
        raise ValueError(f"{folder}: its model_args are not those of an RGB Vision Transformer: {sorted(arguments)}.")
    arguments = {key: value for key, value in arguments.items() if key not in ("img_size", "num_classes", "in_chans")}
    stored = _without_classifier(read_file(path), facts)
    source, licence = f"{folder.absolute().name}/{path.name}", ours.get("licence", _licence(facts))
    try:
        vit = create_vit(name, request.image_size, **arguments)
    except NotPlainError:
        whole = {"tag": None, **facts, "architecture": name}
        loaded = _timm(request, whole, stored, str(path))
        return loaded._replace(source=source, format="export", sha256=sha256(path), licence=licence)
    _refuse_other_activation(name, facts)
    load_weights(vit, stored, str(path))
    token_types = tuple(ours.get("token_types", _token_types(facts.get("tag"))))
    if not token_types or not set(token_types) <= {"cls", "patch"}:
        raise ValueError(f"{folder}: token_types in config.json are {token_types}; they may be 'cls' and 'patch'.")
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    backbone = TimmBackbone(_with_norm(vit, str(folder)), mean, std, token_types)
    about = str(ours.get("about", ""))
    return Source(request.name, backbone, source, "export", name, sha256(path), mean, std, licence, about)


def _from_transformers(folder: Path, config: Mapping[str, Any], request: Request, file: str | None) -> Source:
    """Load a folder that ``save_pretrained`` of transformers wrote."""
    network, path, family, mean, std, token_types, licence = huggingface.load_folder(
        folder, config, request.image_size, file
    )
    backbone = _backbone(network, mean, std, token_types, request)
    source = f"{folder.absolute().name}/{path.name}"
    licence = _licence({"license": licence})
    return Source(request.name, backbone, source, "transformers", family, sha256(path), mean, std, licence)


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a ``config.json`` that is not timm's."""
    parts = [config.get(key, {}) for key in ("pretrained_cfg", "model_args", "comad")]
    sound = all(isinstance(part, dict) for part in parts) and isinstance(config.get("architecture"), str)
    if not sound or any(not _is_triple(parts[0].get(key)) for key in ("mean", "std")):
        raise ValueError(f"{folder}: config.json is not timm's: it needs architecture and pretrained_cfg mean and std.")


def _is_triple(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)


def _from_timm(request: Request) -> Source:
    """Build a timm model, with its pretrained weights or with random ones."""
    name, _, suffix = request.name.partition(":")
    if suffix not in ("", "random"):
        raise ValueError(f"{request.name!r}: unknown suffix {suffix!r}; the only one is :random, as in {name}:random.")
    config = _timm_config(name)
    loaded = _timm(request, config)
    if suffix:
        facts = {"source": "seed 0", "architecture": config["architecture"], "licence": "none (random weights)"}
        return loaded._replace(**facts)
    try:
        return _timm(request, config, pretrained=True)
    except Exception as error:  # every version of the hub client has its own error for a missing network
        raise ValueError(f"{name}: timm cannot get its weights; pass {name}=FILE or {name}:random.") from error


def _timm_config(name: str) -> dict[str, Any]:
    """Timm's facts about the weights behind a name."""
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    except RuntimeError:  # the model is known, the tag is not
        config = None
    if config is None:
        known = [*bundled_teachers(), *efficientnet_lite.PACKAGES]
        known += [*timm.list_models("*vit*"), *timm.list_models("*vit*", pretrained=True)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ValueError(f"unknown teacher {name!r}; " + (f"near: {', '.join(near)}; " if near else "") + f"{WAYS}.")
    return config.to_dict()


def _timm(
    request: Request,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    where: str = "",
    pretrained: bool = False,
) -> Source:
    """Build the model of timm's facts: with the given weights, with timm's own, or with random ones."""
    name, tag = config["architecture"], None if weights is not None else config["tag"] or None
    cfg = {"pretrained_cfg": tag, "pretrained": pretrained}
    mean, std, licence = tuple(config["mean"]), tuple(config["std"]), _licence(config)
    if weights is not None or pretrained:
        _refuse_other_activation(name, config)
    network = _create(name, request.image_size, cfg)
    if weights is not None:
        weights = _without_classifier(weights, config)
        if gives_tokens(network) and not has_token_norm(network) and "norm.weight" in weights:
            network = _create(name, request.image_size, {**cfg, "global_pool": ""})  # a file from before fine-tuning
        load_weights(network, weights, where)
    if gives_tokens(network):
        _with_norm(network, name)
    digest = sha256_of(network.state_dict())
    backbone = _backbone(network, mean, std, _token_types(config["tag"]), request)
    full = ".".join(filter(None, (name, config["tag"])))
    return Source(request.name, backbone, f"timm/{full}", "timm", full, digest, mean, std, licence)


def _without_classifier(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Weights but for those of the classifier, or of each if timm's facts name several."""
    named = config.get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    return {key: tensor for key, tensor in weights.items() if not key.startswith(heads)}


def _create(name: str, image_size: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a timm model: at its image size if it is a plain Vision Transformer, else as timm has it."""
    try:
        return create_vit(name, image_size, **arguments)
    except NotPlainError:
        return create_whole(name, **arguments)


def _backbone(
    network: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    token_types: tuple[str, ...],
    request: Request,
) -> Backbone:
    """The kind of backbone that suits a network."""
    if isinstance(network, VisionTransformer):
        return TimmBackbone(network, mean, std, token_types)
    return FeatureMapBackbone(network, mean, std, request.image_size, request.rows, token_types)


def _refuse_other_activation(name: str, config: Mapping[str, Any]) -> None:
    """Refuse weights whose facts say that the named network has another activation than they were trained with."""
    if "QuickGELU" in str(config.get("notes")) and "quickgelu" not in name:
        better = f"{name.replace('_clip_', '_clip_quickgelu_')}.{config.get('tag')}"
        raise ValueError(f"{name}.{config.get('tag')}: was trained with QuickGELU; pass {better}=FILE instead.")


def _with_norm(network: nn.Module, what: str) -> Any:
    """Refuse a network whose tokens are not normalised."""
    if not has_token_norm(network):
        raise ValueError(f"{what}: its norm comes after pooling, so its tokens have none; use another model.")
    return network


def _token_types(tag: str | None) -> tuple[str, ...]:
    """The trained tokens of timm's weights of that tag; masked images alone train no class token."""
    return ("patch",) if tag and tag.startswith(("mae", "mim")) else ("cls", "patch")


def _licence(config: Mapping[str, Any]) -> str:
    """The licence in timm's facts about weights, in the spelling of `FORMATS`."""
    licence = str(config.get("license") or "unknown")
    return {"cc-by-nc-4.0": "CC-BY-NC 4.0", "apache-2.0": "Apache-2.0"}.get(licence, licence)
