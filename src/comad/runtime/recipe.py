"""Recipes: a config as a YAML file, read strictly and written so that it runs again as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from comad.runtime.atomic import write_text
from comad.runtime.command import get_flag
from comad.runtime.progress import warn
from comad.runtime.spelling import hint

Config = TypeVar("Config")

LARGEST = 2**20
"""Bytes of a recipe; more is none."""


def read_recipe(kind: type[Config], path: Path, upgrade: Callable[[Any], Any] = lambda plain: plain) -> Config:
    """Read a config.

    Args:
        kind: what it is of.
        path: a YAML file.
        upgrade: renames keys of older versions.

    Raises:
        ValueError: no such file, not YAML, an unknown key (with the nearest right one), or a value of the wrong type.
    """
    if not path.is_file():
        raise ValueError(f"no recipe {str(path)!r}; a run writes its own as config.yaml into its folder.")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is no recipe: it has more than {LARGEST:,} bytes.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    given, adapter = upgrade(given), TypeAdapter(kind)
    try:
        config = adapter.validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    _refuse_unknown(given, adapter.dump_python(config, mode="json"), str(path))
    return config


def write_recipe(config: object, path: Path) -> None:
    """Write a resolved config."""
    plain = TypeAdapter(type(config)).dump_python(config, mode="json")
    write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def resumed_recipe(read: Callable[[Path], Config], arguments: list[str], out: str) -> Config | None:
    """The recipe of a run that is to go on, from its folder; None if none goes on, or it cannot be read.

    Args:
        read: the reader, see `read_recipe`.
        arguments: of the command line; ``--run.resume`` and ``--run.out`` are looked at.
        out: the folder, if ``--run.out`` is not given.
    """
    path = Path(get_flag(arguments, "--run.out") or out) / "config.yaml"
    wanted = any(a.partition("=")[0] == "--run.resume" and a != "--run.resume=False" for a in arguments)
    if not wanted or not path.is_file():
        return None
    try:
        return read(path)
    except ValueError as error:
        warn(f"{' '.join(str(error).split())} The options of the command count.")
        return None


def flags(config: object, default: object) -> str:
    """The command-line flags by which a config differs from its default, but for the run's folder and resuming."""
    ours, theirs = (_leaves(TypeAdapter(type(value)).dump_python(value, mode="json")) for value in (config, default))
    changed = {key: value for key, value in ours.items() if value != theirs.get(key)}
    return " ".join(_flag(key, value) for key, value in changed.items() if key not in ("run.out", "run.resume"))


def _leaves(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    found = {}
    for key, value in plain.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _flag(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return f"--{name}" if value else f"--{head}{'.' if head else ''}no-{last}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *map(str, values)])


def _refuse_unknown(given: Any, known: Any, where: str) -> None:
    if not isinstance(given, dict) or not isinstance(known, dict):
        return
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; {hint(str(key), known)}")
        _refuse_unknown(value, known[key], f"{where}: {key}")
