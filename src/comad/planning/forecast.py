"""From what was measured to hours, bytes and operations of a whole run: the model, in one place, without a clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from comad.planning.profile import Flops
from comad.runtime.optim import OptimConfig

FORMULA = "hours = (max(teachers + student, decode, launches, network) + scoring) / 3600"
"""Of another machine, see `Plan.seconds_on`: what goes on at the same time takes as long as the longest."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Another machine than this one, and how the forecast is printed.

    Args:
        gpus: GPUs of the other machine.
        gpu_tflops: what one of them computes at best, 10¹² operations per second in the run's precision; 312 is an A100
            in bf16.
        mfu: share of that which training reaches.
        gpu_cores: CPU cores per GPU that decode images, as fast as this machine's: a GPU's loader has 8 workers at most
            unless --loader.workers says more.
        launch_us: microseconds in which a process starts an operation of its GPU.
        network_gb: gigabytes per second that a GPU exchanges with the others.
        json: print one JSON object.
    """

    gpus: int = 8
    gpu_tflops: float = 312.0
    mfu: float = 0.3
    gpu_cores: int = 8
    launch_us: float = 6.0
    network_gb: float = 25.0
    json: bool = False

    def check(self) -> None:
        """Raise ValueError for a machine that there cannot be."""
        for flag in MACHINE:
            if getattr(self, flag) <= 0 or self.mfu > 1:
                name, value = ("mfu", self.mfu) if self.mfu > 1 else (flag, getattr(self, flag))
                limit = "above 0 and at most 1" if name == "mfu" else "above 0"
                raise ValueError(f"--{name.replace('_', '-')} {value} must be {limit}.")


MACHINE = ("gpus", "gpu_tflops", "mfu", "gpu_cores", "launch_us", "network_gb")
"""What is told of it."""


class Stage(NamedTuple):
    """Steps of one kind.

    Attributes:
        steps: how many; parts of a step where only some of its images are of this kind.
        seconds: of one, of all that is not waiting for images.
        flops: for one image.
    """

    steps: float
    seconds: float
    flops: Flops


class Disk(NamedTuple):
    """Bytes that a run needs at its fullest."""

    checkpoints: int
    teacher_cache: int
    logs: int
    export: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forecast.

    Attributes:
        task: what is planned.
        machine: this one, in words.
        epochs: of the run.
        images_per_step: of an optimiser step.
        batch, measured_batch: images of a forward pass, and of the ones that were measured.
        stages: name → steps of the training.
        other: name → seconds of what is not training.
        view_seconds: in which one core reads an image.
        readers: cores that read at once; 0: the training process reads.
        operations: that a device is asked for in a forward and backward pass and an update.
        gradient_bytes: that processes exchange in a step.
        scored: images that every network is scored on at the end.
        peak: bytes of memory in a step.
        largest_batch: images of one forward pass that fit; None: memory did not grow with the batch.
        estimated: ``largest_batch`` is read from a line, not tried.
        disk: bytes.
        advice: lines on what to change.
    """

    task: str
    machine: str
    epochs: float
    images_per_step: int
    batch: int
    measured_batch: int
    stages: Mapping[str, Stage]
    other: Mapping[str, float]
    view_seconds: float
    readers: int
    operations: int
    gradient_bytes: int
    scored: int
    peak: int
    largest_batch: int | None
    estimated: bool
    disk: Disk
    advice: tuple[str, ...] = ()

    @property
    def steps(self) -> int | float:
        """Optimiser steps."""
        return sum(stage.steps for stage in self.stages.values())

    @property
    def images(self) -> int | float:
        """Images that the run computes on."""
        return self.steps * self.images_per_step

    def step_seconds(self, stage: Stage) -> int | float:
        """Of a step: no less than reading its images takes."""
        return max(stage.seconds, self.images_per_step * self.view_seconds / max(1, self.readers))

    @property
    def training_seconds(self) -> int | float:
        """Of all steps, here."""
        return sum(stage.steps * self.step_seconds(stage) for stage in self.stages.values())

    @property
    def seconds(self) -> int | float:
        """From the first line of the command to the last, here."""
        return self.training_seconds + sum(self.other.values())

    @property
    def flops(self) -> Flops:
        """Of the whole training."""
        parts = [[stage.steps * self.images_per_step * part for part in stage.flops] for stage in self.stages.values()]
        return Flops(*map(sum, zip(*parts, strict=True)))

    def seconds_on(self, target: Target) -> dict[str, float]:
        """Seconds on other GPUs: of teachers, student, decoding, launching, network and scoring, each by itself.

        Teachers and student are FLOPs / (GPUs x peak x mfu); decode is images x seconds per view / cores; launches are
        steps x operations x seconds of one, of a pass a step; network is what a ring all-reduce of the gradients moves
        over its rate; scoring is a forward pass of all networks on the labelled images, or decoding them. Gradients
        travel, and operations are started, while others compute.
        """
        gpus, rate = target.gpus, target.gpus * target.gpu_tflops * 1e12 * target.mfu
        decoding = self.view_seconds / (gpus * target.gpu_cores)
        forward = next(iter(self.stages.values())).flops
        exchanged = 2 * (gpus - 1) / gpus * self.gradient_bytes
        return {
            "teachers": self.flops.teachers / rate,
            "student": self.flops.student / rate,
            "decode": self.images * decoding,
            "launches": self.steps * self.operations * target.launch_us / 1e6,
            "network": self.steps * exchanged / (target.network_gb * 1e9),
            "scoring": self.scored * max((forward.teachers + forward.student / 3) / rate, decoding),
        }

    def total_on(self, target: Target) -> float:
        """Seconds on other GPUs, of all."""
        parts = self.seconds_on(target)
        scoring, compute = parts.pop("scoring"), parts.pop("teachers") + parts.pop("student")
        return max(compute, *parts.values()) + scoring

    def as_dict(self, target: Target) -> dict[str, Any]:
        """Plain values; seconds, bytes and operations."""
        parts, total = self.seconds_on(target), self.flops
        stages = {
            name: {
                "steps": round(stage.steps, 1),
                "seconds_per_step": self.step_seconds(stage),
                "images_per_s": self.images_per_step / self.step_seconds(stage),
                "flops_per_step": {k: v * self.images_per_step for k, v in stage.flops._asdict().items()},
            }
            for name, stage in self.stages.items()
        }
        return {
            "task": self.task,
            "machine": self.machine,
            "seconds": self.seconds,
            "hours": self.seconds / 3600,
            "parts": {"training": self.training_seconds, **self.other},
            "epochs": self.epochs,
            "steps": round(self.steps),
            "images_per_step": self.images_per_step,
            "images_per_s": self.images / self.training_seconds,
            "stages": stages,
            "views_per_s_of_a_core": 1 / self.view_seconds,
            "batch": self.batch,
            "measured_batch": self.measured_batch,
            "peak_bytes": self.peak,
            "largest_batch": self.largest_batch,
            "largest_batch_is_estimated": self.estimated,
            "disk": {**self.disk._asdict(), "total": sum(self.disk)},
            "flops": {**total._asdict(), "total": sum(total)},
            "gpus": {
                **{key: getattr(target, key) for key in MACHINE},
                "formula": FORMULA,
                "seconds": parts,
                "bottleneck": max(parts, key=lambda name: parts[name]),
                "hours": self.total_on(target) / 3600,
            },
            "advice": list(self.advice),
        }

    def text(self, target: Target) -> str:
        """A table for a terminal."""
        rows = [*self._here(), *self._size(), *self._elsewhere(target)]
        rows += [("" if number else "advice", line) for number, line in enumerate(self.advice)]
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"plan of {self.task}, measured on {self.machine}", *(f"{n:{width}}  {v}" for n, v in rows)])

    def _here(self) -> list[tuple[str, str]]:
        parts = {"training": self.training_seconds, **self.other}
        note = f", in proportion to batches of {self.measured_batch}" if self.measured_batch != self.batch else ""
        rows = [
            ("time here", clock(self.seconds)),
            ("  of which", ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items() if seconds)),
            ("length", f"{self.epochs:g} epochs, {self.steps:.0f} steps of {self.images_per_step} images"),
            ("speed", f"{self.images / self.training_seconds:.1f} images/s{note}"),
        ]
        for name, stage in self.stages.items():
            seconds = self.step_seconds(stage)
            speed = f"{seconds:.3g} s a step, {self.images_per_step / seconds:.1f} images/s"
            rows.append((f"  {name}", f"{stage.steps:.0f} steps, {speed}"))
        return [*rows, ("  reading", f"{1 / self.view_seconds:.0f} images/s of a core")]

    def _size(self) -> list[tuple[str, str]]:
        how = "an estimate: a straight line through two batches" if self.estimated else "tried by doubling"
        fits = f"{self.largest_batch} ({how})" if self.largest_batch else "unknown: memory did not grow with the batch"
        disk = ", ".join(
            f"{name.replace('_', ' ')} {size(count)}" for name, count in self.disk._asdict().items() if count
        )
        rows = [
            ("peak memory", f"{size(self.peak)} at batches of {self.batch}"),
            ("largest batch", fits),
            ("disk", f"{size(sum(self.disk))}: {disk}"),
        ]
        for name, stage in self.stages.items():
            rows.append(
                (f"FLOPs of a {name} step", in_words(Flops(*(self.images_per_step * part for part in stage.flops))))
            )
        return [*rows, ("FLOPs of the run", in_words(self.flops))]

    def _elsewhere(self, target: Target) -> list[tuple[str, str]]:
        parts = self.seconds_on(target)
        name = f"on {target.gpus} GPU{'s' if target.gpus > 1 else ''}"
        given = f"{target.gpu_tflops:g} TFLOP/s, mfu {target.mfu:g}, {target.gpu_cores} cores each"
        bottleneck = max(parts, key=lambda part: parts[part])
        return [
            (name, f"{clock(self.total_on(target))}, the bottleneck is {bottleneck} ({given})"),
            ("  by the model", FORMULA),
            ("  here", ", ".join(f"{part} {clock(seconds)}" for part, seconds in parts.items())),
        ]


def budget_seconds(text: str) -> float:
    """``90s``, ``20min``, ``1.5h`` or ``1h30min`` in seconds.

    Raises:
        ValueError: it is something else.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|s)", text)
    seconds = sum(float(number) * {"s": 1, "min": 60, "h": 3600}[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not seconds:
        raise ValueError(f"--budget {text!r} is no time; write it as 90s, 20min or 1.5h.")
    return seconds


def largest_fit(optim: OptimConfig, forecast: Callable[[OptimConfig], Plan], seconds: int | float) -> OptimConfig:
    """The most epochs, of three digits, whose plan takes no longer than that; warm-up keeps its share of them.

    Raises:
        ValueError: a hundredth of an epoch takes longer.
    """
    share = min(1.0, optim.warmup_epochs / optim.epochs)

    def of(epochs: float) -> OptimConfig:
        epochs = float(f"{epochs:.3g}")
        return replace(optim, epochs=epochs, warmup_epochs=float(f"{share * epochs:.3g}"))

    low, high = 0.01, 0.02
    if (least := forecast(of(low)).seconds) > seconds:
        raise ValueError(
            f"--budget is too short: {clock(max(0.0, seconds))} are left for work that takes {clock(least)} without "
            "the training; give it more, or pass --split none."
        )
    while forecast(of(high)).seconds <= seconds:
        low, high = high, 2 * high
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if forecast(of(middle)).seconds <= seconds else (low, middle)
    return of(low)


def clock(seconds: int | float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def in_words(flops: Flops) -> str:
    """The sum and, where there are teachers, its parts."""
    parts = f": teachers {scaled(flops.teachers)}, student {scaled(flops.student)}" if flops.teachers else ""
    return f"{scaled(sum(flops))}{parts}"


def scaled(count: int | float) -> str:
    """A large number with a prefix."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {prefix}FLOPs"
    return f"{count / 1e6:.3g} MFLOPs"
