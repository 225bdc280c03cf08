"""Slots of a method: each is a base class, its members are subclasses with a name, yours too (docs/adding.md)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter
from pydantic_core import core_schema

from comad.runtime.spelling import hint

GROUP = "comad.plugins"
"""Entry points of this group are imported before a command is read."""


@dataclass(frozen=True, kw_only=True)
class Slot(ABC):
    """A choice by name. A direct subclass is a slot; a subclass of that with a ``name`` is a member of it.

    A member is a frozen dataclass: its fields are its options on the command line (``--fusion gate``, then
    ``--fusion.temperature 1``), in recipes (``fusion: {name: gate, temperature: 1}`` or ``fusion: gate``), in Python.

    Attributes:
        slot: what the slot is called on the command line.
        name: what the member is called.
        members: name → class, of the slot.
        default: the member that a recipe means if it names none.
    """

    slot: ClassVar[str]
    default: ClassVar[str]
    name: ClassVar[str]
    members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, name: str = "", slot: str = "", default: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if slot:
            cls.slot, cls.default, cls.members = slot, default, {}
        elif name:
            cls.name = name
            cls.members[name] = cls

    @property
    def of_a_pass(self) -> str:
        """What of it depends on the other images of a forward pass, in words; empty: an image is computed by itself."""
        return ""

    @classmethod
    def choose(cls, name: str) -> Any:
        """The member of that name, with its defaults.

        Raises:
            ValueError: there is none.
        """
        if name not in cls.members:
            raise ValueError(f"no {cls.slot} {name!r}; {hint(name, cls.members)}")
        return cls.members[name]()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Recipes hold a member as its name and its options."""
        if "name" in vars(cls):
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(_dump)
        )

    @classmethod
    def _validate(cls, value: Any) -> Slot:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str | Mapping):
            raise ValueError(f"{value!r} is no {cls.slot}; give a name, or a name and options.")
        options = {"name": value} if isinstance(value, str) else dict(value)
        member: type[Slot] = type(cls.choose(str(options.pop("name", cls.default))))
        known = ["name", *(field.name for field in fields(member))]
        if unknown := sorted(map(str, options.keys() - set(known))):
            raise ValueError(f"unknown key {unknown[0]!r}; {hint(unknown[0], known)}")
        return TypeAdapter(member).validate_python(options)


def _dump(value: Any) -> dict[str, Any]:
    return {"name": value.name, **TypeAdapter(type(value)).dump_python(value, mode="json")}


def load_plugins(files: Sequence[str]) -> None:
    """Import files with members of slots, and what installed packages declare under `GROUP`.

    Raises:
        ValueError: a file is missing, or fails when it is imported.
    """
    _load_installed()
    for file in files:
        path = Path(file).expanduser().resolve()
        module = f"comad_plugin_{path.stem}_{abs(hash(str(path))):x}"
        if module in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(module, path) if path.suffix == ".py" else None
        if spec is None or spec.loader is None or not path.is_file():
            raise ValueError(f"no plugin {file!r}; name a Python file, as in --plugin my_fusion.py.")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module])
        except Exception as error:
            del sys.modules[module]
            raise ValueError(f"plugin {file!r} fails: {type(error).__name__}: {error}; mend it.") from error


@cache
def _load_installed() -> None:
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise ValueError(f"plugin {entry.name!r} fails: {error}; mend or uninstall it.") from error
