"""Distil several frozen vision teachers into one compact student.

    import comad

    result = comad.distill(data="photos", teachers=["dino=dino.pth", module], out="runs/mine")
    result.student, result.transform, result.scoreboard

Names are imported when they are asked for, so that ``import comad`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC = {
    "comad.api": (
        "compare",
        "distill",
        "embed",
        "evaluate",
        "export",
        "finetune",
        "load_backbone",
        "load_student",
        "load_teachers",
        "plan",
        "pretrain",
        "report",
    ),
    "comad.data.images": ("ImageSet", "Splits"),
    "comad.data.load": ("load_images",),
    "comad.distillation.aligners": (
        "Aligner",
        "AutoencoderAdapter",
        "ProcrustesAligner",
        "StudentProjector",
        "TrainedAdapter",
    ),
    "comad.distillation.config": ("DistillConfig",),
    "comad.distillation.distiller": ("Distiller",),
    "comad.distillation.features": (
        "Blocks",
        "FeatureSpec",
        "MAEDecoder",
        "StudentOutput",
        "TeacherOutput",
        "forward_teacher",
    ),
    "comad.distillation.fusion": ("DropEasiest", "Fusion", "Gate", "LossGate", "Mean", "Pair", "Sum"),
    "comad.distillation.masking": (
        "Disjoint",
        "HidingPatches",
        "Independent",
        "Masking",
        "Masks",
        "Shared",
        "Superset",
        "WholeImages",
    ),
    "comad.distillation.method": ("Method",),
    "comad.distillation.normalizers": ("L2", "PHIS", "LayerNorm", "NoNormalizer", "Normalizer", "Standardize"),
    "comad.distillation.objectives": (
        "DISTANCES",
        "AttentionLoss",
        "FeatureLoss",
        "Objective",
        "PixelLoss",
        "QueueLoss",
        "RelationLoss",
    ),
    "comad.distillation.results": ("DistillResult",),
    "comad.evaluation.command": ("evaluate",),
    "comad.evaluation.embed": ("EmbedConfig", "embed"),
    "comad.evaluation.evaluation": ("Evaluation",),
    "comad.exporting.command": ("export_model",),
    "comad.exporting.config": ("ExportConfig",),
    "comad.models.backbone": ("Backbone", "Tokens"),
    "comad.models.students": ("VitConfig",),
    "comad.models.teachers": ("Teacher", "TeacherCard", "load_teacher"),
    "comad.presets": ("METHODS",),
    "comad.reporting.page": ("write_report",),
    "comad.runtime.slots": ("Slot", "load_plugins"),
    "comad.runtime.trainer": ("Job", "Trainer"),
}
"""Module → the names that `comad` gives of it."""

_MODULES = {name: module for module, names in PUBLIC.items() for name in names}
__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from comad.api import compare as compare
    from comad.api import distill as distill
    from comad.api import finetune as finetune
    from comad.api import load_backbone as load_backbone
    from comad.api import load_student as load_student
    from comad.api import load_teachers as load_teachers
    from comad.api import plan as plan
    from comad.api import pretrain as pretrain
    from comad.data.images import ImageSet as ImageSet
    from comad.data.images import Splits as Splits
    from comad.data.load import load_images as load_images
    from comad.distillation.aligners import Aligner as Aligner
    from comad.distillation.aligners import AutoencoderAdapter as AutoencoderAdapter
    from comad.distillation.aligners import ProcrustesAligner as ProcrustesAligner
    from comad.distillation.aligners import StudentProjector as StudentProjector
    from comad.distillation.aligners import TrainedAdapter as TrainedAdapter
    from comad.distillation.config import DistillConfig as DistillConfig
    from comad.distillation.distiller import Distiller as Distiller
    from comad.distillation.features import Blocks as Blocks
    from comad.distillation.features import FeatureSpec as FeatureSpec
    from comad.distillation.features import MAEDecoder as MAEDecoder
    from comad.distillation.features import StudentOutput as StudentOutput
    from comad.distillation.features import TeacherOutput as TeacherOutput
    from comad.distillation.features import forward_teacher as forward_teacher
    from comad.distillation.fusion import DropEasiest as DropEasiest
    from comad.distillation.fusion import Fusion as Fusion
    from comad.distillation.fusion import Gate as Gate
    from comad.distillation.fusion import LossGate as LossGate
    from comad.distillation.fusion import Mean as Mean
    from comad.distillation.fusion import Pair as Pair
    from comad.distillation.fusion import Sum as Sum
    from comad.distillation.masking import Disjoint as Disjoint
    from comad.distillation.masking import HidingPatches as HidingPatches
    from comad.distillation.masking import Independent as Independent
    from comad.distillation.masking import Masking as Masking
    from comad.distillation.masking import Masks as Masks
    from comad.distillation.masking import Shared as Shared
    from comad.distillation.masking import Superset as Superset
    from comad.distillation.masking import WholeImages as WholeImages
    from comad.distillation.method import Method as Method
    from comad.distillation.normalizers import L2 as L2
    from comad.distillation.normalizers import PHIS as PHIS
    from comad.distillation.normalizers import LayerNorm as LayerNorm
    from comad.distillation.normalizers import NoNormalizer as NoNormalizer
    from comad.distillation.normalizers import Normalizer as Normalizer
    from comad.distillation.normalizers import Standardize as Standardize
    from comad.distillation.objectives import DISTANCES as DISTANCES
    from comad.distillation.objectives import AttentionLoss as AttentionLoss
    from comad.distillation.objectives import FeatureLoss as FeatureLoss
    from comad.distillation.objectives import Objective as Objective
    from comad.distillation.objectives import PixelLoss as PixelLoss
    from comad.distillation.objectives import QueueLoss as QueueLoss
    from comad.distillation.objectives import RelationLoss as RelationLoss
    from comad.distillation.results import DistillResult as DistillResult
    from comad.evaluation.command import evaluate as evaluate
    from comad.evaluation.embed import EmbedConfig as EmbedConfig
    from comad.evaluation.embed import embed as embed
    from comad.evaluation.evaluation import Evaluation as Evaluation
    from comad.exporting.command import export_model as export_model
    from comad.exporting.config import ExportConfig as ExportConfig
    from comad.models.backbone import Backbone as Backbone
    from comad.models.backbone import Tokens as Tokens
    from comad.models.students import VitConfig as VitConfig
    from comad.models.teachers import Teacher as Teacher
    from comad.models.teachers import TeacherCard as TeacherCard
    from comad.models.teachers import load_teacher as load_teacher
    from comad.presets import METHODS as METHODS
    from comad.reporting.page import write_report as write_report
    from comad.runtime.slots import Slot as Slot
    from comad.runtime.slots import load_plugins as load_plugins
    from comad.runtime.trainer import Job as Job
    from comad.runtime.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'comad' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
