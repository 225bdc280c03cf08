"""What is known of an option on its field: whether it changes the result, whether ``--help`` shows it at first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

NO_EFFECT = {"affects_result": False}
"""Metadata of a field that changes cost or place alone: a run may go on with another value, comparisons ignore it."""
COMMON = {"common": True}
"""Metadata of a field that most people set: ``--help`` shows it, the others are shown by ``--help-all``."""


def identity_of(value: Any) -> Any:
    """What the result of a run depends on, as nested plain values: all fields but those marked `NO_EFFECT`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(type(value), "name", None)  # of a member of a slot
        own = {"name": name} if isinstance(name, str) else {}
        fields = [f for f in dataclasses.fields(value) if f.metadata.get("affects_result", True)]
        return {**own, **{field.name: identity_of(getattr(value, field.name)) for field in fields}}
    if isinstance(value, Mapping):
        return {str(key): identity_of(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [identity_of(part) for part in value]
    return value
