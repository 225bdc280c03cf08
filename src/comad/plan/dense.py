"""The plans of segmentation and detection: steps, and the pictures that are scored between and after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_fabric import Fabric

from comad.evaluate.dense import PROBED
from comad.evaluate.detection import run as detection
from comad.evaluate.detection.config import DetectConfig
from comad.evaluate.segmentation import run as segmentation
from comad.evaluate.segmentation.config import SegmentConfig
from comad.plan.assemble import Phases, assemble, engine, share_of, stage
from comad.plan.forecast import Plan
from comad.plan.measure import measure
from comad.plan.rehearsal import now, seconds_of
from comad.runtime.job import Job

ANSWERED = 2
"""Pictures of the validation part that are timed."""


class Prepared(NamedTuple):
    """A training that was set up: its job, the validation pictures, how some of them are scored, and seconds so far."""

    task: str
    job: Job
    pictures: int
    answer: Callable[[Any], object]
    loading: float


def plan_segmentation(config: SegmentConfig) -> Plan:
    """What `comad evaluate segment` will cost. Raises ValueError as `segment` does."""
    start, devices = now(), config.run.devices
    config, fabric = engine(config)
    job, splits, _ = segmentation.prepare(config, fabric)
    quick = replace(config, loader=replace(config.loader, workers=0))

    def answer(module: Any) -> object:
        return segmentation.count_answers(module, splits.validation, quick, limit=ANSWERED)

    prepared = Prepared("comad evaluate segment", job, len(splits.validation), answer, now() - start)
    return _plan(prepared, config, fabric, devices)


def plan_detection(config: DetectConfig) -> Plan:
    """What `comad evaluate detect` will cost. Raises ValueError as `detect` does."""
    start, devices = now(), config.run.devices
    config, fabric = engine(config)
    job, splits, _ = detection.prepare(config, fabric)
    quick = replace(config, loader=replace(config.loader, workers=0))

    def answer(module: Any) -> object:
        return detection.score_detector(module, splits.validation, quick, limit=ANSWERED)

    prepared = Prepared("comad evaluate detect", job, len(splits.validation), answer, now() - start)
    return _plan(prepared, config, fabric, devices)


def _plan(prepared: Prepared, config: Any, fabric: Fabric, devices: int) -> Plan:
    pictures, answered = prepared.pictures, min(ANSWERED, prepared.pictures)
    seconds: list[float] = []
    optim = share_of(config.optim, devices)
    measured = measure(
        prepared.job,
        optim,
        config.run,
        fabric,
        probe=lambda module: seconds.append(seconds_of(lambda: prepared.answer(module)) / answered),
    )
    outside = seconds_of(lambda: prepared.answer(prepared.job.module)) / answered
    steps = config.optim.total_steps(prepared.job.steps_per_epoch)
    return assemble(
        prepared.task,
        config,
        fabric,
        measured,
        {"live": stage(float(steps), measured.steps, optim, measured.flops)},
        phases=Phases(prepared.loading, 0.0, min(PROBED, pictures) * seconds[0], pictures * outside),
        devices=devices,
    )
