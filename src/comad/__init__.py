"""Distil several frozen vision teachers into one compact student."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from comad.api import distill as distill
    from comad.api import load_backbone as load_backbone
    from comad.api import load_student as load_student
    from comad.api import load_teachers as load_teachers
    from comad.distill.distiller import Distiller as Distiller
    from comad.distill.method import Method as Method
    from comad.models.teachers import load_teacher as load_teacher
    from comad.presets import METHODS as METHODS
