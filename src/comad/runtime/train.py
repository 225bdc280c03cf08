"""The training loop: one function for every method, with resume, signals and the log around one optimiser step."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from comad.runtime.checkpoint import (
    checkpoints,
    differences,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from comad.runtime.job import Interrupted, Job, Metrics, RunConfig, Step, TrainingError
from comad.runtime.log import RunLog, forget_after
from comad.runtime.memory import keep_freed_memory
from comad.runtime.optim import OptimConfig, adamw, build_optimizer
from comad.runtime.progress import Report, Stream

__all__ = [
    "Interrupted",
    "Job",
    "Metrics",
    "RunConfig",
    "Step",
    "TrainingError",
    "open_run",
    "start_fabric",
    "train",
]


def start_fabric(run: RunConfig) -> Fabric:
    """Start the engine: one process, or DDP over several; bf16 by autocast."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy = "ddp" if run.devices > 1 else "auto"
    fabric = Fabric(
        devices=run.devices, strategy=strategy, precision="bf16-mixed" if run.precision == "bf16" else "32-true"
    )
    fabric.launch()
    return fabric


def open_run(run: RunConfig, fabric: Fabric) -> Path:
    """Make the run's folder.

    Raises:
        ValueError: it holds a run already and ``resume`` is off, or there is nothing to resume.
    """
    out = Path(run.out)
    if run.resume and not checkpoints(out / "checkpoints"):
        raise ValueError(f"no checkpoint to resume in {run.out!r}; start without --run.resume, in a new folder.")
    fabric.barrier()  # every process looks before one writes
    if out.exists() and not out.is_dir():
        raise ValueError(f"{run.out!r} is a file; pass --run.out with a folder for the run.")
    if not run.resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{run.out!r} holds a run already; pass --run.resume to go on or --run.out for a new folder.")
    fabric.barrier()
    out.mkdir(parents=True, exist_ok=True)
    return out


def train(job: Job, optim: OptimConfig, run: RunConfig, fabric: Fabric) -> Any:
    """Train to the end and return the module to score: its moving average if one is kept.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint is written.
        TrainingError: the loss is not finite, or the run has collapsed and ``run.stop_on_collapse`` is set.
        ValueError: the checkpoint to resume belongs to another configuration or other teachers.
    """
    total = optim.total_steps(job.steps_per_epoch)
    if fabric.device.type == "cpu":  # not before: what loading frees goes back to the system
        keep_freed_memory()
    state = _State.create(job, optim, run, fabric)
    first = state.restore() if run.resume else 0
    if run.resume and fabric.is_global_zero:
        forget_after(Path(run.out), first)
    stream = Stream(job.batches(first * optim.accumulate, total * optim.accumulate), fabric)
    folder, screen = (Path(run.out), sys.stderr) if fabric.is_global_zero else (None, None)
    with RunLog(folder, total, run.tensorboard, run.wandb, screen) as log:
        report = Report(job, run, log, optim.batch_size * optim.accumulate, stream, first)
        with _threads(run.threads), _signals() as received:
            for step in range(first, total):
                lr = state.set_lr(optim.lr(step, job.steps_per_epoch))
                result = _accumulate(job, state, stream, optim.accumulate, step / total)
                norm = fabric.clip_gradients(
                    state.module, state.optimizer, max_norm=optim.clip or math.inf, error_if_nonfinite=False
                )
                state.optimizer.step()
                state.optimizer.zero_grad()
                state.update_average()

                done = step + 1
                stopped = _agreed(received, fabric, done % run.log_every == 0)
                saving = stopped or done == total or done % run.checkpoint_every == 0
                if saving or done == 1 or done % run.log_every == 0:
                    report.step(done, result, {"lr": lr, "grad_norm": norm})
                if done == total or (run.probe_every and done % run.probe_every == 0):
                    report.probe(done, state.scored)
                if saving:
                    state.save(done)
                if stopped and done < total:
                    log.say(f"stopped at step {done}, checkpoint written. Go on: the same command with --run.resume.")
                    raise Interrupted(run.out)
    return state.scored


def _accumulate(job: Job, state: _State, stream: Stream, count: int, progress: float) -> Step:
    """Add up the gradients of ``count`` batches; processes exchange them with the last one. Returns its result."""
    for _ in range(count - 1):
        with stream.fabric.no_backward_sync(state.module):
            stream.fabric.backward(job.step(state.module, next(stream), progress).loss / count)
    result = job.step(state.module, next(stream), progress)
    stream.fabric.backward(result.loss / count)
    return result


@dataclass
class _State:
    """Everything that a checkpoint holds, and what of it the loop works on."""

    job: Job
    run: RunConfig
    module: Any
    optimizer: Any
    average: AveragedModel | None
    main_process: bool

    @classmethod
    def create(cls, job: Job, optim: OptimConfig, run: RunConfig, fabric: Fabric) -> _State:
        average = AveragedModel(job.module, multi_avg_fn=get_ema_multi_avg_fn(optim.ema)) if optim.ema else None
        if fabric.world_size > 1 and fabric.device.type == "cuda":  # torch has it for GPUs alone
            nn.SyncBatchNorm.convert_sync_batchnorm(job.module)
        optimizer = build_optimizer(job.module, optim) if job.groups is None else adamw(job.groups, optim)
        module, optimizer = fabric.setup(job.module, optimizer)
        if average is not None:
            average.to(fabric.device)
        return cls(job, run, module, optimizer, average, fabric.is_global_zero)

    @property
    def scored(self) -> Any:
        return self.average.module if self.average is not None else self.job.module

    @property
    def folder(self) -> Path:
        return Path(self.run.out) / "checkpoints"

    def set_lr(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.job.module)

    def save(self, step: int) -> Path:
        state = {
            "step": step,
            "module": self.job.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "random": random_states(),
            "identity": json.dumps(self.job.identity),
        }
        return save_checkpoint(self.folder, step, state, self.run.keep) if self.main_process else self.folder

    def restore(self) -> int:
        path = checkpoints(self.folder)[-1]
        stored = load_checkpoint(path)
        changed = differences(json.loads(stored["identity"]), json.loads(json.dumps(self.job.identity)))
        if changed:
            raise ValueError(f"cannot resume {self.run.out!r}: it was started with another setup: {'; '.join(changed)}")
        self.job.module.load_state_dict(stored["module"])
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(stored["average"])
        restore_random_states(stored["random"])
        return stored["step"]


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
