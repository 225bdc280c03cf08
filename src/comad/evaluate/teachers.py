"""The verb `comad teachers`. Add a sub-command: its config and function in a file, an entry in `COMMANDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comad.evaluate.catalogue import ListConfig, list_teachers
from comad.evaluate.comparison import CompareConfig, compare
from comad.evaluate.inspection import InspectConfig, inspect

COMMANDS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "list": (ListConfig, list_teachers),
    "inspect": (InspectConfig, inspect),
    "compare": (CompareConfig, compare),
}
