"""What one job costs for each step, by a few of its own steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from comad.plan.profile import (
    Flops,
    StepProfile,
    count_flops,
    largest_that_fits,
    profile_steps,
    resized,
    seconds_per_view,
)
from comad.runtime.job import Job
from comad.runtime.memory import available_bytes

BUDGET = 16.0
"""Seconds that steps of one kind are measured for; a step that takes longer than half of it is measured on less."""
MOST_STEPS = 40


class Measured(NamedTuple):
    """What the steps of a job cost.

    Attributes:
        steps: what a step took.
        flops: for one image.
        view_seconds: in which one core reads an image.
        readers: cores that read at once.
        peak: bytes of memory at the batch of the run.
        largest_batch, estimated: see `comad.plan.forecast.Plan`.
    """

    steps: StepProfile
    flops: Flops
    view_seconds: float
    readers: int
    peak: int
    largest_batch: int | None
    estimated: bool


def measure(
    job: Job,
    config: Any,
    fabric: Fabric,
    frozen: Sequence[nn.Module] = (),
    probe: Callable[[Any], None] | None = None,
    brief: bool = False,
) -> Measured:
    """Count operations, then take steps of a part of the batch and of all of it, or of as much as is quick.

    Args:
        job, fabric: of `comad.runtime.train.train`.
        config: has ``optim`` and ``run``, of one device.
        frozen: networks whose operations are counted apart.
        probe: see `profile_steps`.
        brief: the time of a step does not matter.
    """
    optim, run = config.optim, config.run
    batch, device = optim.batch_size, fabric.device
    least = min(batch, 2)
    flops, seconds = count_flops(resized(job, least), replace(optim, batch_size=least), run, fabric, frozen)
    few = max(1, min(2, batch // 2), min(batch // 4, int(BUDGET / 8 * least / seconds)))

    def take(size: int, num_steps: int, then: Callable[[Any], None] | None = None) -> StepProfile:
        return profile_steps(resized(job, size), replace(optim, batch_size=size), run, fabric, num_steps, then)

    first = take(few, 3)
    chosen = max(min(batch, 2 * few), min(batch, int(BUDGET / 2 * few / first.seconds)))
    num_steps = 3 if brief else steps_within_budget(chosen * first.seconds / few)
    second = take(chosen, num_steps, probe)
    line = straight_line((first.batch, first.peak), (second.batch, second.peak))
    peak = max(second.probe_peak, round(line[0] + line[1] * batch))
    if device.type == "cuda":
        fits, estimated = largest_that_fits(lambda size: take(size, 2), chosen, int(job.steps_per_epoch * batch)), False
        torch.cuda.empty_cache()
    else:
        fits, estimated = room_for(line, available_bytes(device)), True
    workers = job.batches(0, 1).num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Measured(
        steps=second._replace(starting=max(first.starting, second.starting)),
        flops=flops,
        view_seconds=seconds_per_view(job),
        readers=min(workers, cores),
        peak=peak,
        largest_batch=fits or None,
        estimated=estimated,
    )


def steps_within_budget(seconds: float) -> int:
    """How many steps of such a length are measured."""
    return max(3, min(MOST_STEPS, int(BUDGET / max(seconds, 1e-9))))


def straight_line(a: tuple[int, int], b: tuple[int, int]) -> tuple[float, float]:
    """Bytes without images and bytes of an image, through two points (images, bytes)."""
    slope = (b[1] - a[1]) / (b[0] - a[0]) if b[0] != a[0] else 0.0
    return a[1] - slope * a[0], slope


def room_for(line: tuple[float, float], available: int) -> int:
    """Images whose step fits into memory; 0 where memory did not grow with them."""
    fixed, slope = line
    return max(1, int((available - fixed) / slope)) if slope > 0 else 0
