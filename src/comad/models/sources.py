"""Where a teacher's weights come from: a file, an exported folder, timm, an installed package. Add one: see `find`."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from comad.models import efficientnet_lite
from comad.models.backbone import Backbone
from comad.models.checkpoints import FORMATS, build_vit, load_strictly, load_weights, read_checkpoint, read_file
from comad.models.timm_backbone import NotPlainError, TimmBackbone, create_vit
from comad.models.whole_backbone import WholeBackbone, create_whole

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
    if text and Path(text).exists():
        path = Path(text)
        name = path.absolute().name if path.is_dir() else path.name.split(".")[0]
    elif separator:
        path = Path(where)
        if not name or not where or not path.exists():
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
    if "." in request.name and timm.is_model(request.name):
        flat = read_file(path)
        if all(isinstance(value, Tensor) for value in flat.values()):
            config = _timm_config(request.name)
            return _timm(request, config, flat, str(path))._replace(source=path.name, sha256=_sha256(path))
    checkpoint, digest = read_checkpoint(path), _sha256(path)
    layout, name = FORMATS[checkpoint.format], request.name
    if checkpoint.format == "efficientnet-lite":
        architecture, weights = efficientnet_lite.renamed(checkpoint)
        loaded = _timm(request, _timm_config(architecture), weights, str(path))
        return loaded._replace(source=path.name, format=checkpoint.format, sha256=digest, licence=layout.licence)
    vit = build_vit(checkpoint, request.image_size, request.heads)
    mean, std = layout.pixel_mean, layout.pixel_std
    backbone = TimmBackbone(vit, mean, std, layout.token_types)
    return Source(name, backbone, path.name, checkpoint.format, "vit", digest, mean, std, layout.licence)


def _from_folder(folder: Path, request: Request) -> Source:
    """Load a folder as `timm.models.save_for_hf` writes it: ``config.json`` and ``model.safetensors``."""
    config, path = _read_config(folder), folder / "model.safetensors"
    arguments = {"in_chans": 3, **config.get("model_args", {})}
    unknown = arguments.keys() - inspect.signature(VisionTransformer).parameters.keys()
    if unknown or arguments["in_chans"] != 3:
        raise ValueError(f"{folder}: its model_args are not those of an RGB Vision Transformer: {sorted(arguments)}.")
    arguments = {key: value for key, value in arguments.items() if key not in ("img_size", "num_classes", "in_chans")}
    vit = create_vit(config["architecture"], request.image_size, **arguments)
    stored = {key: tensor for key, tensor in read_file(path).items() if not key.startswith("head.")}
    load_weights(vit, stored, str(path))
    facts, ours = config["pretrained_cfg"], config.get("comad", {})
    token_types = tuple(ours.get("token_types", _token_types(facts.get("tag"))))
    if not token_types or not set(token_types) <= {"cls", "patch"}:
        raise ValueError(f"{folder}: token_types in config.json are {token_types}; they may be 'cls' and 'patch'.")
    mean, std, name = tuple(facts["mean"]), tuple(facts["std"]), config["architecture"]
    source, licence = f"{folder.absolute().name}/{path.name}", ours.get("licence", _licence(facts))
    backbone = TimmBackbone(_with_norm(vit, str(folder)), mean, std, token_types)
    about = str(ours.get("about", ""))
    return Source(request.name, backbone, source, "export", name, _sha256(path), mean, std, licence, about)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of an exported folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no config.json in this folder; name a file, or an exported folder.") from error
    except ValueError as error:
        raise ValueError(f"{folder}: config.json is not JSON; export the folder again.") from error
    config = config if isinstance(config, dict) else {}
    parts = [config.get(key, {}) for key in ("pretrained_cfg", "model_args", "comad")]
    sound = all(isinstance(part, dict) for part in parts) and isinstance(config.get("architecture"), str)
    if not sound or any(len(parts[0].get(key, ())) != 3 for key in ("mean", "std")):
        raise ValueError(f"{folder}: config.json is not timm's: it needs architecture and pretrained_cfg mean and std.")
    return config


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
    name, cfg = config["architecture"], {"pretrained_cfg": config["tag"] or None, "pretrained": pretrained}
    mean, std, licence = tuple(config["mean"]), tuple(config["std"]), _licence(config)
    if weights is not None:
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(f"{config['classifier']}.")}
    try:
        vit = create_vit(name, request.image_size, **cfg)
        if weights is not None:
            load_weights(vit, weights, where)
        backbone: Backbone = TimmBackbone(_with_norm(vit, name), mean, std, _token_types(config["tag"]))
    except NotPlainError:
        network = create_whole(name, **cfg)
        if weights is not None:
            load_strictly(network, weights, where)
        backbone = WholeBackbone(network, mean, std, request.image_size, request.rows)
    full = ".".join(filter(None, (name, config["tag"])))
    network = next(backbone.children())
    digest = _sha256_of(network.state_dict())
    return Source(request.name, backbone, f"timm/{full}", "timm", full, digest, mean, std, licence)


def _with_norm(vit: VisionTransformer, what: str) -> VisionTransformer:
    """Refuse a network whose tokens are not normalised."""
    if not hasattr(vit.norm, "eps"):
        raise ValueError(f"{what}: its norm comes after pooling, so its tokens have none; use another model.")
    return vit


def _token_types(tag: str | None) -> tuple[str, ...]:
    """The trained tokens of timm's weights of that tag; MAE never trained its class token."""
    return ("patch",) if tag and tag.startswith("mae") else ("cls", "patch")


def _licence(config: Mapping[str, Any]) -> str:
    """The licence in timm's facts about weights, in the spelling of `FORMATS`."""
    licence = str(config.get("license") or "unknown")
    return {"cc-by-nc-4.0": "CC-BY-NC 4.0", "apache-2.0": "Apache-2.0"}.get(licence, licence)


def _sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(state: Mapping[str, Tensor]) -> str:
    """Hash names and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
