"""From a command line to a config: tyro over frozen dataclasses, with a short ``--help`` and a long one."""

from __future__ import annotations

import dataclasses
import inspect
from itertools import zip_longest
from typing import Annotated, Any, TypeVar, cast, get_type_hints

Config = TypeVar("Config")

MORE = "This shows what most people set; --help-all lists every option."


def parse(
    kind: type[Config], default: Config | None, arguments: list[str], program: str, description: str = ""
) -> Config:
    """Options over defaults.

    Args:
        kind: a frozen dataclass; its docstring's ``Args`` are the help of its options.
        default: the values that options change; None: those of ``kind``.
        arguments: what is left of the command line.
        program, description: for ``--help``, which shows the fields that are marked ``COMMON``; all by
            ``--help-all``.
    """
    import tyro

    arguments = _with_values(arguments)
    everything, short = "--help-all" in arguments, bool({"-h", "--help"} & set(arguments))
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    given = {} if default is None else {"default": default}
    registry = tyro.constructors.ConstructorRegistry()
    if short and not everything and _has_common(kind):
        registry.struct_rule(_common_only)
        description = f"{description} {MORE}".strip()
    with registry:
        run: Any = tyro.cli
        return run(
            tyro.conf.AvoidSubcommands[kind],
            args=arguments,
            prog=program,
            description=description or inspect.getdoc(kind),
            **given,
        )


def _with_values(arguments: list[str]) -> list[str]:
    """``--run.resume`` alone means yes: an option of yes, no or a word has a value for tyro."""
    found = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        found.append("--run.resume=False" if argument == "--run.no-resume" else argument)
        if argument == "--run.resume" and following not in ("True", "False", "auto"):
            found.append("True")
    return found


def _has_common(kind: Any) -> bool:
    """Whether a config marks options of its own, beside those that it has in common with others."""
    own = inspect.get_annotations(kind)
    return any(field.metadata.get("common") for field in dataclasses.fields(kind) if field.name in own)


def _common_only(info: Any) -> Any:
    """A rule for tyro: of a dataclass show the fields that are marked, and the groups in which any is."""
    import tyro

    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    texts = docs_of(info.type)
    specs = []
    for field in dataclasses.fields(info.type):
        if not field.init:
            continue
        value = getattr(info.default, field.name, _default_of(field, tyro))
        group = dataclasses.is_dataclass(value) or isinstance(value, dict)
        kind = hints[field.name]
        shown = kind if group or field.metadata.get("common") else Annotated[kind, tyro.conf.Suppress]
        if group:
            shown = kind if _any_common(value) else Annotated[kind, tyro.conf.Suppress]
        specs.append(
            tyro.constructors.StructFieldSpec(
                name=field.name,
                type=shown,  # pyright: ignore[reportArgumentType]
                default=value,
                helptext=texts.get(field.name),  # pyright: ignore[reportArgumentType]
            )
        )
    return tyro.constructors.StructConstructorSpec(instantiate=cast(type, info.type), fields=tuple(specs))


def _any_common(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else [getattr(value, f.name) for f in dataclasses.fields(value)]
    own = () if isinstance(value, dict) else dataclasses.fields(value)
    nested = [part for part in parts if dataclasses.is_dataclass(part) or isinstance(part, dict)]
    return any(field.metadata.get("common") for field in own) or any(map(_any_common, nested))


def _default_of(field: dataclasses.Field, tyro: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING


def docs_of(kind: Any) -> dict[str, str]:
    """Option → its sentence in the ``Args`` of the docstring of a dataclass or of one that it extends."""
    import docstring_parser

    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for part in docstring_parser.parse(inspect.getdoc(base) or "").params if "__doc__" in vars(base) else ():
            found[part.arg_name] = " ".join((part.description or "").split())
    return found


def pop_flag(arguments: list[str], flag: str) -> str | None:
    """Like `pop_all`; the last value counts."""
    values = pop_all(arguments, flag)
    return values[-1] if values else None


def get_flag(arguments: list[str], flag: str) -> str | None:
    """Like `pop_flag`, and leaves it there."""
    return pop_flag(list(arguments), flag)


def pop_all(arguments: list[str], flag: str) -> list[str]:
    """All values of a flag, given as ``--flag value`` or ``--flag=value``, which are taken away."""
    values, position = [], 0
    while position < len(arguments):
        if arguments[position] == flag and position + 1 < len(arguments):
            del arguments[position]
            values.append(arguments.pop(position))
        elif arguments[position].startswith(f"{flag}="):
            values.append(arguments.pop(position).split("=", 1)[1])
        else:
            position += 1
    return values
