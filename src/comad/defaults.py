"""From ``--preset`` and ``--recipe`` of a command to the values that its other options change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any


def distillation(arguments: list[str]) -> Any:
    """The recipe that options of a distillation change; takes ``--preset`` and ``--recipe`` away."""
    from comad import presets
    from comad.distill.config import DistillConfig

    preset, recipe_file = take(arguments, "--preset"), take(arguments, "--recipe")
    own_data = peek(arguments, "--data") not in (None, "stamps")
    default = presets.recipe(preset or "comad", demo=not own_data)
    if recipe_file:
        default = read(DistillConfig, recipe_file)
        if preset:
            default = replace(default, method=presets.METHODS[preset], preset=preset)
    return default


def presets_help() -> str:
    """What ``--help`` says about these two options of a distillation."""
    from comad.presets import METHODS

    return f"--preset {{{','.join(METHODS)}}} and --recipe FILE.yaml choose the values that the options change."


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
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def take(arguments: list[str], flag: str) -> str | None:
    """Like `peek`, and removes the flag and its value."""
    value = peek(arguments, flag)
    if value is not None:
        if flag in arguments:
            position = arguments.index(flag)
            del arguments[position : position + 2]
        else:
            arguments.remove(f"{flag}={value}")
    return value
