"""Slots: a base class whose members are its named subclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from comad.runtime.spelling import hint


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A choice by name. A direct subclass with a ``slot`` is one; a subclass of that with a ``name`` is a member."""

    slot: ClassVar[str]
    name: ClassVar[str]
    members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, name: str = "", slot: str = "", **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if slot:
            cls.slot, cls.members = slot, {}
        elif name:
            cls.name = name
            cls.members[name] = cls

    @classmethod
    def choose(cls, name: str) -> Self:
        """The member of that name, with its defaults.

        Raises:
            ValueError: there is none.
        """
        if name not in cls.members:
            raise ValueError(f"no {cls.slot} {name!r}; {hint(name, cls.members)}")
        return cls.members[name]()
