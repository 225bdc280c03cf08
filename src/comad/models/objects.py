"""Networks that are objects: your own modules, models of timm, torchvision and transformers."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.models import huggingface
from comad.models.backbone import Backbone
from comad.models.feature_map_backbone import FeatureMapBackbone, ModuleFeatures
from comad.models.files import checked_pixels, read_json, sha256_of
from comad.models.formats import POSITION_RULES
from comad.models.networks import OWN_SIZE, position_rule
from comad.models.sources import OWN_FORWARD, Request, Source, cut_blocks, make_backbone
from comad.models.timm_backbone import TimmBackbone
from comad.models.torchvision_features import TorchvisionFeatures, is_torchvision

Pixels = tuple[tuple[float, ...], tuple[float, ...]]


def from_python_file(text: str) -> tuple[str, nn.Module] | None:
    """The module that ``NAME=NET.py:FUNCTION`` names; None if the text is no such name. It runs the file.

    Raises:
        ValueError: there is no such file or function, it fails, or it returns no module.
    """
    name, _, where = text.partition("=")
    path, _, function = where.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier() or not name:
        return None
    if not Path(path).is_file():
        raise ValueError(f"{text!r}: no file {path!r}; write NAME=NET.py:FUNCTION, with a path to it.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
        made = getattr(loaded, function)()
    except Exception as error:  # the user's own code
        told = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise ValueError(f"{path}: {function}() fails with {told}; mend it.") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{path}: {function}() returns a {type(made).__name__}, not a module; return the network.")
    return name, made


def from_object(
    module: nn.Module,
    request: Request,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_prefix_tokens: int = 0,
    has_cls: bool = False,
    licence: str = "unknown",
) -> Source:
    """Make a teacher of a module, which is copied.

    Args:
        module: a model of timm, of torchvision or of transformers, a `Backbone`, or your own, see `own_facts`.
        request: its name, and the images and the grid that it is wanted for. A module of your own keeps its image size
            on every grid.
        mean, std: pixel normalisation, in units of [0, 1] pixels. None: what timm or transformers know about the model,
            what your own module says, else ImageNet's.
        num_prefix_tokens, has_cls: in the place of what your own module says.
        licence: of the weights.

    Raises:
        ValueError: it gives something else, its pixel normalisation is unknown, or the image size does not fit.
    """
    name = request.name
    module = _unwrapped(module)
    digest, architecture = _digest(module, name), type(module).__name__
    try:
        module = copy.deepcopy(module).eval()
    except Exception as error:  # hooks, locks and the like
        told = str(error).partition("\n")[0][:160]
        raise ValueError(
            f"{name}: it cannot be copied ({told}); pass a module without hooks and open files."
        ) from error
    rule, given = OWN_FORWARD, (mean, std) if mean is not None and std is not None else None
    if not given and hasattr(module, "pixel_mean") and hasattr(module, "pixel_std"):
        given = own_facts(module)[0]
    backbone: Backbone
    if isinstance(module, Backbone):
        backbone, pixels = module, _of_buffers(module)
    elif hasattr(module, "config") and hasattr(module.config, "model_type"):
        pixels = _known_pixels(given or huggingface.pixels_of(module), name)
        backbone, rule = _of_transformers(module, request, pixels)
    elif hasattr(module, "forward_features") and (facts := timm_facts(module)):
        pixels = _known_pixels(given or (facts["mean"], facts["std"]), name)
        backbone = _of_timm(module, request, pixels)
        rule = POSITION_RULES[position_rule(module)]
    else:
        pixels, prefix, own_cls = own_facts(module)
        pixels = _known_pixels(given or pixels, name)
        backbone = _of_module(module, request, pixels, num_prefix_tokens or prefix, has_cls or own_cls)
    if request.depth:
        cut_blocks(backbone, request.depth, name)
    if request.rows:
        backbone.resample_to(request.rows)
    source = Source(name, backbone, "module", "module", architecture, digest, *pixels, licence)
    return source._replace(positions=rule)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network in a wrapper of torch (compiled, for several GPUs) or of transformers (timm's)."""
    inner: Any = getattr(module, "_orig_mod", module)
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    elif type(module).__module__.startswith("transformers."):
        inner = getattr(module, "timm_model", module)
    return inner if inner is module else _unwrapped(inner)


def _digest(module: nn.Module, name: str) -> str:
    """The hash of a module's weights.

    Raises:
        ValueError: they are no plain tensors, or no finite numbers.
    """
    try:
        state = module.state_dict()
        digest = sha256_of(state)
        bad = [key for key, x in state.items() if x.is_floating_point() and not x.isfinite().all()]
    except Exception as error:  # quantised, on the meta device, not yet initialised
        told = str(error).partition("\n")[0][:160]
        raise ValueError(f"{name}: its weights are no plain tensors ({told}); pass the network in fp32.") from error
    if bad:
        raise ValueError(f"{name}: has NaN or infinite weights in {', '.join(bad[:3])}; pass a sound network.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{name}: is a TorchScript program; pass the network that it was made of.")
    return digest


def own_facts(module: nn.Module) -> tuple[Pixels, int, bool]:
    """What a module of your own says about itself: pixel normalisation, tokens before the patches, a class token.

    Its forward takes normalised pixels (B, 3, H, W), and gives a map (B, E, h, w), or tokens (B, P + N, E) whose N
    patches form a square. Its attributes, all optional: ``pixel_mean`` and ``pixel_std`` (three numbers each, in units
    of [0, 1] pixels; ImageNet's), ``num_prefix_tokens`` (P; 0), and ``has_cls``: the first of those tokens is a class
    token (False; the others are dropped, and the mean over a map stands for one).
    """
    mean, std = (
        getattr(module, name, default) for name, default in zip(("pixel_mean", "pixel_std"), IMAGENET, strict=True)
    )
    numbers = [tuple(torch.as_tensor(values).flatten().tolist()) for values in (mean, std)]
    return (numbers[0], numbers[1]), getattr(module, "num_prefix_tokens", 0), getattr(module, "has_cls", False)


def _known_pixels(pixels: Any, name: str) -> Pixels:
    if pixels is None:
        raise ValueError(
            f"{name}: the pixel normalisation of this kind of network is not known; give mean and std, "
            "or set its pixel_mean and pixel_std."
        )
    mean, std = pixels
    return checked_pixels(mean, std, f"{name}: mean and std", "give others")


def _of_buffers(backbone: Backbone) -> Pixels:
    mean, std = (tuple(buffer.flatten().tolist()) for buffer in (backbone.pixel_mean, backbone.pixel_std))
    return mean, std


IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def timm_facts(module: nn.Module) -> dict[str, Any] | None:
    """What timm knows about a model of its own: size and pixel normalisation; None if it is not timm's."""
    facts = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    return facts if isinstance(facts, dict) and {"mean", "std"} <= facts.keys() else None


def _of_timm(module: nn.Module, request: Request, pixels: Pixels) -> Backbone:
    """A model of timm, without its head, at the size that is wanted."""
    if not isinstance(module, VisionTransformer):
        return make_backbone(module, *pixels, ("cls", "patch"), request)
    embed: Any = module.patch_embed
    side = request.side(embed.img_size[0] // embed.grid_size[0], embed.img_size[0])
    if side != embed.img_size[0]:
        module.set_input_size(img_size=(side, side))
    return TimmBackbone(module, *pixels)


def _of_transformers(module: Any, request: Request, pixels: Pixels) -> tuple[Backbone, str]:
    """A model of transformers: as timm's where its kind is known, else as it is."""
    kind = str(module.config.model_type).removesuffix("_vision_model").removesuffix("_visual_model")
    mean, std = pixels
    has_head = type(module).__module__.startswith("transformers.") and module.base_model is not module
    if kind in huggingface.FAMILIES or (kind in huggingface.OTHERS and has_head):
        with tempfile.TemporaryDirectory() as folder:  # the names of tensors in files are not those in memory
            module.save_pretrained(folder)
            config = read_json(Path(folder) / "config.json", "update transformers")
            try:
                loaded = huggingface.load_folder(Path(folder), config, request.side)
            except ValueError as error:
                raise ValueError(str(error).replace(folder, request.name)) from error
        return make_backbone(loaded.network, mean, std, loaded.token_types, request), loaded.positions
    features = huggingface.TransformersFeatures(vision_part(module))
    return make_backbone(features, mean, std, ("cls", "patch"), request), OWN_FORWARD


def vision_part(module: nn.Module) -> nn.Module:
    """Of a model of transformers the part that sees."""
    return getattr(module, "vision_model", getattr(module, "vision_tower", module))


def _of_module(
    module: nn.Module, request: Request, pixels: Pixels, num_prefix_tokens: int, has_cls: bool
) -> FeatureMapBackbone:
    """A module of your own, at its own size on every grid."""
    if has_cls and not num_prefix_tokens:
        raise ValueError(f"{request.name}: has_cls needs num_prefix_tokens of at least 1; count the class token.")
    side = request.size if isinstance(request.size, int) else OWN_SIZE
    known = is_torchvision(module)
    features = TorchvisionFeatures(module) if known else ModuleFeatures(module, num_prefix_tokens, has_cls, side)
    try:
        return FeatureMapBackbone(features, *pixels, side, request.rows)
    except (RuntimeError, AssertionError, IndexError, TypeError) as error:
        told = str(error).partition("\n")[0][:160]
        raise ValueError(
            f"{request.name}: its forward fails on {side} pixels ({told}); give its image_size."
        ) from error
