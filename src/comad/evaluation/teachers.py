"""The verb `comad teachers`. Add a sub-command: its config and function in a file, an entry in `COMMANDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comad.evaluation.catalogue import ListConfig, list_teachers
from comad.evaluation.comparison import CompareConfig, compare
from comad.evaluation.inspection import InspectConfig, inspect

COMMANDS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "list": (ListConfig, list_teachers),
    "inspect": (InspectConfig, inspect),
    "compare": (CompareConfig, compare),
}
