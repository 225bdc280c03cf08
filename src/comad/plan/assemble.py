"""What distillation and dense training have in common: measured steps and phases put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_fabric import Fabric

from comad.plan.forecast import Disk, Plan, Stage
from comad.plan.measure import Measured
from comad.plan.profile import Flops, StepProfile
from comad.runtime.memory import peak_bytes
from comad.runtime.optim import OptimConfig
from comad.runtime.provenance import hardware
from comad.runtime.train import start_fabric


class Phases(NamedTuple):
    """Seconds of what is not training: once each, a probe as often as the run takes one."""

    loading: float
    calibration: float
    probe: float
    scoring: float


class Planned(NamedTuple):
    """The run as a whole.

    Attributes:
        task: the command.
        config: has ``optim`` and ``run``.
        devices: that train.
        cache, export: bytes on disk.
    """

    task: str
    config: Any
    devices: int
    cache: int = 0
    export: int = 0


def engine(config: Any) -> tuple[Any, Fabric]:
    """One device for the measurements, and the config for it: each of several has its share of the batch."""
    config = replace(config, run=replace(config.run, devices=1, resume=False))
    return config, start_fabric(config.run)


def share_of(optim: OptimConfig, devices: int) -> OptimConfig:
    """What one of several devices computes."""
    return replace(optim, batch_size=max(1, optim.batch_size // devices))


def stage(count: float, took: StepProfile, optim: OptimConfig, flops: Flops) -> Stage:
    """Optimiser steps, from forward passes of another batch."""
    return Stage(count, took.seconds * optim.batch_size / took.batch * optim.accumulate, flops)


def assemble(planned: Planned, fabric: Fabric, measured: Measured, stages: Mapping[str, Stage], phases: Phases) -> Plan:
    """The plan of a run, from what was measured of its parts."""
    task, config, devices, cache, export = planned
    run, steps, took = config.run, round(sum(stage.steps for stage in stages.values())), measured.steps
    probes, saved, logged = (times(steps, every) for every in (run.probe_every, run.checkpoint_every, run.log_every))
    return Plan(
        task=task,
        machine=hardware(fabric.device, run.threads),
        epochs=config.optim.epochs,
        images_per_step=config.optim.batch_size * config.optim.accumulate,
        batch=share_of(config.optim, devices).batch_size,
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
        readers=measured.readers * devices,
        peak=max(measured.peak, peak_bytes(fabric.device)),
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
