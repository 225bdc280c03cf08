"""From ``--preset`` and ``--recipe`` of a command to the values that its other options change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


def distillation(arguments: list[str], students: Sequence[str] = ()) -> Any:
    """The recipe that options of a distillation change; takes ``--preset`` and ``--recipe`` away.

    ``students``, if named, replace the recipe's: its image and patches, in the architecture of the first.
    """
    from comad import presets
    from comad.distill.config import DistillConfig

    preset, recipe_file = take(arguments, "--preset"), take(arguments, "--recipe")
    own_data = peek(arguments, "--data") not in (None, "stamps")
    default = presets.recipe(preset or "comad", demo=not own_data)
    if recipe_file:
        default = read(DistillConfig, recipe_file)
        if preset:
            default = replace(default, method=presets.METHODS[preset], preset=preset)
    if students:
        plain = replace(default.student, name=students[0], width=None, depth=None, heads=None)
        default = replace(default, student=plain, beside=())
    return default


def presets_help() -> str:
    """What ``--help`` says about the options of a distillation that choose others."""
    from comad.presets import METHODS

    return (
        f"--preset {{{','.join(METHODS)}}} and --recipe FILE.yaml choose the values that the options change. "
        "--student NAME names timm's architecture; several times, for several students that share the teachers' "
        "passes, each in a folder of its own. The options of --student.* then hold for all of them."
    )


def segmentation(arguments: list[str]) -> Any:
    """See `distillation`."""
    from comad.evaluate.segmentation.config import SegmentConfig, recipe

    default = recipe(take(arguments, "--preset") or "ade20k", peek(arguments, "--head") or "upernet")
    recipe_file = take(arguments, "--recipe")
    return read(SegmentConfig, recipe_file) if recipe_file else default


def detection(arguments: list[str]) -> Any:
    """See `distillation`."""
    from comad.evaluate.detection.config import DetectConfig, recipe

    default, recipe_file = recipe(take(arguments, "--preset") or "coco"), take(arguments, "--recipe")
    return read(DetectConfig, recipe_file) if recipe_file else default


def read(kind: type, path: str) -> Any:
    """A recipe file."""
    from comad.runtime.recipe import read_recipe

    return read_recipe(kind, Path(path))


def peek(arguments: list[str], flag: str) -> str | None:
    """The value of a flag, given as ``--flag value`` or ``--flag=value``."""
    return take(list(arguments), flag)


def take(arguments: list[str], flag: str) -> str | None:
    """Like `peek`, and removes the flag and its value."""
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            del arguments[position]
            return arguments.pop(position)
        if argument.startswith(f"{flag}="):
            return arguments.pop(position).split("=", 1)[1]
    return None


def take_all(arguments: list[str], flag: str) -> list[str]:
    """All values of a flag that may be given several times."""
    return list(iter(lambda: take(arguments, flag), None))


def beside(config: Any, students: Sequence[str]) -> Any:
    """A distillation with all students that were named, alike but for their architecture."""
    return (
        replace(config, beside=tuple(replace(config.student, name=name) for name in students[1:]))
        if students
        else config
    )
