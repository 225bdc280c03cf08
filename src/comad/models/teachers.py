"""Frozen teachers, each with a card that says exactly what was loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from comad.models.backbone import Backbone
from comad.models.feature_map_backbone import FeatureMapBackbone, ModuleFeatures
from comad.models.files import sha256_of
from comad.models.networks import gives_tokens
from comad.models.sources import Source, find

PERMISSIVE = re.compile(r"(apache-2\.0|mit|bsd(-\w+)*|cc0(-1\.0)?|none( \(.*\))?)$", re.IGNORECASE)
"""Licences of weights that ask nothing of a network that learnt from them; seeded weights have none."""


@dataclass(frozen=True)
class TeacherCard:
    """What a teacher is: printed, kept with the run and with every student, and compared at resume.

    Attributes:
        name: what the run calls it.
        source: name of the file, or of the folder and its file; no absolute path.
        format: a key of `comad.models.formats.FORMATS`, ``export`` or ``transformers`` for a folder, or ``module``.
        architecture: a timm name, the kind of network if the shapes in the file say it all, or a class.
        sha256: of the weights file; of the names and bytes of the tensors if timm fetched or drew them.
        depth, width, heads, patch_size, num_prefix_tokens: the network; patch size in pixels. Depth and heads are 0
            where the network is no Vision Transformer.
        norm_eps: epsilon of the final norm; 0 if there is none.
        pixel_mean, pixel_std: pixel normalisation, in units of [0, 1] pixels.
        token_types: tokens that were trained, and so can be trusted.
        licence: of the weights, as far as known.
        params: number of parameters.
        about: where it comes from, if an export says so.
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
    about: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The card in JSON's types: it equals itself after a round trip through a file."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def summary(self) -> str:
        """The card on one line."""
        shape = f"width {self.width}, patch {self.patch_size}"
        if self.depth:
            shape = f"depth {self.depth}, {self.heads} heads, {shape}"
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


def load_teacher(spec: str, image_size: int, dtype: torch.dtype = torch.float32, *, rows: int | None = None) -> Teacher:
    """Load a teacher, frozen and in eval mode. The random state of the caller is left alone.

    Args:
        spec: one of ``NAME=FILE_OR_FOLDER`` (a folder of comad, timm's hub or transformers), a bare path, a name of
            `bundled_teachers`, a timm model (its pretrained weights), a timm model and ``:random`` (seeded, for
            benchmarks), ``efficientnet-lite0`` to ``2`` (from the extra of that name). ``TIMM_NAME.TAG=FILE`` reads a
            flat file as that model; ``NAME=FILE:heads=N`` gives the heads of a width without a rule.
        image_size: pixels on the side of the square images to come; positions are resampled to it.
        dtype: of the weights; pixels are normalised in float32 in any case.
        rows: the grid of patches that a network with a map of its own is resampled to, at the image size that suits
            it. None keeps ``image_size`` and its own map. Plain Vision Transformers have ``image_size`` in any case.

    Raises:
        ValueError: the name is unknown, the file is unreadable or does not fit, or the image size is no multiple of
            the patch size.
    """
    if image_size < 1:
        raise ValueError(f"{spec}: images of {image_size} pixels are too small; use 224 or so.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        source = find(spec, image_size, rows)
    backbone = source.backbone
    if rows is None and image_size % (patch := backbone.patch_size):
        fit = f"use {max(1, round(image_size / patch)) * patch}"
        raise ValueError(f"{spec}: {image_size} pixels are no multiple of its {patch}-pixel patch; {fit}.")
    for network in backbone.children():  # the pixel normalisation stays in float32
        network.to(dtype)
    return Teacher(source.name, backbone.requires_grad_(False).eval(), _card(source))


def load_on_grid(
    specs: Sequence[str],
    rows: int,
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    place: Callable[[Backbone], object] | None = None,
) -> list[Teacher]:
    """Load teachers, each at the image size that gives it a grid of ``rows`` × ``rows`` patches.

    Args:
        specs, dtype: see `load_teacher`.
        rows: rows and columns of the grid.
        patch_size: pixels on the side of a patch, where a network has none of its own.
        place: puts a network where it is to live, before the next one is loaded.

    Raises:
        ValueError: two have the same name, or one cannot be loaded.
    """
    teachers = []
    for spec in specs:
        teacher = load_teacher(spec, rows * patch_size, dtype, rows=rows)
        if teacher.backbone.grid[0] != rows:  # a Vision Transformer with another patch size
            teacher = load_teacher(spec, rows * teacher.backbone.patch_size, dtype, rows=rows)
        if place:
            place(teacher.backbone)
        teachers.append(teacher)
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        raise ValueError(f"two teachers have the same name: {', '.join(names)}; give them names with NAME=FILE.")
    return teachers


def teacher_from_module(  # noqa: PLR0913 - one keyword per fact that a module does not tell
    name: str,
    module: nn.Module,
    image_size: int,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    num_prefix_tokens: int = 0,
    has_cls: bool = False,
    rows: int | None = None,
    licence: str = "unknown",
) -> Teacher:
    """Make a teacher of your own module, which is frozen and put in eval mode. It sees whole images.

    Args:
        name: what the run calls it.
        module: its forward takes normalised pixels (B, 3, image_size, image_size), and gives a map (B, E, h, w), or
            tokens (B, num_prefix_tokens + N, E) whose N patches form a square.
        image_size: pixels on the side of its images.
        mean, std: pixel normalisation, in units of [0, 1] pixels.
        num_prefix_tokens: tokens before the patches; they are dropped, but for a class token.
        has_cls: the first of them is a class token that was trained. The mean over a map stands for one in any case.
        rows: the grid that patches are resampled to; None keeps the module's own.
        licence: of the weights.

    Raises:
        ValueError: the module gives something else, or ``image_size`` is no multiple of the grid.
    """
    features = ModuleFeatures(module.eval(), num_prefix_tokens, has_cls, image_size)
    if has_cls and not num_prefix_tokens:
        raise ValueError(f"{name}: has_cls needs num_prefix_tokens of at least 1; count the class token.")
    backbone = FeatureMapBackbone(features, mean, std, image_size)
    rows = rows or backbone.grid[0]
    if image_size % rows:
        raise ValueError(
            f"{name}: {image_size} pixels are no multiple of {rows} rows; give rows or another image_size."
        )
    backbone = FeatureMapBackbone(features, mean, std, image_size, rows)
    source = Source(
        name=name,
        backbone=backbone.requires_grad_(False).eval(),
        source="module",
        format="module",
        architecture=type(module).__name__,
        sha256=sha256_of(module.state_dict()),
        mean=tuple(mean),
        std=tuple(std),
        licence=licence,
    )
    card = dataclasses.replace(_card(source), num_prefix_tokens=num_prefix_tokens)
    return Teacher(name, source.backbone, card)


def licence_notice(teachers: Sequence[Teacher]) -> str:
    """One line that names the teachers under non-commercial licences; empty if there are none."""
    bound = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)
    names = [f"{name} ({card.licence})" for name, _, card in teachers if bound.search(card.licence)]
    if not names:
        return ""
    return f"Non-commercial weights: {', '.join(names)}. Their licences travel with every student distilled from them."


def inherited_licence(licences: Sequence[str]) -> str:
    """The licence of what was learnt from weights: apache-2.0 if all theirs are permissive, else the others."""
    bound = sorted({licence for licence in licences if not PERMISSIVE.match(licence)})
    return ", ".join(bound) or "apache-2.0"


def _card(source: Source) -> TeacherCard:
    """Write down what was loaded."""
    backbone, network = source.backbone, cast(Any, next(source.backbone.children()))
    facts: dict[str, Any] = {"depth": 0, "heads": 0, "num_prefix_tokens": 0, "norm_eps": 0.0}
    if gives_tokens(network):
        facts = {
            "depth": len(network.blocks),
            "heads": network.blocks[0].attn.num_heads,
            "num_prefix_tokens": network.num_prefix_tokens,
            "norm_eps": network.norm.eps,
        }
    return TeacherCard(
        name=source.name,
        source=source.source,
        format=source.format,
        architecture=source.architecture,
        sha256=source.sha256,
        width=backbone.width,
        patch_size=backbone.patch_size,
        pixel_mean=source.mean,
        pixel_std=source.std,
        token_types=backbone.token_types,
        licence=source.licence,
        params=sum(parameter.numel() for parameter in backbone.parameters()),
        about=source.about,
        **facts,
    )
