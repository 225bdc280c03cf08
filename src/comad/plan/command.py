"""What `comad plan` can plan. Add one: an entry in `TASKS`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from comad.plan.config import DetectPlan, DistillPlan, SegmentPlan
from comad.plan.dense import plan_detection, plan_segmentation
from comad.plan.distillation import plan_distillation
from comad.plan.forecast import Plan


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
