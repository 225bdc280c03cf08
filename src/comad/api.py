"""The verbs as functions, which take names or objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad import presets
from comad.data.images import Splits, load_images
from comad.distill.method import Method
from comad.distill.results import DistillResult
from comad.distill.run import distill as run_distillation
from comad.distill.setup import Inputs
from comad.models.backbone import Backbone
from comad.models.teachers import Teacher, load_on_grid, load_teacher
from comad.models.timm_backbone import TimmBackbone, VitConfig
from comad.recipes import SLOTS
from comad.runtime.spelling import hint


def distill(
    data: Any = "stamps",
    teachers: Sequence[str | nn.Module | Teacher] = (),
    student: str | VitConfig | nn.Module | None = None,
    preset: str = "comad",
    out: str | Path = "runs/distill",
    method: Method | None = None,
    **overrides: Any,
) -> DistillResult:
    """Distil teachers into a student, as `comad distill` does.

    Args:
        data: a folder of images, the name of a bundled set, a `torch.utils.data.Dataset` of images, or `Splits`.
        teachers: each a name as on the command line, a module (timm's, transformers', your own: normalised pixels
            (B, 3, H, W) → map (B, E, h, w) or tokens (B, N, E)), or a `Teacher`. Left out: those of the bundled set.
        student: a timm name, a `VitConfig`, or a Vision Transformer of timm, which is trained in place.
        preset: a key of `comad.METHODS`.
        out: folder of the run.
        method: what fills the slots, in the place of the preset's.
        overrides: any option of `comad distill` by its name: ``epochs=10``, ``batch_size=64``, ``image_size=96``,
            ``fusion="mean"``, ``split="val"``, ``resume=True``; or a group of them: ``optim={"epochs": 10}``.

    Returns:
        The student and its scores.

    Raises:
        ValueError: bad data, teachers or options, or a run folder in use.
        TrainingError: the loss is not finite.

    Example:
        >>> import comad
        >>> result = comad.distill(teachers=["ibot-stamps"], preset="mean", out=folder, epochs=0.1, warmup_epochs=0)
        >>> sorted(result.scoreboard.names)
        ['ibot-stamps', 'init-only', 'pixels', 'student', 'untrained']
        >>> result.student(result.transform(image).unsqueeze(0)).shape
        torch.Size([1, 96])
    """
    bundled = isinstance(data, str) and data == "stamps"
    config = presets.recipe(preset, demo=bundled)
    if isinstance(data, str | Path):
        config = replace(config, data=str(data))
    names = tuple(spec for spec in teachers if isinstance(spec, str))
    config = replace(config, teachers=names if teachers else config.teachers, run=replace(config.run, out=str(out)))
    if method is not None:
        config = config.with_method(method, preset)
    module = student if isinstance(student, nn.Module) else None
    if student is not None:
        config = replace(config, student=_student_config(student, config.student))
    config = override(config, overrides)
    splits = None if isinstance(data, str | Path) else data if isinstance(data, Splits) else load_images(data)
    objects = None if len(names) == len(teachers) else teachers
    result = run_distillation(config, Inputs(splits=splits, teachers=objects, student=module))
    assert result is not None, "only the first of several processes has a result"
    return result


def _student_config(student: Any, default: VitConfig) -> VitConfig:
    """What a student is built of, and its export too."""
    if isinstance(student, VitConfig):
        return student
    if isinstance(student, str):
        return replace(default, name=student, width=None, depth=None, heads=None)
    if not isinstance(student, VisionTransformer):
        raise ValueError(f"{type(student).__name__} is no Vision Transformer of timm; give one, or its name.")
    known, block = student.pretrained_cfg or {}, student.blocks[0]
    return VitConfig(
        name=known.get("architecture", "vit_tiny_patch16_224"),
        image_size=student.patch_embed.img_size[0],
        patch_size=student.patch_embed.patch_size[0],
        width=student.embed_dim,
        depth=len(student.blocks),
        heads=block.attn.num_heads,
    )


def override(config: Any, values: Mapping[str, Any]) -> Any:
    """A config with options changed by their names, wherever they stand in it.

    Raises:
        ValueError: no such option.
    """
    for name, value in values.items():
        config = _override(config, name, value)
    return config


def _override(config: Any, name: str, value: Any) -> Any:
    own = [field.name for field in fields(config)]
    if name in own:
        old = getattr(config, name)
        if isinstance(value, Mapping) and is_dataclass(old):
            value = override(old, value)
        elif isinstance(value, str) and name in SLOTS and not isinstance(old, str):
            value = SLOTS[name].choose(value)
        return replace(config, **{name: value})
    for field in own:
        group = getattr(config, field)
        if is_dataclass(group) and name in _names(group):
            return replace(config, **{field: _override(group, name, value)})
    raise ValueError(f"no option {name!r}; {hint(name, sorted(_names(config)))}")


def _names(config: Any) -> set[str]:
    """Options of a config and of its groups."""
    found = {field.name for field in fields(config)}
    groups = [getattr(config, name) for name in found]
    return found.union(*(_names(group) for group in groups if is_dataclass(group)))


def load_student(name: str = "vit_tiny_patch16_224", **options: Any) -> TimmBackbone:
    """A network to train: a timm Vision Transformer by name.

    Args:
        name: timm's.
        options: fields of `VitConfig`, such as ``image_size``, ``patch_size``, ``width``, ``depth``, ``heads``.

    Raises:
        ValueError: no such network, or sizes that do not fit each other.
    """
    return VitConfig(name=name, **options).build()


def load_teachers(
    teachers: Sequence[str | nn.Module | Teacher],
    student: Backbone,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Teacher]:
    """Frozen teachers whose tokens lie on a student's grid.

    Args:
        teachers: names or objects, see `comad.distill`.
        student: gives the grid.
        dtype: of their weights.
        device: where they compute.

    Raises:
        ValueError: one cannot be loaded, or two have the same name.
    """
    rows, patch_size = student.grid[0], student.patch_size
    return load_on_grid(teachers, rows, patch_size, dtype, lambda backbone: backbone.to(device))


def load_backbone(spec: str, image_size: int = 224) -> Backbone:
    """Any frozen network by name: images (B, 3, H, W) with values in [0, 1] → `Tokens` (class token, patches).

    Args:
        spec: an exported student's folder, or whatever ``--teachers`` takes.
        image_size: pixels on the side of the images to come.

    Raises:
        ValueError: see `load_teacher`.
    """
    return load_teacher(spec, image_size).backbone
