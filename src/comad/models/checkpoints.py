"""Checkpoint files of published teachers: recognised by their keys, and loaded strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from comad.models.formats import FORMATS, NAME_IT, Format, Layout, Weights
from comad.models.networks import build_network, sincos_table, stored_size, width_of

AVERAGED = ("model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema", "target_encoder")
"""Containers and prefixes of an exponential moving average, which is better than the weights beside it."""
CONTAINERS = (*AVERAGED, "teacher", "model", "state_dict", "model_state_dict", "module", "network", "encoder")
PREFIXES = (
    *("_orig_mod.", "_fsdp_wrapped_module.", "module.", "teacher.backbone.", "teacher.", "teacher_backbone."),
    *("backbone.", "model.", "wrapped_model._model.", "timm_model.", "net.", "base_encoder.", "encoder_q."),
)
"""Of torch.compile, FSDP, DDP, training scripts, Lightning, LightlyTrain's exports, transformers, and MoCo."""
INSIDE = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
"""What stands within keys where blocks were compiled or wrapped one by one."""
MOST_WRAPPERS = 6
OWN_MODULE = (
    "write a file NET.py with a function that builds the network, loads this file and returns it, and pass "
    "NAME=NET.py:FUNCTION"
)
ANY_TIMM = f"if it is of a timm model, pass TIMM_NAME.TAG=FILE, else {OWN_MODULE}"
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
RESNETS += ("resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")


class Checkpoint(NamedTuple):
    """The backbone in a file, under timm's names: no container, prefix, head or decoder.

    Attributes:
        source: what to call the file in a message.
        format: a key of `FORMATS`.
        weights: the tensors.
        unwrapped: the containers and prefixes that were taken off, from the outside in.
    """

    source: str
    format: str
    weights: dict[str, Tensor]
    unwrapped: tuple[str, ...] = ()


def recognise(content: Mapping[str, Any], source: str) -> Checkpoint:
    """Take the backbone out of the content of a file, out of its well-known wrappers too.

    Raises:
        ValueError: the layout is none of `FORMATS`, or the tensors are not of its shapes.
    """
    second_best = None
    for state, unwrapped in unwrappings(content):
        if found := _match(state, source):
            found = found._replace(unwrapped=unwrapped)
            if not FORMATS[found.format].refusal and _positions_problem(found) is None:
                return found
            second_best = second_best or found
    if second_best:
        return second_best
    keys = _some_keys(content)
    raise ValueError(
        f"{source}: unknown layout, with keys {', '.join(keys)}; known formats: {', '.join(FORMATS)}{_hint(content)}."
    )


def unwrappings(content: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], tuple[str, ...]]]:
    """The content, and what is left after each of its wrappers, with the names of those that were taken off."""
    names: tuple[str, ...] = ()
    averaged = next((name for name in AVERAGED if isinstance(content.get(name), Mapping)), None)
    if averaged is None:
        yield _without_inside(content, names)
    for _ in range(MOST_WRAPPERS):
        inner = _unwrapped(content)
        if inner is None:
            return
        content, names = inner[0], (*names, inner[1])
        yield _without_inside(content, names)


def _unwrapped(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """The content without its outermost wrapper; None if it has no known one."""
    for name in CONTAINERS:
        if isinstance(inner := content.get(name), Mapping) and inner:
            return inner, name
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in (*(f"{name}." for name in AVERAGED), *PREFIXES):
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if inside and any("." in key for key in inside):
            return inside, prefix
    return None


def _without_inside(content: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The content without the wrappers of single blocks, and the names of what was taken off."""
    for name in INSIDE:
        shorter = {re.sub(rf"(?<=\d\.){name}", "", key): value for key, value in content.items()}
        if shorter.keys() != content.keys():
            content, names = shorter, (*names, name)
    return content, names


def _match(content: Mapping[str, Any], source: str) -> Checkpoint | None:
    """The format of a state dict; None if it is of none. What its positions or keys identify needs no container."""
    misplaced = None
    for name, layout in FORMATS.items():
        state: Any = content.get(layout.container) if layout.container else content
        bare = layout.container != "" and not isinstance(state, Mapping)
        if bare and layout.positions not in ("learnt", "any"):
            state = content
        if not _has_keys(layout, state):
            continue
        kept = [key for key in state if not key.startswith(layout.ignore)]
        weights = {key.removeprefix(layout.prefix): state[key] for key in kept}
        found = Checkpoint(source, name, _converted(layout, weights, f"{source}: taken for {name}"))
        if layout.refusal or _positions_problem(found) is None:
            return found
        misplaced = misplaced if bare else misplaced or found
    return misplaced


def _positions_problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong about the absolute positions, if anything."""
    layout, positions = FORMATS[checkpoint.format], checkpoint.weights.get("pos_embed")
    if layout.positions in ("none", "any") or positions is None or positions.ndim != 3:
        return None
    found = position_layout(positions)
    if found == layout.positions:
        return None
    own = f"not {layout.positions} as in a file of format {checkpoint.format}"
    return f"its positions are {found}, {own}; {NAME_IT}"


def _converted(layout: Format, weights: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The weights under timm's names."""
    if layout.convert is None or layout.refusal:
        return weights
    return explained(what, layout.convert, weights)


def explained(what: str, function: Callable[[Weights], Any], weights: Weights) -> Any:
    """Call a function of `Format`, with errors that say what they are about.

    Raises:
        ValueError: the tensors are not of the shapes that the function is for.
    """
    try:
        return function(weights)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except (IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{what}: its tensors have other shapes; use an unmodified file.") from error


def _has_keys(layout: Format, state: Any) -> bool:
    """Whether a state dict has the keys of a format."""
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return False
    return all(key in state for key in layout.detect) and not any(key in state for key in layout.absent)


def _some_keys(content: Mapping[str, Any]) -> list[str]:
    """A few keys of a file, for a message: up to three of each container."""
    inner = {key: list(value)[:3] if isinstance(value, Mapping) else [""] for key, value in content.items()}
    return [f"{key}/{name}".rstrip("/") for key, names in inner.items() for name in names][:8] or ["(none)"]


def _hint(content: Mapping[str, Any]) -> str:
    """What may help to load a file of an unknown layout."""
    for state, _ in unwrappings(content):
        if any("embeddings." in key for key in state):
            return "; a Hugging Face file needs its config.json beside it"
        if name := timm_name(state):
            return f"; pass {name}=FILE if it is of that timm model"
    return f"; {ANY_TIMM}"


def timm_name(state: Mapping[str, Any]) -> str | None:
    """A timm model that a state dict may be of, by its keys and shapes; to suggest, never to load."""
    shape = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    clip = "visual." if "visual.class_embedding" in shape else ""
    if f"{clip}class_embedding" in shape and f"{clip}conv1.weight" in shape:
        width, _, patch, *_ = shape[f"{clip}conv1.weight"]
        name = f"vit_{SIZES.get(width)}_patch{patch}_clip_224"
        return f"{name}.TAG" if timm.is_model(name) else None
    if "layer4.0.conv1.weight" in shape and "conv1.weight" in shape:
        return next((f"{name}.tv_in1k" for name in RESNETS if _fits(name, shape)), None)
    trunk = {key.removeprefix("visual.trunk."): x for key, x in shape.items() if key.startswith("visual.trunk.")}
    shape = trunk or shape
    if len(kernel := shape.get("patch_embed.proj.weight", ())) == 4 and kernel[0] in SIZES:
        size, patch = SIZES[kernel[0]], kernel[-1]
        first = f"beit_{size}" if "blocks.0.attn.q_bias" in shape else f"vit_{size}"
        names = dict.fromkeys([f"{first}_patch{patch}_224", *timm.list_models(f"*_{size}_patch{patch}_*224")])
        return next((f"{name}.TAG" for name in names if timm.is_model(name) and _fits(name, shape)), None)
    return None


SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
OPEN = re.compile(r"(head|fc|norm|fc_norm)\.|pos_embed$|.*_index$")
"""Keys that may differ between files of one model: classifiers, where the last norm stands, positions."""


def _fits(name: str, shape: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are those of a timm model."""
    try:
        with torch.device("meta"):
            expected = {key: tuple(x.shape) for key, x in timm.create_model(name).state_dict().items()}
    except Exception:  # a network that computes with numbers while it is built
        return False
    mine, its = ({key: x for key, x in part.items() if not OPEN.match(key)} for part in (shape, expected))
    return mine == its


def build(checkpoint: Checkpoint, image_size: Callable[[int, int], int], heads: int | None = None) -> nn.Module:
    """Build the network a checkpoint is of, see `build_network`, and load it strictly.

    Depth, width and patch size follow from the shapes; the number of heads from the format, or from ``heads``.

    Args:
        checkpoint: what `recognise` found.
        image_size: pixels on the side of a patch, and of the images it was made for → of the images to come.
        heads: number of attention heads; None: by the rule of the format.

    Raises:
        ValueError: the format cannot be a teacher, the heads are unknown, or the weights do not fit.
    """
    source, layout, weights = checkpoint.source, FORMATS[checkpoint.format], checkpoint.weights
    if layout.refusal:
        raise ValueError(f"{source}: {layout.refusal}{_perhaps(checkpoint)}.")
    width = width_of(layout.network, weights, source)
    if problem := _positions_problem(checkpoint):
        raise ValueError(f"{source}: {problem}.")
    arguments = {**layout.arguments, "num_heads": num_heads(checkpoint, width, heads)}
    arguments["norm_layer"] = partial(nn.LayerNorm, eps=layout.norm_eps)
    patch_size, own_size = stored_size(layout.network, weights, source)
    side = image_size(patch_size, layout.image_size or own_size)
    return build_network(layout.network, weights, side, source, arguments, layout.resampling)


def _perhaps(checkpoint: Checkpoint) -> str:
    """What may help with a file of timm's keys."""
    if checkpoint.format != "timm":
        return ""
    name = timm_name(checkpoint.weights)
    return f", perhaps {name}=FILE" if name else f", or {OWN_MODULE}"


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


def position_layout(positions: Float[Tensor, "1 n E"]) -> Layout:
    """Recognise fixed sin-cos positions after a class token; the two layouts are transposes of each other."""
    _, length, width = positions.shape
    side = math.isqrt(max(length - 1, 0))
    if not side or side**2 != length - 1 or width % 4:
        return "learnt"
    grid = positions[0, 1:].float()
    table = sincos_table(side, width)
    if torch.allclose(grid, table.view(side, side, width).transpose(0, 1).flatten(0, 1), atol=5e-3):
        return "mae"
    return "mocov3" if torch.allclose(grid, table, atol=5e-3) else "learnt"
