"""Frozen teachers by name or by file, each with a card that says exactly what was loaded."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.models.backbone import Backbone
from comad.models.checkpoints import FORMATS, build_vit, load_weights, read_checkpoint, read_file
from comad.models.timm_backbone import TimmBackbone, create_vit

BUNDLED = Path(__file__).parent / "bundled"
WAYS = "name a teacher by NAME=FILE_OR_FOLDER, by a bundled name, or by a timm model"
HEADS = re.compile(r"(.+):heads=(\d+)")


@dataclass(frozen=True)
class TeacherCard:
    """What a teacher is: printed, kept with the run and with every student, and compared at resume.

    Attributes:
        name: what the run calls it.
        source: name of the file, or of the folder and its file; no absolute path.
        format: a key of `comad.models.checkpoints.FORMATS`, or ``export`` for a folder.
        architecture: a timm name, or ``vit`` if the shapes in the file say it all.
        sha256: of the weights file; of the names and bytes of the tensors if timm fetched or drew them.
        depth, width, heads, patch_size, num_prefix_tokens: the network; patch size in pixels.
        norm_eps: epsilon of the final norm.
        pixel_mean, pixel_std: pixel normalisation, in units of [0, 1] pixels.
        token_types: tokens that were trained, and so can be trusted.
        licence: of the weights, as far as known.
        params: number of parameters.
    """

    name: str
    source: str
    format: str
    architecture: str
    sha256: str
    depth: int
    width: int
    heads: int
    patch_size: int
    num_prefix_tokens: int
    norm_eps: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    token_types: tuple[str, ...]
    licence: str
    params: int

    def as_dict(self) -> dict[str, Any]:
        """The card in JSON's types: it equals itself after a round trip through a file."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def summary(self) -> str:
        """The card on one line."""
        shape = f"depth {self.depth}, width {self.width}, {self.heads} heads, patch {self.patch_size}"
        tokens = "+".join(self.token_types)
        return (
            f"{self.name}: {self.format} {self.architecture}, {shape}, tokens {tokens}, "
            f"{self.params / 1e6:.1f}M parameters, {self.licence}, {self.source}, sha256 {self.sha256[:12]}"
        )


class Teacher(NamedTuple):
    """A frozen network, its name in the run, and its card."""

    name: str
    backbone: Backbone
    card: TeacherCard


class Weights(NamedTuple):
    """A loaded network, and what its own tensors cannot say."""

    vit: VisionTransformer
    source: str
    format: str
    architecture: str
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    token_types: tuple[str, ...]
    licence: str


def load_teacher(spec: str, image_size: int, dtype: torch.dtype = torch.float32) -> Teacher:
    """Load a teacher, frozen and in eval mode. The random state of the caller is left alone.

    Args:
        spec: one of ``NAME=FILE_OR_FOLDER``, a bare path, a name of `bundled_teachers`, a timm model (its pretrained
            weights), a timm model and ``:random`` (seeded, for benchmarks). ``TIMM_NAME.TAG=FILE`` reads a flat file
            as that model; ``NAME=FILE:heads=N`` gives the heads of a width without a rule.
        image_size: pixels on the side of the square images to come; positions are resampled to it.
        dtype: of the weights; pixels are normalised in float32 in any case.

    Raises:
        ValueError: the name is unknown, the file is unreadable or does not fit, or the image size is no multiple of
            the patch size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        name, weights = _find(spec, image_size)
    if not hasattr(weights.vit.norm, "eps"):
        raise ValueError(f"{spec}: its norm comes after pooling, so its tokens have none; use another model.")
    backbone = TimmBackbone(weights.vit, weights.mean, weights.std, weights.token_types)
    if image_size % (patch := backbone.patch_size):
        fit = f"use {max(1, round(image_size / patch)) * patch}"
        raise ValueError(f"{spec}: {image_size} pixels are no multiple of its {patch}-pixel patch; {fit}.")
    backbone.vit.to(dtype)
    return Teacher(name, backbone.requires_grad_(False).eval(), _card(name, weights, backbone))


def bundled_teachers() -> tuple[str, ...]:
    """Names of the teachers that come with the package."""
    return tuple(sorted(config.parent.name for config in BUNDLED.glob("*/config.json")))


def licence_notice(teachers: Sequence[Teacher]) -> str:
    """One line that names the teachers under non-commercial licences; empty if there are none."""
    bound = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
    names = [f"{name} ({card.licence})" for name, _, card in teachers if bound.search(card.licence)]
    if not names:
        return ""
    return f"Non-commercial weights: {', '.join(names)}. Their licences travel with every student distilled from them."


def _card(name: str, weights: Weights, backbone: TimmBackbone) -> TeacherCard:
    """Write down what was loaded."""
    vit = weights.vit
    return TeacherCard(
        name=name,
        source=weights.source,
        format=weights.format,
        architecture=weights.architecture,
        sha256=weights.sha256,
        depth=len(vit.blocks),
        width=backbone.width,
        heads=cast(Any, vit.blocks[0]).attn.num_heads,
        patch_size=backbone.patch_size,
        num_prefix_tokens=vit.num_prefix_tokens,
        norm_eps=cast(nn.LayerNorm, vit.norm).eps,
        pixel_mean=weights.mean,
        pixel_std=weights.std,
        token_types=backbone.token_types,
        licence=weights.licence,
        params=sum(parameter.numel() for parameter in vit.parameters()),
    )


def _find(spec: str, image_size: int) -> tuple[str, Weights]:
    """Take a spec apart and load what it names."""
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
    elif "/" in text or text.endswith((".pth", ".pt", ".tar", ".bin", ".safetensors")):
        raise ValueError(f"{spec!r}: no such file or folder; check the path.")
    else:
        return spec, _from_timm(spec, image_size)
    if path.is_dir() and not found:
        return name, _from_folder(path, image_size)
    return name, _from_file(path, name, image_size, int(found[2]) if found else None)


def _from_file(path: Path, name: str, image_size: int, heads: int | None) -> Weights:
    """Load a checkpoint file: by its format, or as the timm model it is named after if it is flat."""
    checkpoint, digest = read_checkpoint(path), _sha256(path)
    layout = FORMATS[checkpoint.format]
    if not layout.container and "." in name and timm.is_model(name):
        config = _timm_config(name)
        vit = create_vit(config["architecture"], image_size)
        load_weights(vit, checkpoint.weights, checkpoint.source)
        return _timm_weights(vit, config)._replace(source=path.name, sha256=digest)
    vit = build_vit(checkpoint, image_size, heads)
    pixels = (layout.pixel_mean, layout.pixel_std)
    return Weights(vit, path.name, checkpoint.format, "vit", digest, *pixels, layout.token_types, layout.licence)


def _from_folder(folder: Path, image_size: int) -> Weights:
    """Load a folder as `timm.models.save_for_hf` writes it: ``config.json`` and ``model.safetensors``."""
    config, path = _read_config(folder), folder / "model.safetensors"
    arguments = {"in_chans": 3, **config.get("model_args", {})}
    unknown = arguments.keys() - inspect.signature(VisionTransformer).parameters.keys()
    if unknown or arguments["in_chans"] != 3:
        raise ValueError(f"{folder}: its model_args are not those of an RGB Vision Transformer: {sorted(arguments)}.")
    arguments = {key: value for key, value in arguments.items() if key not in ("img_size", "num_classes", "in_chans")}
    vit = create_vit(config["architecture"], image_size, **arguments)
    stored = {key: tensor for key, tensor in read_file(path).items() if not key.startswith("head.")}
    load_weights(vit, stored, str(path))
    facts, ours = config["pretrained_cfg"], config.get("comad", {})
    token_types = tuple(ours.get("token_types", _token_types(facts.get("tag"))))
    if not token_types or not set(token_types) <= {"cls", "patch"}:
        raise ValueError(f"{folder}: token_types in config.json are {token_types}; they may be 'cls' and 'patch'.")
    source, licence = f"{folder.absolute().name}/{path.name}", ours.get("licence", _licence(facts))
    pixels, name = (tuple(facts["mean"]), tuple(facts["std"])), config["architecture"]
    return Weights(vit, source, "export", name, _sha256(path), *pixels, token_types, licence)


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


def _from_timm(text: str, image_size: int) -> Weights:
    """Build a timm model, with its pretrained weights or with random ones."""
    name, _, suffix = text.partition(":")
    if suffix not in ("", "random"):
        raise ValueError(f"{text!r}: unknown suffix {suffix!r}; the only one is :random, as in {name}:random.")
    config = _timm_config(name)
    architecture, tag = config["architecture"], config["tag"] or None
    vit = create_vit(architecture, image_size, pretrained_cfg=tag)
    if suffix:
        facts = {"source": "seed 0", "architecture": architecture, "licence": "none (random weights)"}
        return _timm_weights(vit, config)._replace(**facts)
    try:
        vit = create_vit(architecture, image_size, pretrained=True, pretrained_cfg=tag)
    except Exception as error:  # every version of the hub client has its own error for a missing network
        raise ValueError(f"{name}: timm cannot get its weights; pass {name}=FILE or {name}:random.") from error
    return _timm_weights(vit, config)


def _timm_config(name: str) -> dict[str, Any]:
    """Timm's facts about the weights behind a name."""
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    except RuntimeError:  # the model is known, the tag is not
        config = None
    if config is None:
        known = [*bundled_teachers(), *timm.list_models("*vit*"), *timm.list_models("*vit*", pretrained=True)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ValueError(f"unknown teacher {name!r}; " + (f"near: {', '.join(near)}; " if near else "") + f"{WAYS}.")
    return config.to_dict()


def _timm_weights(vit: VisionTransformer, config: Mapping[str, Any]) -> Weights:
    """The facts of a timm model about its weights."""
    name = ".".join(filter(None, (config["architecture"], config["tag"])))
    pixels, digest = (tuple(config["mean"]), tuple(config["std"])), _sha256_of(vit.state_dict())
    return Weights(vit, f"timm/{name}", "timm", name, digest, *pixels, _token_types(config["tag"]), _licence(config))


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
