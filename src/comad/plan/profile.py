"""A few steps of a real run with a clock on them: the training loop itself, in a folder that is removed afterwards."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from comad.data.loader import EpochBatches, LoaderConfig, training_batches
from comad.runtime.job import Job, Metrics, RunConfig, Step
from comad.runtime.memory import peak_bytes, reset_peak
from comad.runtime.optim import OptimConfig
from comad.runtime.train import train

CLOCK = time.perf_counter
"""What everything is measured by; `benchmarks/plan.py` also plans by the processor's time, for busy machines."""


def now() -> float:
    """Seconds of that clock."""
    return CLOCK()


class StepProfile(NamedTuple):
    """What some steps took.

    Attributes:
        batch: images of a step.
        seconds: of a step, its batch, its backward pass and the optimiser.
        starting: seconds before the first step.
        logging: seconds of a log line.
        saving: seconds of a checkpoint.
        peak, probe_peak: bytes in the steps, and with the probe.
        checkpoint: bytes of a file.
        log: bytes of a log line wherever it goes.
    """

    batch: int
    seconds: float
    starting: float
    logging: float
    saving: float
    peak: int
    probe_peak: int
    checkpoint: int
    log: float


class Flops(NamedTuple):
    """Floating point operations for one image; a multiply-add counts as two.

    Attributes:
        teachers: of the frozen networks, forward.
        student: of all else, forward and backward.
    """

    teachers: float
    student: float


def profile_steps(
    job: Job,
    optim: OptimConfig,
    run: RunConfig,
    fabric: Fabric,
    num_steps: int,
    probe: Callable[[Any], None] | None = None,
) -> StepProfile:
    """Train for so many steps of one batch and measure them; the first ones only warm up.

    Args:
        job, optim, run, fabric: of `train`.
        num_steps: optimiser steps, 2 or more.
        probe: called with the weights at the end, under the loop's number of threads.
    """
    clock = _Clock(job, fabric.device, probe)
    short = replace(optim, accumulate=1, epochs=num_steps / job.steps_per_epoch)
    with tempfile.TemporaryDirectory(prefix="comad-plan-") as folder:
        quiet = replace(run, out=folder, resume=False, probe_every=0, checkpoint_every=num_steps, wandb=False)
        reset_peak(fabric.device)
        start = clock.now()
        with open(os.devnull, "w") as nobody, contextlib.redirect_stderr(nobody):
            train(clock.job(), short, replace(quiet, stop_on_collapse=False), fabric)
        saving = clock.now() - clock.probed
        checkpoint = sum(file.stat().st_size for file in Path(folder).rglob("step-*.pt"))
        log = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) - checkpoint
    steps = clock.steps()
    return StepProfile(
        batch=optim.batch_size,
        seconds=statistics.fmean(steps[2 if num_steps > 4 else 1 :]),
        starting=clock.starts[0] - start,
        logging=statistics.fmean(clock.logs),
        saving=saving,
        peak=clock.peak,
        probe_peak=peak_bytes(fabric.device),
        checkpoint=checkpoint,
        log=log / len(clock.logs),
    )


def count_flops(
    job: Job, optim: OptimConfig, run: RunConfig, fabric: Fabric, frozen: Sequence[nn.Module]
) -> tuple[Flops, float]:
    """FLOPs of one image in one real step, and the seconds that it took, which are too many."""
    marks, spent = [0.0], [0.0]

    def step(module: nn.Module, batch: Any, progress: float) -> Step:  # log lines compute as well, now and then
        return Step(job.step(module, batch, progress).loss, dict)

    counter = FlopCounterMode(display=False)

    def before(module: nn.Module, inputs: Any) -> None:
        marks.append(counter.get_total_flops())

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        spent.append(counter.get_total_flops() - marks[-1])

    handles = [h for n in frozen for h in (n.register_forward_pre_hook(before), n.register_forward_hook(after))]
    try:
        with counter:
            took = profile_steps(replace(job, step=step), optim, run, fabric, 2)
    finally:
        for handle in handles:
            handle.remove()
    images = 2 * optim.batch_size
    teachers = sum(spent) / images
    return Flops(teachers, counter.get_total_flops() / images - teachers), took.seconds


def resized(job: Job, batch_size: int) -> Job:
    """The same job in batches of another size."""
    loader = job.batches(0, 1)
    order = cast(EpochBatches, loader.batch_sampler)

    def batches(first: int, last: int) -> DataLoader:
        span, fixed = (first, last), order.fixed_views
        again = EpochBatches(order.num_images, batch_size, order.seed, span, fixed_views=fixed)
        return training_batches(loader.dataset, again, LoaderConfig(workers=loader.num_workers), loader.collate_fn)

    return replace(job, batches=batches, steps_per_epoch=order.num_images // batch_size)


def seconds_per_view(job: Job, count: int = 48) -> float:
    """Seconds in which one core reads and changes one image."""
    dataset, threads = job.batches(0, 1).dataset, torch.get_num_threads()
    count = min(count, cast(EpochBatches, job.batches(0, 1).batch_sampler).num_images)
    torch.set_num_threads(1)
    try:
        return seconds_of(lambda: [dataset[0, i] for i in range(count)]) / count
    finally:
        torch.set_num_threads(threads)


def seconds_of(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of a call's second time, when all is warm."""
    start = 0.0
    for _ in range(2):
        start = now()
        call()
        wait_for(device)
    return now() - start


def wait_for(device: torch.device | None) -> None:
    """Let a GPU finish what it was asked."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_image(call: Callable[[int], object], most: int) -> float:
    """Seconds of one of the images that a call is asked to compute on: of 16, or of as many as 2 seconds allow."""
    few = min(16, most)
    seconds = seconds_of(lambda: call(few)) / few
    count = min(most, 256, int(2 / seconds))
    return seconds_of(lambda: call(count)) / count if count > few else seconds


def largest_that_fits(attempt: Callable[[int], object], start: int, stop: int) -> int:
    """Double a batch until the GPU has no room for it, or there are no more images; 0 if the first has none."""
    fits, batch = 0, start
    while batch <= stop:
        try:
            attempt(batch)
        except torch.OutOfMemoryError:
            break
        fits, batch = batch, 2 * batch
    return fits


class _Clock:
    """A job whose steps, log lines and end are noted."""

    def __init__(self, job: Job, device: torch.device, probe: Callable[[Any], None] | None):
        self.original, self.device, self.then = job, device, probe
        self.starts: list[float] = []
        self.logs: list[float] = []
        self.logged: dict[int, float] = {}
        self.ended = self.probed = 0.0
        self.peak = 0

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        wait_for(self.device)
        return now()

    def job(self) -> Job:
        """The job for the loop."""
        return replace(self.original, step=self._step, watch=self._watch, probe=self._probe)

    def steps(self) -> list[float]:
        """Seconds from step to step, log lines left out."""
        ends = [*self.starts[1:], self.ended]
        return [b - a - self.logged.get(i, 0.0) for i, (a, b) in enumerate(zip(self.starts, ends, strict=True))]

    def _step(self, module: nn.Module, batch: Any, progress: float) -> Step:
        self.starts.append(self.now())
        loss, metrics = self.original.step(module, batch, progress)

        def timed() -> dict[str, Tensor]:
            self.logs.append(self.now())
            return metrics()

        return Step(loss, timed)

    def _watch(self, done: int, metrics: Metrics) -> None:
        self.logs[-1] = self.logged[len(self.starts) - 1] = self.now() - self.logs[-1]

    def _probe(self, module: Any) -> Metrics:
        self.ended, self.peak = self.now(), peak_bytes(self.device)
        if self.then is not None:
            self.then(module)
        self.probed = self.now()
        return {}
