"""The training loop: one function for every method, with resume, signals and the log around one optimiser step."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from comad.runtime.checkpoint import checkpoints
from comad.runtime.job import Interrupted, Job, Metrics, RunConfig, Step, TrainingError
from comad.runtime.learner import Due, Learner
from comad.runtime.log import RunLog, truncate_log
from comad.runtime.memory import keep_freed_memory
from comad.runtime.optim import OptimConfig
from comad.runtime.progress import Report, Stream

__all__ = [
    "Interrupted",
    "Job",
    "Metrics",
    "RunConfig",
    "Step",
    "TrainingError",
    "open_run",
    "open_runs",
    "start_fabric",
    "train",
    "train_together",
]


def start_fabric(run: RunConfig) -> Fabric:
    """Start the engine: one process, or DDP over several, on NVIDIA's GPUs or the CPU; bf16 by autocast.

    Raises:
        ValueError: a launcher started several processes, and ``run.devices`` is one.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if run.devices == 1 and (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"this is one of {count} processes, which would each train alone; set --run.devices {count}.")
    fabric = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=run.devices,
        strategy="ddp" if run.devices > 1 else "auto",
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def open_run(run: RunConfig, fabric: Fabric) -> Path:
    """Make the run's folder.

    Raises:
        ValueError: it holds a run already and ``resume`` is off, or there is nothing to resume.
    """
    (own,) = open_runs(run, [""], fabric)
    return Path(own.out)


def open_runs(run: RunConfig, names: Sequence[str], fabric: Fabric) -> list[RunConfig]:
    """Make the folders of the parts of a run, below its own. Returns the run of each part.

    A part that was killed before its first checkpoint does not go on, but begins again.

    Raises:
        ValueError: see `open_run`; to be resumed, one part at least must have a checkpoint.
    """
    out, runs = Path(run.out), [replace(run, out=str(Path(run.out, name))) for name in names]
    begun = [run.resume and bool(checkpoints(Path(own.out) / "checkpoints")) for own in runs]
    if run.resume and not any(begun):
        raise ValueError(f"no checkpoint to resume in {run.out!r}; start without --run.resume, in a new folder.")
    fabric.barrier()  # every process looks before one writes
    if out.exists() and not out.is_dir():
        raise ValueError(f"{run.out!r} is a file; pass --run.out with a folder for the run.")
    if not run.resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{run.out!r} holds a run already; pass --run.resume to go on or --run.out for a new folder.")
    fabric.barrier()
    for own, going_on in zip(runs, begun, strict=True):
        Path(own.out).mkdir(parents=True, exist_ok=True)
        if run.resume and not going_on and fabric.is_global_zero:
            truncate_log(Path(own.out), 0)
    return [replace(own, resume=going_on) for own, going_on in zip(runs, begun, strict=True)]


def train(job: Job, optim: OptimConfig, run: RunConfig, fabric: Fabric) -> Any:
    """Train to the end and return the module to score: its moving average if one is kept.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint is written.
        TrainingError: the loss is not finite, or the run has collapsed and ``run.stop_on_collapse`` is set.
        ValueError: the checkpoint to resume belongs to another configuration or other teachers.
    """
    (scored,) = train_together([job], optim, [run], fabric)
    return scored


def train_together(jobs: Sequence[Job], optim: OptimConfig, runs: Sequence[RunConfig], fabric: Fabric) -> list[Any]:
    """Train several jobs on the same batches, each as `train` would alone, in the folder of its own run.

    They go on from the earliest of their checkpoints; one that was ahead waits. An error in one ends all.
    """
    shared, run, steps_per_epoch = jobs[0], runs[0], jobs[0].steps_per_epoch
    assert all((job.batches, job.prepare) == (shared.batches, shared.prepare) for job in jobs)
    total = optim.total_steps(steps_per_epoch)
    if optim.batch_size % fabric.world_size:
        raise ValueError(
            f"--optim.batch-size {optim.batch_size} cannot be shared by {fabric.world_size} processes; use a multiple."
        )
    if fabric.device.type == "cpu":  # not before: what loading frees goes back to the system
        keep_freed_memory()
    learners = [Learner.create(job, optim, own, fabric) for job, own in zip(jobs, runs, strict=True)]
    first = min(learner.first for learner in learners)
    stream = Stream(shared.batches(first * optim.accumulate, total * optim.accumulate), fabric)
    with closing(stream), ExitStack() as logs, _threads(run.threads), _signals() as received:
        for learner in learners:
            log = logs.enter_context(_open_log(learner.run, total, fabric, named=len(jobs) > 1))
            learner.report = Report(
                learner.job, learner.run, log, optim.batch_size * optim.accumulate, stream, learner.first
            )
        if optim.warmup_epochs >= optim.epochs:
            learners[0].report.log.say(
                f"WARNING: the learning rate only warms up, for {optim.warmup_epochs:g} epochs in a run of "
                f"{optim.epochs:g}; set a shorter --optim.warmup-epochs."
            )
        for step in range(first, total):
            learning = [learner for learner in learners if learner.first <= step]
            results = _accumulate(shared, learning, stream, optim.accumulate, step / total)
            lr, done = optim.lr(step, steps_per_epoch), step + 1
            norms = [learner.update(lr) for learner in learning]

            stopped = _agreed(received, fabric, done % run.log_every == 0)
            due = _due(run, done, total, stopped)
            for learner, result, norm in zip(learning, results, norms, strict=True):
                learner.record(done, due, result, {"lr": lr, "grad_norm": norm})
            if stopped and done < total:
                learners[0].report.log.say(f"stopped at step {done}, checkpoint written.")
                raise Interrupted(run.out)
    return [learner.scored for learner in learners]


def _due(run: RunConfig, done: int, total: int, stopped: bool) -> Due:
    save = stopped or done == total or done % run.checkpoint_every == 0
    return Due(
        log=save or done == 1 or done % run.log_every == 0,
        probe=done == total or (run.probe_every > 0 and done % run.probe_every == 0),
        save=save,
    )


def _open_log(run: RunConfig, total: int, fabric: Fabric, named: bool) -> RunLog:
    """The log of one job; the first process alone writes and shows it."""
    folder, screen = (Path(run.out), sys.stderr) if fabric.is_global_zero else (None, None)
    return RunLog(folder, total, run.tensorboard, run.wandb, screen, Path(run.out).name if named else "")


def _accumulate(job: Job, learners: Sequence[Learner], stream: Stream, count: int, progress: float) -> list[Step]:
    """Add up the gradients of ``count`` batches; processes exchange them with the last one. Returns its results."""
    for _ in range(count - 1):
        _learn(job, learners, stream, count, progress, last=False)
    return _learn(job, learners, stream, count, progress, last=True)


def _learn(
    job: Job, learners: Sequence[Learner], stream: Stream, count: int, progress: float, *, last: bool
) -> list[Step]:
    """Forward and backward of everyone on the next batch, which is prepared once."""
    batch = job.prepare(next(stream), progress)
    return [learner.learn(batch, count, progress, last) for learner in learners]


def _agreed(received: Sequence[int], fabric: Fabric, now: bool) -> bool:
    """Whether a signal came; several processes ask each other ``now`` and then, so that all leave at the same step."""
    if fabric.world_size == 1:
        return bool(received)
    return now and bool(fabric.all_reduce(torch.tensor(len(received), device=fabric.device), reduce_op="sum"))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads for a while; 0 leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the loop to act on after the step in hand; a second one acts at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
