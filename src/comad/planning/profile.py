"""A few steps of a real run with a clock on them: the verb's own loop, in a folder that is removed afterwards."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from comad.data.loader import TrainingBatches
from comad.runtime.memory import peak_bytes, reset_peak
from comad.runtime.optim import OptimConfig
from comad.runtime.run import Metrics
from comad.runtime.trainer import Job, Trainer, TrainStep

CLOCK = time.perf_counter
"""What everything is measured by; `benchmarks/plan.py` also plans by the processor's time, for busy machines."""


def now() -> float:
    """Seconds of that clock."""
    return CLOCK()


@dataclass(frozen=True)
class Training:
    """What a verb trains, as it set it up itself.

    Attributes:
        job, data, optim, fabric: of `comad.runtime.trainer.Trainer`, ``optim`` at the batch of one device.
        loop: the verb's training loop.
    """

    job: Job
    data: TrainingBatches
    optim: OptimConfig
    fabric: Fabric
    loop: Callable[[Trainer], None]


class StepProfile(NamedTuple):
    """What some steps took.

    Attributes:
        batch: images of a step.
        seconds: of a step, its batch, its backward pass and the optimiser.
        starting: seconds before the first step.
        logging: seconds of a log line.
        saving: seconds of a checkpoint.
        peak: bytes in the steps, without the probe.
        checkpoint: bytes of a file.
        log: bytes of a log line wherever it goes.
    """

    batch: int
    seconds: float
    starting: float
    logging: float
    saving: float
    peak: int
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


class ProfiledTrainer(Trainer):
    """A trainer that notes when its steps begin, on a clock that stands still for log, probe and checkpoint.

    Args:
        training: what is trained.
        batch_size: images of a step, in one batch.
        num_steps: how many, 2 or more.
        folder: of the run.
        probe: called with the weights at the end, under the loop's number of threads.
        log_metrics: log what the loop computes for the log, as a run does.
    """

    def __init__(
        self,
        training: Training,
        batch_size: int,
        num_steps: int,
        folder: str,
        probe: Callable[[Any], object] | None = None,
        log_metrics: bool = True,
    ):
        self.probe, self.log_metrics, self.device = probe, log_metrics, training.fabric.device
        self.starts: list[float] = []
        self.peak = 0
        self.waited_at_first = 0.0
        data = replace(training.data, batch_size=batch_size)
        epochs = num_steps / (data.num_images // batch_size)
        optim = replace(training.optim, batch_size=batch_size, microbatch=None, accumulate=1, epochs=epochs)
        quiet = {"resume": False, "probe_every": 0, "wandb": False, "stop_on_collapse": False}
        run = replace(training.job.run, out=folder, checkpoint_every=num_steps, **quiet)
        job = replace(training.job, run=run, probe=self._at_the_end, watch=lambda step, metrics: None)
        super().__init__([job], data, optim, training.fabric, self._when_all_is_done)

    def __iter__(self) -> Iterator[TrainStep]:
        for step in super().__iter__():
            self._begin()
            yield step
            if not self.log_metrics:
                self.states[0].metrics = dict
            if not step.number:
                self.waited_at_first = self.prefetcher.waited
        self._begin()

    def _begin(self) -> None:
        self.starts.append(self.now() - sum(map(sum, self.spent.values())))

    def _when_all_is_done(self) -> float:
        wait_for(self.device)
        return now()

    def _at_the_end(self, module: Any) -> Metrics:
        self.peak = peak_bytes(self.device)
        if self.probe is not None:
            self.probe(module)
        return {}


def profile_steps(
    training: Training,
    batch_size: int,
    num_steps: int,
    probe: Callable[[Any], object] | None = None,
    log_metrics: bool = True,
) -> StepProfile:
    """Take so many steps of one batch and measure them; the first ones only warm up. See `ProfiledTrainer`."""
    device = training.fabric.device
    with tempfile.TemporaryDirectory(prefix="comad-plan-") as folder:
        reset_peak(device)
        wait_for(device)
        start = now()
        trainer = ProfiledTrainer(training, batch_size, num_steps, folder, probe, log_metrics)
        with open(os.devnull, "w") as nobody, contextlib.redirect_stderr(nobody), trainer:
            training.loop(trainer)
        sizes = {file: file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()}
    seconds = [after - before for before, after in zip(trainer.starts, trainer.starts[1:], strict=False)]
    checkpoint = sum(size for file, size in sizes.items() if file.match("step-*.pt"))
    return StepProfile(
        batch=batch_size,
        seconds=statistics.fmean(seconds[2 if num_steps > 4 else 1 :]),
        starting=trainer.starts[0] - start + trainer.waited_at_first,
        logging=statistics.fmean(trainer.spent["log"]),
        saving=trainer.spent["save"][-1],
        peak=trainer.peak,
        checkpoint=checkpoint,
        log=(sum(sizes.values()) - checkpoint) / len(trainer.spent["log"]),
    )


class OperationCounter(TorchDispatchMode):
    """Counts the operations that a device is asked for; views are none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_flops(training: Training, batch_size: int, frozen: Sequence[nn.Module]) -> tuple[Flops, int, float]:
    """FLOPs of an image in real steps, without log lines, operations and seconds of a step; these are too many."""
    started, of_frozen, operations = 0.0, 0.0, OperationCounter()
    counter = FlopCounterMode(display=False)

    def before(module: nn.Module, inputs: Any) -> None:
        nonlocal started
        started = counter.get_total_flops()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal of_frozen
        of_frozen += counter.get_total_flops() - started

    handles = [h for n in frozen for h in (n.register_forward_pre_hook(before), n.register_forward_hook(after))]
    try:
        with operations, counter:
            took = profile_steps(training, batch_size, 2, log_metrics=False)
    finally:
        for handle in handles:
            handle.remove()
    images = 2 * batch_size
    flops = Flops(of_frozen / images, (counter.get_total_flops() - of_frozen) / images)
    return flops, operations.count // 2, took.seconds


def seconds_per_view(data: TrainingBatches, count: int = 48) -> float:
    """Seconds in which one core reads and changes one image."""
    count, threads = min(count, data.num_images), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds_of(lambda: [data.dataset[0, i] for i in range(count)]) / count
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
