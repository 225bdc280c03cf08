"""The plans of segmentation and detection: steps, and the pictures that are scored between and after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comad.evaluate.dense import PROBED
from comad.evaluate.detection import run as detection
from comad.evaluate.detection.config import DetectConfig
from comad.evaluate.segmentation import run as segmentation
from comad.evaluate.segmentation.config import SegmentConfig
from comad.plan.assemble import Phases, Planned, assemble, engine, share_of, stage
from comad.plan.forecast import Plan
from comad.plan.measure import measure
from comad.plan.profile import now, seconds_of

ANSWERED = 2
"""Pictures of the validation part that are timed."""


def plan_segmentation(config: SegmentConfig) -> Plan:
    """What `comad evaluate segment` will cost. Raises ValueError as `segment` does."""
    return _plan("comad evaluate segment", segmentation.prepare, segmentation.count_answers, config)


def plan_detection(config: DetectConfig) -> Plan:
    """What `comad evaluate detect` will cost. Raises ValueError as `detect` does."""
    return _plan("comad evaluate detect", detection.prepare, detection.score_detector, config)


def _plan(task: str, prepare: Callable[..., Any], score: Callable[..., object], config: Any) -> Plan:
    """Set a training up as the verb does, by its own ``prepare``; ``score`` answers validation pictures."""
    start, devices = now(), config.run.devices
    config, fabric = engine(config)
    job, splits, _ = prepare(config, fabric)
    loading, pictures = now() - start, len(splits.validation)
    quick = replace(config, loader=replace(config.loader, workers=0))
    answered = min(ANSWERED, pictures)

    def seconds_per_picture(module: Any) -> float:
        return seconds_of(lambda: score(module, splits.validation, quick, limit=ANSWERED)) / answered

    probing: list[float] = []
    optim = share_of(config.optim, devices)
    own = replace(config, optim=optim)
    measured = measure(job, own, fabric, probe=lambda module: probing.append(seconds_per_picture(module)))
    outside = seconds_per_picture(job.module)
    steps = config.optim.total_steps(job.steps_per_epoch)
    stages = {"live": stage(float(steps), measured.steps, optim, measured.flops)}
    phases = Phases(loading, 0.0, min(PROBED, pictures) * probing[0], pictures * outside)
    return assemble(Planned(task, config, devices), fabric, measured, stages, phases)
