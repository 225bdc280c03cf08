"""The verbs as functions, which take names or objects."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_type_hints, no_type_check

import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from comad.comparison.config import CompareConfig
from comad.comparison.run import compare as run_comparison
from comad.data.images import Splits
from comad.data.load import load_images
from comad.defaults import CACHE_FLAGS, FLAGS, SIZE_FLAGS
from comad.distillation.config import DistillConfig
from comad.distillation.method import Method
from comad.distillation.results import DistillResult
from comad.distillation.run import distill as run_distillation
from comad.distillation.setup import Inputs
from comad.evaluation.finetune import Finetuned
from comad.evaluation.finetune import check as check_finetune
from comad.evaluation.tuning import FinetuneConfig
from comad.evaluation.tuning import recipe as tuning_recipe
from comad.evaluation.views import load_one
from comad.exporting.finetuned import finetune_teacher
from comad.models.backbone import Backbone
from comad.models.students import VitConfig
from comad.models.teachers import Teacher, load_on_grid, load_teacher
from comad.planning.budget import within_budget
from comad.planning.distillation import plan_distillation
from comad.planning.forecast import Plan
from comad.presets import IMAGES, default_for
from comad.presets import recipe as preset_recipe
from comad.pretraining.config import recipe as pretrain_recipe
from comad.pretraining.run import pretrain as run_pretraining
from comad.recipes import SLOTS, fitted
from comad.runtime.seal import KEY
from comad.runtime.spelling import hint


@no_type_check  # at run time: what is wrong is told in one line, by this function
def distill(
    data: Any = "stamps",
    teachers: Sequence[str | Path | nn.Module | Teacher] | str | Path | nn.Module | Teacher = (),
    student: str | VitConfig | nn.Module | None = None,
    preset: str | None = None,
    out: str | Path = "runs/distill",
    method: Method | None = None,
    **overrides: Any,
) -> DistillResult:
    """Distil teachers into a student, as `comad distill` does.

    Args:
        data: a folder of images, the name of a bundled set, a `torch.utils.data.Dataset` of images, or `Splits`.
        teachers: each a name as on the command line, a module (timm's, transformers', your own: normalised pixels
            (B, 3, H, W) → map (B, E, h, w) or tokens (B, N, E)), or a `Teacher`; one alone needs no list. Left out:
            those of the bundled set.
        student: a name as on the command line, a `VitConfig`, or a module, which is trained in place: a model of timm
            (without a head), of torchvision or of transformers, or your own, see docs/adding.md.
        preset: a key of `comad.METHODS`; None: ``comad`` for a plain Vision Transformer as the student, ``consensus``
            for other networks.
        out: folder of the run.
        method: what fills the slots, in the place of the preset's.
        overrides: any option of `comad distill` by its name: ``epochs=10``, ``batch_size=64``, ``image_size=96``,
            ``fusion="mean"``, ``split="val"``, ``resume=True``, ``budget="20min"``; or a
            group of them: ``optim={"epochs": 10}``.

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
    config = preset_recipe(preset or _default_for(student), demo=bundled)
    config = replace(config, data=str(data) if isinstance(data, str | Path) else f"own {type(data).__name__}")
    specs = _listed(teachers)
    names = tuple(spec for spec in specs if isinstance(spec, str))
    config = replace(config, teachers=names if specs else config.teachers, run=replace(config.run, out=str(out)))
    if method is not None:
        if not isinstance(method, Method):
            raise ValueError(f"{method!r} is no method; pass one of comad.METHODS, or a preset by its name.")
        config = config.with_method(method, config.preset)
    module = student if isinstance(student, nn.Module) else None
    if student is not None:
        config = replace(config, student=_student_config(student, config.student))
    splits = None if isinstance(data, str | Path) else data if isinstance(data, Splits) else load_images(data)
    if not bundled:
        config = _fitted(config, splits or data, overrides, student is None or isinstance(student, str))
    config = override(config, overrides)
    objects = None if len(names) == len(specs) else specs
    inputs = Inputs(splits=splits, teachers=objects, student=module)
    result = run_distillation(within_budget(config, inputs), inputs)
    assert result is not None, "only the first of several processes has a result"
    return result


def _default_for(student: Any) -> str:
    """The preset for a student that may be a name, a config, a module, or left out."""
    if isinstance(student, Mapping):
        student = student.get("name")
    if isinstance(student, nn.Module):
        return "comad" if isinstance(student, VisionTransformer) else "consensus"
    name = getattr(student, "name", student)
    return default_for(name if isinstance(name, str) and name else IMAGES.student.name)


def _listed(teachers: Any) -> list[Any]:
    """Teachers as a list; files as text."""
    one = teachers is None or isinstance(teachers, str | os.PathLike | nn.Module | Teacher)
    given = [] if teachers is None else [teachers] if one else list(cast(Any, teachers))
    return [os.fspath(spec) if isinstance(spec, os.PathLike) else spec for spec in given]


def _student_config(student: Any, default: VitConfig) -> VitConfig:
    """What a student is built of, and its export too."""
    if isinstance(student, VitConfig):
        return student
    default = replace(default, width=None, depth=None, heads=None)
    if isinstance(student, str):
        return default.called(student)
    if not isinstance(student, nn.Module):
        raise ValueError(f"{student!r} is no student; give a network, or its name.")
    known: Any = getattr(student, "pretrained_cfg", None) or {}
    name = known.get("architecture", type(student).__name__)
    if not isinstance(student, VisionTransformer):
        config = replace(default.called(name), patch_size=None, pretrained=False)
        return config if name == type(student).__name__ else _same_shapes(student, config)
    embed, block = student.patch_embed, cast(Any, student.blocks)[0]
    if len({*embed.img_size}) > 1 or len({*embed.patch_size}) > 1:
        raise ValueError(f"a student's images and patches are squares, not {embed.img_size} and {embed.patch_size}.")
    return VitConfig(
        name=known.get("architecture", "vit_tiny_patch16_224"),
        image_size=embed.img_size[0],
        patch_size=embed.patch_size[0],
        width=student.embed_dim,
        depth=len(student.blocks),
        heads=block.attn.num_heads,
    )


def _same_shapes(student: nn.Module, config: VitConfig) -> VitConfig:
    """Make sure that timm builds a network as this one by its name, which the export says.

    Raises:
        ValueError: it does not.
    """
    named = timm.create_model(config.name, num_classes=0, **config.arguments).state_dict()
    if any(key not in named or named[key].shape != x.shape for key, x in student.state_dict().items()):
        raise ValueError(
            f"timm builds another network than this one as {config.name!r}: make yours by timm.create_model("
            f"{config.name!r}, num_classes=0), or wrap it in a module of your own whose forward gives its features."
        )
    return config


def override(config: Any, values: Mapping[str, Any]) -> Any:
    """A config with options changed by their names, wherever they stand in it.

    Raises:
        ValueError: no such option, or a value that it cannot have.
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
        elif not is_dataclass(old):
            value = _checked(config, name, value)
        return replace(config, **{name: value})
    for field in own:
        group = getattr(config, field)
        if is_dataclass(group) and name in _names(group):
            return replace(config, **{field: _override(group, name, value)})
    raise ValueError(f"no option {name!r}; {hint(name, sorted(_names(config)))}")


def _checked(config: Any, name: str, value: Any) -> Any:
    """A value of the type that an option has."""
    try:
        return TypeAdapter(get_type_hints(type(config))[name]).validate_python(value)
    except ValidationError as error:
        told = "; ".join(dict.fromkeys(part["msg"] for part in error.errors()))
        raise ValueError(f"{name}={value!r}: {told}.") from error


def _names(config: Any) -> set[str]:
    """Options of a config and of its groups."""
    found = {field.name for field in fields(config)}
    groups = [getattr(config, name) for name in found]
    return found.union(*(_names(group) for group in groups if is_dataclass(group)))


def load_student(name: str = "vit_tiny_patch16_224", **options: Any) -> Backbone:
    """A network to train, of timm by its name.

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


def finetune(
    backbone: str | Backbone | Teacher, data: Any = "stamps", out: str | Path = "runs/finetune", **overrides: Any
) -> Finetuned:
    """Train the whole of a backbone with labels, as `comad evaluate finetune` does.

    Args:
        backbone: a name, or a network, of which a copy learns.
        data: a folder with one sub-folder per label, a bundled name, a `Dataset`, or `Splits`.
        out: folder of the run.
        overrides: any option of the command by its name; ``export=("timm", "onnx")`` writes files of the classifier.

    Returns:
        The score, the classifier that was chosen, and the folder with its files.

    Raises:
        ValueError: the data has no labels, or an option is wrong.
    """
    named = str(data) if isinstance(data, str | Path) else ""
    config = FinetuneConfig(backbone="", data=named, tuning=tuning_recipe("", named))
    config = override(replace(config, run=replace(config.run, out=str(out))), overrides)
    splits = data if isinstance(data, Splits) else config.load_images() if named else load_images(data)
    check_finetune(config, splits)
    if isinstance(backbone, str):
        config = replace(config, backbone=backbone)
        backbone = load_one(backbone, named, config.image_size)
    done, _ = finetune_teacher(config, backbone, splits)
    assert done is not None, "only the first of several processes has a result"
    return done


def compare(
    presets: Sequence[str],
    data: str | Path = "stamps",
    teachers: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path = "runs/compare",
    **overrides: Any,
) -> dict[str, Any]:
    """Methods, teacher sets and seeds side by side, as `comad compare` does. The same call again goes on.

    Args:
        presets: the methods, each a preset with options of `comad distill`: ``"comad --masking.mask-ratio 0.8"``.
        data: a folder of images, or the name of a bundled set.
        teachers: names.
        seeds: every row is trained once for each.
        out: folder of the comparison.
        overrides: any option of the command by its name.

    Returns:
        What ``comparison.json`` holds: rows with means, paired differences and intervals.

    Raises:
        ValueError: nothing to compare, an unknown name, no labels, or the folder of another comparison.
    """
    base = preset_recipe("comad", demo=str(data) == "stamps")
    base = replace(base, data=str(data), teachers=tuple(teachers) or base.teachers, run=replace(base.run, out=str(out)))
    config = CompareConfig(presets=tuple(presets), seeds=tuple(seeds), recipe=base, tuning=tuning_recipe("", str(data)))
    run_comparison(override(config, overrides))
    table = json.loads((Path(out) / "comparison.json").read_text(encoding="utf-8"))
    return {key: value for key, value in table.items() if key != KEY}


def pretrain(method: str, data: str | Path = "stamps", out: str | Path | None = None, **overrides: Any) -> Path:
    """Train a teacher from scratch, as `comad pretrain` does.

    Args:
        method: ``mae``, ``mocov3`` or ``ibot``.
        data: a folder of images, or the name of a bundled set.
        out: folder of the run.
        overrides: any option of the command by its name.

    Returns:
        The folder of the teacher: a name that ``teachers=`` takes.

    Raises:
        ValueError: an unknown method, or an option is wrong.
    """
    config = replace(pretrain_recipe(method), data=str(data))
    if out is not None:
        config = replace(config, run=replace(config.run, out=str(out)))
    folder = run_pretraining(override(config, overrides))
    assert folder is not None, "only the first of several processes has a result"
    return folder


def plan(
    data: str | Path = "stamps", teachers: Sequence[str] = (), preset: str | None = None, **overrides: Any
) -> Plan:
    """What a distillation will cost, measured by a few of its steps, as `comad plan` does. Nothing is left behind.

    Args:
        data: see `distill`.
        teachers: see `distill`.
        preset: see `distill`.
        overrides: any option of `comad distill` by its name.

    Raises:
        ValueError: see `distill`.
    """
    preset = preset or _default_for(overrides.get("student"))
    config = replace(preset_recipe(preset, demo=str(data) == "stamps"), data=str(data))
    config = replace(config, teachers=tuple(teachers) or config.teachers)
    if str(data) != "stamps":
        config = _fitted(config, data, overrides, True)
    return plan_distillation(override(config, overrides))


def _fitted(config: DistillConfig, data: Any, overrides: Mapping[str, Any], sized: bool) -> DistillConfig:
    """The recipe for own images, but for what is given; whether teachers are cached is left to who calls."""
    names = {*overrides, *(key for group in overrides.values() if isinstance(group, Mapping) for key in group)}
    config = override(config, {name: overrides[name] for name in config.data_options if name in overrides})
    given = [flag for flag in FLAGS if flag.rpartition(".")[2].removeprefix("--").replace("-", "_") in names]
    return fitted(config, [*given, *CACHE_FLAGS, *(() if sized else SIZE_FLAGS)], data)
