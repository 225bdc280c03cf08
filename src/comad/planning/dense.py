"""The plans of segmentation and detection: steps, and the images that are scored between and after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comad.evaluation.dense import PROBED, train_steps
from comad.evaluation.detection import run as detection
from comad.evaluation.detection.config import DetectConfig
from comad.evaluation.segmentation import run as segmentation
from comad.evaluation.segmentation.config import SegmentConfig
from comad.planning.forecast import Plan
from comad.planning.measure import Phases, assemble, engine, measure, share_of
from comad.planning.profile import Training, now, seconds_of

ANSWERED = 2
"""Images of the validation part that are timed."""


def plan_segmentation(config: SegmentConfig) -> Plan:
    """What `comad evaluate segment` will cost. Raises ValueError as `segment` does."""
    return _plan("comad evaluate segment", segmentation.prepare, segmentation.count_answers, config)


def plan_detection(config: DetectConfig) -> Plan:
    """What `comad evaluate detect` will cost. Raises ValueError as `detect` does."""
    return _plan("comad evaluate detect", detection.prepare, detection.score_detector, config)


def _plan(task: str, prepare: Callable[..., Any], score: Callable[..., object], config: Any) -> Plan:
    """Set a training up as the verb does, by its own ``prepare``; ``score`` answers validation images."""
    start = now()
    alone, fabric = engine(config)
    job, data, splits, _ = prepare(alone, fabric)
    loading, images = now() - start, len(splits.validation)
    quick = replace(alone, loader=replace(alone.loader, workers=0))

    def seconds_per_image(module: Any) -> float:
        return seconds_of(lambda: score(module, splits.validation, quick, limit=ANSWERED)) / min(ANSWERED, images)

    probing: list[float] = []
    training = Training(job, data, share_of(config), fabric, train_steps)
    measured = measure(training, probe=lambda module: probing.append(seconds_per_image(module)))
    steps = config.optim.total_steps(config.optim.steps_per_epoch(data.num_images))
    phases = Phases(loading, 0.0, min(PROBED, images) * probing[0], images * seconds_per_image(job.module), images)
    return assemble(task, config, measured, {"live": measured.stage(steps)}, phases, cache=0, export=0)
