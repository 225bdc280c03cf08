"""What `comad plan` can plan. Add one: an entry in `TASKS`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import tyro

from comad.distill.config import DistillConfig
from comad.evaluate.detection.config import COCO, DetectConfig
from comad.evaluate.segmentation.config import ADE20K, SegmentConfig
from comad.plan.dense import plan_detection, plan_segmentation
from comad.plan.distillation import plan_distillation
from comad.plan.forecast import Plan, Target


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


class Task(NamedTuple):
    """Options of a plan, and how its recipe is planned."""

    kind: type[Any]
    make: Callable[[Any], Plan]


TASKS = {
    "distill": Task(DistillPlan, plan_distillation),
    "segment": Task(SegmentPlan, plan_segmentation),
    "detect": Task(DetectPlan, plan_detection),
}


def plan(task: str, config: Any) -> str:
    """Measure, and tell what the recipe will cost: a table, or JSON. ``config`` is of the task's kind.

    Raises:
        ValueError: a machine that there cannot be, or what the task itself refuses.
    """
    config.check()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so that folders are removed
    try:
        forecast = TASKS[task].make(config.recipe)
    finally:
        signal.signal(signal.SIGTERM, before)
    return json.dumps(forecast.as_dict(config)) if config.json else forecast.text(config)
