"""Where a teacher's weights come from: a file, an exported folder, timm, an installed package. Add one: see `find`."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from comad.models import efficientnet_lite, huggingface
from comad.models.backbone import Backbone
from comad.models.checkpoints import Checkpoint, build, explained, recognise, unwrappings
from comad.models.feature_map_backbone import FeatureMapBackbone, ModuleFeatures, create_whole, stride_and_size
from comad.models.files import checked_pixels, read_file, read_json, sha256, sha256_of
from comad.models.formats import FORMATS, POSITION_RULES
from comad.models.networks import (
    OWN_SIZE,
    check_shapes,
    gives_tokens,
    has_token_norm,
    load_strictly,
    load_weights,
    position_rule,
    stored_size,
    without_classifier,
)
from comad.models.timm_backbone import NotPlainError, TimmBackbone, create_vit, takes_size
from comad.models.torchvision_features import PREFIX, TorchvisionFeatures, torchvision_network
from comad.runtime.seal import is_intact

Size = int | Literal["grid"] | None
"""Pixels on the side of a teacher's images; "grid": as many as give it the wanted grid; None: as it was made for."""
BUNDLED = Path(__file__).parent / "bundled"
WAYS = "name a teacher by NAME=FILE_OR_FOLDER, by a bundled name, or by a timm model"
OPTION = re.compile(r"(.+):(?:(heads|depth|size)=([^:=/]*)|(allow_changed))", re.DOTALL)
OPTIONS = "options are :depth=BLOCK, :size=PIXELS (or own, or grid), :heads=N and :allow_changed"
FILE_ENDS = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".json", ".py")
WEIGHTS = {name + end for name in huggingface.FILES for end in ("", huggingface.INDEX)}
OWN_FORWARD = POSITION_RULES["none"]
TIMM_WRAPPER = "timm_model."
"""What transformers' TimmWrapperModel puts before every key."""
TOO_LARGE = 16384


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
    positions: str = ""
    unwrapped: tuple[str, ...] = ()


class Request(NamedTuple):
    """A teacher's name, and what it is wanted for.

    Attributes:
        name: what the run calls it.
        size: pixels on the side of its images, see `Size`.
        rows: the grid that its patches are brought to; None keeps its own.
        heads: number of attention heads of a file that does not say it.
        depth: number of the block that is read in place of the last one.
        allow_changed: weights may differ from those whose hash is recorded beside them.
    """

    name: str
    size: Size
    rows: int | None
    heads: int | None = None
    depth: int | None = None
    allow_changed: bool = False

    def side(self, patch_size: int, own_size: int, largest: int | None = None) -> int:
        """Pixels on the side of the images to come, for a network with patches, or strides, of ``patch_size``.

        Raises:
            ValueError: the size that was asked for is no multiple of the patch.
        """
        patch_size = max(1, patch_size)
        if self.size == "grid":
            side = (self.rows or OWN_SIZE // patch_size) * patch_size
            return min(side, largest) if largest else side
        if self.size is None and largest:  # a map has as many cells as the image gives
            return own_size
        if self.size is None:
            return max(1, round(own_size / patch_size)) * patch_size
        if not largest and self.size % patch_size:
            fit = f"use {max(1, round(self.size / patch_size)) * patch_size}"
            what = f"{self.size} pixels are no multiple of its {patch_size}-pixel patch"
            raise ValueError(f"{self.name}: {what}; {fit}.")
        return self.size


def bundled_teachers() -> tuple[str, ...]:
    """Names of the teachers that come with the package."""
    return tuple(sorted(config.parent.name for config in BUNDLED.glob("*/config.json")))


def take_options(spec: str, size: Size, rows: int | None, allow_changed: bool = False) -> tuple[str, Request]:
    """Take the options from the end of a teacher's name, and give what is left.

    Raises:
        ValueError: an option has no sense.
    """
    text, request = spec, Request("", size, rows, allow_changed=allow_changed)
    while (found := OPTION.fullmatch(text)) and not os.path.exists(text):
        text, option, value, flag = found.groups()
        if flag:
            request = request._replace(allow_changed=True)
        elif option == "size" and value in ("own", "grid"):
            request = request._replace(size=None if value == "own" else "grid")
        elif not value.isdecimal() or not 0 < int(value) <= TOO_LARGE:
            raise ValueError(f"{spec!r}: {option}={value} is no number from 1 to {TOO_LARGE}; {OPTIONS}.")
        else:
            request = request._replace(**{option: int(value)})
    return text, checked(request._replace(name=spec))._replace(name="")


def checked(request: Request) -> Request:
    """The same, of a size that images can have.

    Raises:
        ValueError: they are too small or too large.
    """
    if isinstance(request.size, int) and not 0 < request.size <= TOO_LARGE:
        raise ValueError(f"{request.name}: images of {request.size} pixels are too small or too large; use 224 or so.")
    return request


def find(spec: str, size: Size, rows: int | None = None, allow_changed: bool = False) -> Source:
    """Take a spec apart and load what it names; see `comad.models.teachers.load_teacher`."""
    text, request = take_options(spec, size, rows, allow_changed)
    name, separator, where = text.partition("=")
    if text and os.path.exists(text):
        path = Path(text)
        name = path.absolute().name if path.is_dir() else path.name.split(".")[0]
    elif separator:
        path = Path(where)
        if not name or not where or not os.path.exists(where):
            what = f"{spec!r}: no file or folder {where!r}; write NAME=FILE_OR_FOLDER, with a path to it"
            raise ValueError(f"{what}; {OPTIONS}." if ":" in where else f"{what}.")
    elif text in bundled_teachers():
        path, name = BUNDLED / text, text
    elif text in efficientnet_lite.PACKAGES:
        path, name = efficientnet_lite.installed_file(text), text
    elif "/" in text or text.endswith(FILE_ENDS):
        raise ValueError(f"{spec!r}: no such file or folder; check the path.")
    elif request.heads:
        raise ValueError(f"{spec!r}: heads=N is for files; of a timm model the only suffix is :random.")
    else:
        return _cut(_from_timm(request._replace(name=text)), request)
    request, path = request._replace(name=name), left_by_run(path)
    found = _from_folder(path, request) if path.is_dir() and not request.heads else _from_file(path, request)
    return _cut(found, request)


def left_by_run(path: Path) -> Path:
    """What a run left, if that is the folder of one; else the path itself."""
    if path.is_dir() and not (path / "config.json").is_file():
        return next((path / name for name in ("student", "teacher") if (path / name / "config.json").is_file()), path)
    return path


def _cut(source: Source, request: Request) -> Source:
    """Leave out the blocks behind the one that is read, and bring the patches to the wanted grid."""
    backbone = source.backbone
    if request.depth is not None:
        cut_blocks(backbone, request.depth, source.name)
    if request.rows:
        backbone.resample_to(request.rows)
    return source


def cut_blocks(backbone: Backbone, depth: int, name: str) -> None:
    """Let the final norm follow block ``depth``, numbered from 1; the others go.

    Raises:
        ValueError: the network has no row of blocks, or fewer.
    """
    network = cast(Any, next(backbone.children()))
    if not gives_tokens(network) or not hasattr(network, "blocks"):
        raise ValueError(f"{name}: depth={depth} is for networks with a row of equal blocks; leave it out.")
    if depth > len(network.blocks):
        raise ValueError(
            f"{name}: it has blocks 1 to {len(network.blocks)}, not {depth}; use depth={len(network.blocks)}."
        )
    network.blocks = network.blocks[:depth]


def _from_file(path: Path, request: Request) -> Source:
    """Load a checkpoint file: by its format, or as the timm model it is named after if it is flat."""
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        index = re.sub(r"-\d{5}-of-\d{5}(\.\w+)$", rf"\1{huggingface.INDEX}", path.name)
        raise ValueError(f"{path}: is one part of several; name their index, as in NAME={path.parent / index}.")
    is_named = "." in request.name and timm.is_model(request.name)
    in_folder = not is_named and not request.heads and _has_config(path)
    if in_folder and path.name in WEIGHTS:
        return _from_folder(path.parent, request, path.name)
    content, digest = read_file(path), sha256(path)
    if is_named and not _is_original(content):
        config = _timm_config(request.name)
        for state, unwrapped in reversed(list(unwrappings(content)) or [(content, ())]):
            if all(isinstance(value, Tensor) for value in state.values()):
                loaded = _timm(request, config, state, str(path))
                return loaded._replace(source=path.name, sha256=digest, unwrapped=unwrapped)
    try:
        checkpoint = recognise(content, str(path))
        _refuse_ambiguous(checkpoint, path, request)
    except ValueError:
        if in_folder:
            return _from_folder(path.parent, request, path.name)
        raise
    loaded = _from_checkpoint(checkpoint, request)
    return loaded._replace(source=path.name, sha256=digest, unwrapped=checkpoint.unwrapped)


def _refuse_ambiguous(checkpoint: Checkpoint, path: Path, request: Request) -> None:
    """Files of DINO and iBOT need a name that says so: those of timm's models without a head have the same keys."""
    says = re.compile(r"dino|ibot", re.IGNORECASE)
    named = says.search(path.name) or (says.search(request.name) and not timm.is_model(request.name))
    if checkpoint.format == "ibot/dino" and not named:
        raise ValueError(
            f"{path}: files of DINO and of timm's models without a head have the same keys; say which it is: "
            "dino=FILE or ibot=FILE for the authors' own, else TIMM_NAME.TAG=FILE, such as "
            "vit_base_patch16_224.dino=FILE or vit_base_patch16_224.augreg_in21k=FILE."
        )


def _from_checkpoint(checkpoint: Checkpoint, request: Request) -> Source:
    """Load the backbone of a recognised file."""
    layout, weights, where = FORMATS[checkpoint.format], checkpoint.weights, checkpoint.source
    mean, std = layout.pixel_mean, layout.pixel_std
    if layout.timm_model and not layout.refusal:
        architecture, weights = explained(where, layout.timm_model, weights)
        loaded = _timm(request, _timm_config(architecture), weights, where)
        return loaded._replace(format=checkpoint.format, licence=layout.licence)
    if layout.build and not layout.refusal:
        network = explained(where, layout.build, weights)
    else:
        network = build(checkpoint, request.side, request.heads)
    backbone = make_backbone(network, mean, std, layout.token_types, request)
    rule = POSITION_RULES[layout.resampling]
    return Source(
        request.name, backbone, "", checkpoint.format, layout.network, "", mean, std, layout.licence, "", rule
    )


def _has_config(path: Path) -> bool:
    """Whether a file lies where it was saved with the facts about it."""
    if path.name == "config.json" or not (path.parent / "config.json").is_file():
        return False
    try:
        config = read_json(path.parent / "config.json", "move the file to a folder of its own, or save it again")
    except ValueError:
        if path.name in WEIGHTS:
            raise
        return False
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
    config = {key: value for key, value in config.items() if value is not None}
    mean, std = _check_config(config, folder)
    if not is_intact(config):
        sys.stderr.write(
            f"comad: {folder}/config.json was edited or damaged since it was written; it counts as it is.\n"
        )
    path, facts, ours, name = (
        folder / (file or huggingface.weights_file(folder)),
        config["pretrained_cfg"],
        config.get("comad", {}),
        config["architecture"],
    )
    content = {key.removeprefix(TIMM_WRAPPER): tensor for key, tensor in read_file(path).items()}
    stored, digest = without_classifier(content, facts), sha256(path)
    if ours.get("sha256", digest) != digest and not request.allow_changed:
        raise ValueError(
            f"{folder}: {path.name} is not the file whose sha256 its config.json records ({str(ours['sha256'])[:12]}); "
            f"copy the folder again, or add :allow_changed to the teacher's name if you changed the weights yourself."
        )
    source, licence = f"{folder.absolute().name}/{path.name}", str(ours.get("licence", _licence(facts)))
    token_types = _token_types_of(ours, facts, folder)
    about = str(ours.get("about", ""))
    if name.startswith(PREFIX):
        network = TorchvisionFeatures(torchvision_network(name))
        network.default_cfg = facts  # pyright: ignore[reportArgumentType]
        load_strictly(network.module, stored, str(path))
        backbone = make_backbone(network, mean, std, token_types, request)
        return Source(request.name, backbone, source, "export", name, digest, mean, std, licence, about, OWN_FORWARD)
    if not timm.is_model(name):
        raise ValueError(
            f"{folder}: {name!r} is a network of your own, or of a newer timm; write a function that builds it and "
            f"loads {path.name}, and name it as NAME=NET.py:FUNCTION."
        )
    vit = _vit_of(folder, config, stored, str(path), request)
    if vit is None:
        whole = {"tag": None, **facts, "architecture": name}
        side = facts["input_size"][-1] if takes_size(name) and facts.get("input_size") else None
        sized: dict[str, Any] = {"img_size": side} if isinstance(side, int) and 0 < side <= TOO_LARGE else {}
        loaded = _timm(request, whole, stored, str(path), **sized)
        return loaded._replace(source=source, format="export", sha256=digest, licence=licence)
    _refuse_other_activation(name, facts)
    load_weights(vit, stored, str(path))
    backbone = TimmBackbone(vit, mean, std, token_types)
    rule = POSITION_RULES["antialias"]
    return Source(request.name, backbone, source, "export", name, digest, mean, std, licence, about, rule)


def _vit_of(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor], where: str, request: Request
) -> VisionTransformer | None:
    """The plain Vision Transformer of an export, once config and weights agree; None if it is no plain one."""
    name, arguments = config["architecture"], {"in_chans": 3, **config.get("model_args", {})}
    try:
        _patch_size(name, {})
    except NotPlainError:
        return None
    known = inspect.signature(VisionTransformer).parameters.keys()
    plain = all(isinstance(value, int | float | str | list | None) for value in arguments.values())
    if not arguments.keys() <= known or arguments["in_chans"] != 3 or not plain:
        raise ValueError(f"{folder}: its model_args are not those of an RGB Vision Transformer: {sorted(arguments)}.")
    sides = (arguments.get("img_size"), config["pretrained_cfg"].get("input_size"))
    arguments = {key: value for key, value in arguments.items() if key not in ("img_size", "num_classes", "in_chans")}
    patch_size, stored_side = stored_size("vit", stored, where)
    depth = len({key.split(".")[1] for key in stored if key.startswith("blocks.")})
    if isinstance(asked := arguments.get("depth", depth), bool) or not isinstance(asked, int) or asked > depth:
        raise ValueError(f"{where}: misses the keys of blocks.{depth} of the {asked} in config.json; export it again.")
    heads = arguments.get("num_heads", 1)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"{folder}: num_heads in config.json is {heads!r}; export it again.")
    check_shapes(lambda: create_vit(name, stored_side, **arguments), stored, where)
    own = next((side[-1] if isinstance(side, list) and side else side for side in sides if side), stored_side)
    own = own if isinstance(own, int) and 0 < own <= TOO_LARGE else stored_side
    return create_vit(name, request.side(patch_size, own), **arguments)


def _patch_size(name: str, cfg: Mapping[str, Any]) -> int:
    """Pixels on the side of a patch of a plain Vision Transformer of timm.

    Raises:
        NotPlainError: it is none.
    """
    with torch.device("meta"):
        vit = create_vit(name, None, **{key: value for key, value in cfg.items() if key != "pretrained"})
    embed: Any = vit.patch_embed
    return embed.img_size[0] // embed.grid_size[0]


def _from_transformers(folder: Path, config: Mapping[str, Any], request: Request, file: str | None) -> Source:
    """Load a folder that ``save_pretrained`` of transformers wrote."""
    network, path, family, mean, std, token_types, licence, rule = huggingface.load_folder(
        folder, config, request.side, file
    )
    backbone = make_backbone(network, mean, std, token_types, request)
    source = f"{folder.absolute().name}/{path.name}"
    licence = _licence({"license": licence})
    return Source(request.name, backbone, source, "transformers", family, sha256(path), mean, std, licence, "", rule)


def _check_config(config: Mapping[str, Any], folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Refuse a ``config.json`` that is not timm's; give the pixel normalisation."""
    parts = [config.get(key, {}) for key in ("pretrained_cfg", "model_args", "comad")]
    sound = all(isinstance(part, dict) for part in parts) and isinstance(config.get("architecture"), str)
    if not sound or not {"mean", "std"} <= parts[0].keys():
        example = '"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}'
        what = "config.json is not timm's: it needs architecture and pretrained_cfg with mean and std"
        raise ValueError(f"{folder}: {what}; if you know them, add them, such as {example}.")
    return checked_pixels(
        parts[0]["mean"], parts[0]["std"], f"{folder}: mean and std in config.json", "export it again"
    )


def _token_types_of(ours: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The trained tokens of an export."""
    named = ours.get("token_types", _token_types(facts.get("tag")))
    if not isinstance(named, list | tuple) or not named or any(name not in ("cls", "patch") for name in named):
        raise ValueError(f"{folder}: token_types in config.json are {named!r}; they may be 'cls' and 'patch'.")
    return tuple(named)


def _from_timm(request: Request) -> Source:
    """Build a timm model, with its pretrained weights or with random ones."""
    name, _, suffix = request.name.partition(":")
    request = request._replace(name=name)
    if suffix not in ("", "random"):
        raise ValueError(
            f"{request.name!r}: unknown suffix {suffix!r}; the only one is :random, as in {name}:random; {OPTIONS}."
        )
    config = _timm_config(name)
    if suffix:
        facts = {"source": "seed 0", "architecture": config["architecture"], "licence": "none (random weights)"}
        return _timm(request, config)._replace(**facts)
    _refuse_other_activation(config["architecture"], config)
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
    **arguments: Any,
) -> Source:
    """Build the model of timm's facts, and arguments: with the given weights, with timm's own, or with random ones."""
    name, tag = config["architecture"], None if weights is not None else config["tag"] or None
    cfg = {"pretrained_cfg": tag, "pretrained": pretrained, **arguments}
    mean, std, licence = tuple(config["mean"]), tuple(config["std"]), _licence(config)
    if weights is not None or pretrained:
        _refuse_other_activation(name, config)
    network = _create(name, config, request, cfg)
    if weights is not None:
        weights = without_classifier(weights, config)
        if gives_tokens(network) and not has_token_norm(network) and "norm.weight" in weights:
            network = _create(name, config, request, {**cfg, "global_pool": ""})  # a file from before fine-tuning
        elif isinstance(network, VisionTransformer) and "norm.weight" not in weights and "fc_norm.weight" in weights:
            network = _create(name, config, request, {**cfg, "global_pool": "avg"})  # one from after it
        load_weights(network, weights, where)
    digest = sha256_of(network.state_dict())
    backbone = make_backbone(network, mean, std, _token_types(config["tag"]), request)
    full = ".".join(filter(None, (name, config["tag"])))
    rule = POSITION_RULES[position_rule(network)]
    return Source(request.name, backbone, f"timm/{full}", "timm", full, digest, mean, std, licence, "", rule)


def _create(name: str, config: Mapping[str, Any], request: Request, cfg: Mapping[str, Any]) -> Any:
    """Build a timm model: at its image size if it is a plain Vision Transformer, else as timm has it."""
    try:
        own = (config.get("input_size") or (3, OWN_SIZE, OWN_SIZE))[-1]
        own = OWN_SIZE if "dinov2" in name else own  # its positions are for 518 pixels, its scores for 224
        return create_vit(name, request.side(_patch_size(name, cfg), own), **cfg)
    except NotPlainError:
        return create_whole(name, **cfg)


def make_backbone(
    network: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    token_types: tuple[str, ...],
    request: Request,
) -> Backbone:
    """The kind of backbone that suits a network, for the images that are wanted.

    Raises:
        ValueError: the network gives no tokens, or none at this size.
    """
    if isinstance(network, VisionTransformer):
        return TimmBackbone(network, mean, std, token_types)
    if not hasattr(network, "forward_features"):
        network = ModuleFeatures(network, 0, False, OWN_SIZE)
    stride, own_size = stride_and_size(network)
    side = request.side(stride, own_size, None if gives_tokens(network) else own_size)
    problem, sizes = "", dict.fromkeys((side, own_size) if request.size == "grid" else (side,))
    for size in sizes:  # some networks take images of their own size alone
        try:
            return FeatureMapBackbone(network, mean, std, size, request.rows, token_types)
        except (AssertionError, RuntimeError, IndexError, TypeError) as error:
            problem = str(error).partition("\n")[0][:160]
    raise ValueError(
        f"{request.name}: it cannot compute on {side} pixels ({problem}); add :size={own_size} to its name."
    )


def _refuse_other_activation(name: str, config: Mapping[str, Any]) -> None:
    """Refuse weights whose facts say that the named network has another activation than they were trained with."""
    if "QuickGELU" in str(config.get("notes")) and "quickgelu" not in name:
        better = f"{name.replace('_clip_', '_clip_quickgelu_')}.{config.get('tag')}"
        raise ValueError(f"{name}.{config.get('tag')}: was trained with QuickGELU; pass {better}=FILE instead.")


def _token_types(tag: object) -> tuple[str, ...]:
    """The trained tokens of timm's weights of that tag; masked images alone train no class token."""
    return ("patch",) if str(tag).startswith(("mae", "mim")) else ("cls", "patch")


def _licence(config: Mapping[str, Any]) -> str:
    """The licence in timm's facts about weights, in the spelling of `FORMATS`."""
    licence = str(config.get("license") or "unknown")
    return {"cc-by-nc-4.0": "CC-BY-NC 4.0", "apache-2.0": "Apache-2.0"}.get(licence, licence)
