"""What distillation and dense training have in common: steps are measured, and put together with the other phases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from comad.planning.forecast import Disk, Plan, Stage
from comad.planning.profile import (
    Flops,
    StepProfile,
    Training,
    count_flops,
    largest_that_fits,
    profile_steps,
    seconds_per_view,
)
from comad.runtime.memory import available_bytes, peak_bytes
from comad.runtime.optim import OptimConfig
from comad.runtime.processes import refuse_several
from comad.runtime.provenance import hardware
from comad.runtime.run import start_fabric

BUDGET = 16.0
"""Seconds that steps of one kind are measured for; a step that takes longer than half of it is measured on less."""
MOST_STEPS = 40


class Measured(NamedTuple):
    """What the steps of a training cost.

    Attributes:
        training: of one device.
        steps: what a step took.
        flops: for one image.
        operations: of a step.
        view_seconds: in which one core reads an image.
        peak: bytes of memory at the batch of the run.
        largest_batch, estimated: see `comad.planning.forecast.Plan`.
    """

    training: Training
    steps: StepProfile
    flops: Flops
    operations: int
    view_seconds: float
    peak: int
    largest_batch: int | None
    estimated: bool

    def stage(self, count: int | float, took: StepProfile | None = None, cached: bool = False) -> Stage:
        """So many optimiser steps, from forward passes of another batch; from a cache teachers compute nothing."""
        took, optim = took or self.steps, self.training.optim
        flops = self.flops._replace(teachers=0.0) if cached else self.flops
        return Stage(count, took.seconds * optim.batch_size / took.batch * optim.accumulate, flops)


class Phases(NamedTuple):
    """Seconds of what is not training: once each, a probe as often as the run takes one; and the images scored."""

    loading: float
    calibration: float
    probe: float
    scoring: float
    scored: int


def engine(config: Any) -> tuple[Any, Fabric]:
    """One device for the measurements, and the config for it."""
    refuse_several(1, "comad plan")
    config = replace(config, run=replace(config.run, devices=1, resume=False))
    return config, start_fabric(config.run)


def share_of(config: Any) -> OptimConfig:
    """What one of the run's devices computes."""
    optim = config.optim
    size = max(1, optim.pass_size // config.run.devices)
    return replace(optim, batch_size=size, microbatch=None, accumulate=optim.passes)


def measure(
    training: Training,
    frozen: Sequence[nn.Module] = (),
    probe: Callable[[Any], object] | None = None,
    brief: bool = False,
) -> Measured:
    """Count operations, then take steps of a part of the batch and of all of it, or of as much as is quick.

    Args:
        training: of one device.
        frozen: networks whose operations are counted apart.
        probe: see `comad.planning.profile.ProfiledTrainer`.
        brief: the time of a step does not matter.
    """
    batch, device = training.optim.batch_size, training.fabric.device
    least = min(batch, 2)
    flops, operations, seconds = count_flops(training, least, frozen)
    few = max(1, min(2, batch // 2), min(batch // 4, int(BUDGET / 8 * least / seconds)))
    first = profile_steps(training, few, 3)
    chosen = max(min(batch, 2 * few), min(batch, int(BUDGET / 2 * few / first.seconds)))
    num_steps = 3 if brief else steps_within_budget(chosen * first.seconds / few)
    second = profile_steps(training, chosen, num_steps, probe)
    with_probe = peak_bytes(device)
    line = straight_line((first.batch, first.peak), (second.batch, second.peak))
    if device.type == "cuda":
        most, estimated = training.data.num_images, False
        fits = largest_that_fits(lambda size: profile_steps(training, size, 2), chosen, most)
        torch.cuda.empty_cache()
    else:
        fits, estimated = room_for(line, available_bytes(device)), True
    return Measured(
        training=training,
        steps=second._replace(starting=max(first.starting, second.starting)),
        flops=flops,
        operations=operations,
        view_seconds=seconds_per_view(training.data),
        peak=max(with_probe, round(line[0] + line[1] * batch)),
        largest_batch=fits or None,
        estimated=estimated,
    )


def assemble(
    task: str, config: Any, measured: Measured, stages: Mapping[str, Stage], phases: Phases, *, cache: int, export: int
) -> Plan:
    """The plan of a run, from what was measured of its parts.

    Args:
        task: the command.
        config: has ``optim``, ``loader`` and ``run``, of the whole run.
        measured, stages, phases: the parts.
        cache, export: bytes on disk.
    """
    run, steps, took = config.run, round(sum(stage.steps for stage in stages.values())), measured.steps
    probes, saved, logged = (times(steps, every) for every in (run.probe_every, run.checkpoint_every, run.log_every))
    device, data = measured.training.fabric.device, measured.training.data
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Plan(
        task=task,
        machine=hardware(device, run.threads),
        epochs=config.optim.epochs,
        images_per_step=config.optim.images_per_step,
        batch=measured.training.optim.batch_size,
        measured_batch=took.batch,
        stages=stages,
        other={
            "loading": phases.loading + took.starting,
            "calibration": phases.calibration,
            "probes": probes * phases.probe,
            "log and checkpoints": logged * took.logging + saved * took.saving,
            "scores": phases.scoring,
        },
        view_seconds=measured.view_seconds,
        readers=min(data.config.workers_of(run.devices) * run.devices, cores),
        operations=measured.operations,
        gradient_bytes=sum(4 * p.numel() for p in measured.training.job.module.parameters() if p.requires_grad),
        scored=phases.scored,
        peak=max(measured.peak, peak_bytes(device)),
        largest_batch=measured.largest_batch,
        estimated=measured.estimated,
        disk=Disk(
            checkpoints=(min(run.keep, saved - 1) + 1) * took.checkpoint,  # one is written before an old one goes
            teacher_cache=cache,
            logs=round(logged * took.log),
            export=export,
        ),
    )


def times(steps: int, every: int) -> int:
    """How often something is done that is done every so many steps, and at the end; 0: at the end alone."""
    return -(-steps // every) if every else 1


def steps_within_budget(seconds: int | float) -> int:
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
