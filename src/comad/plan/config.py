"""What is planned, and for which machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from comad.distill.config import DistillConfig
from comad.evaluate.detection.config import COCO, DetectConfig
from comad.evaluate.segmentation.config import ADE20K, SegmentConfig


@dataclass(frozen=True, kw_only=True)
class Target:
    """Another machine than this one, and how the forecast is printed.

    Args:
        gpus: GPUs of the other machine.
        gpu_tflops: what one of them computes at best, 10¹² operations per second in the run's precision; 312 is an A100
            in bf16.
        mfu: share of that which training reaches.
        gpu_cores: CPU cores per GPU that decode images, as fast as this machine's.
        json: print one JSON object.
    """

    gpus: int = 8
    gpu_tflops: float = 312.0
    mfu: float = 0.3
    gpu_cores: int = 12
    json: bool = False

    def check(self) -> None:
        """Raise ValueError for a machine that there cannot be."""
        for flag in ("gpus", "gpu_tflops", "mfu", "gpu_cores"):
            if getattr(self, flag) <= 0 or self.mfu > 1:
                name, value = ("mfu", self.mfu) if self.mfu > 1 else (flag, getattr(self, flag))
                limit = "above 0 and at most 1" if name == "mfu" else "above 0"
                raise ValueError(f"--{name.replace('_', '-')} {value} must be {limit}.")


@dataclass(frozen=True, kw_only=True)
class DistillPlan(Target):
    """Say what a distillation will cost: images/s, memory, hours, disk, FLOPs, here and on other GPUs.

    Args:
        recipe: of the distillation.
    """

    recipe: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)


@dataclass(frozen=True, kw_only=True)
class SegmentPlan(Target):
    """Say what `comad evaluate segment` will cost: images/s, memory, hours, disk, FLOPs, here and on other GPUs.

    Args:
        recipe: of the training.
    """

    recipe: Annotated[SegmentConfig, tyro.conf.arg(name="")] = ADE20K


@dataclass(frozen=True, kw_only=True)
class DetectPlan(Target):
    """Say what `comad evaluate detect` will cost: images/s, memory, hours, disk, FLOPs, here and on other GPUs.

    Args:
        recipe: of the training.
    """

    recipe: Annotated[DetectConfig, tyro.conf.arg(name="")] = COCO
