"""The training loop: one function for every method, with resume, signals and the log around one optimiser step."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from comad.runtime.checkpoint import (
    checkpoints,
    differences,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from comad.runtime.log import RunLog, forget_after, memory_gib
from comad.runtime.memory import keep_freed_memory
from comad.runtime.optim import OptimConfig, adamw, build_optimizer

Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it is watched.

    Args:
        out: folder of the run.
        resume: go on from the last checkpoint in ``out``.
        seed: of weights, order, views and masks.
        precision: ``bf16`` computes matrix products in bfloat16 and keeps float32 weights.
        log_every: optimiser steps between two log lines.
        probe_every: optimiser steps between two kNN scores on the validation part; 0: only at the end.
        checkpoint_every: optimiser steps between two checkpoints.
        keep: how many checkpoints to keep.
        tensorboard, wandb: where else the numbers go.
        devices: processes, one per GPU or CPU share; more than one under torchrun or by Fabric's own launcher.
        threads: CPU threads of the training step; 0: torch's choice. With small images fewer are faster where the
            loader's workers need cores, for threads wait for each other.
        stop_on_collapse: end the run when it is found to have collapsed, rather than only warn.
    """

    out: str = "runs/demo"
    resume: bool = False
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = 20
    probe_every: int = 0
    checkpoint_every: int = 200
    keep: int = 2
    tensorboard: bool = True
    wandb: bool = False
    devices: int = 1
    threads: int = 0
    stop_on_collapse: bool = False


class Interrupted(Exception):  # noqa: N818
    """A signal ended the run after a checkpoint was written."""


class TrainingError(Exception):
    """The run cannot go on: a non-finite loss, or a collapse with ``stop_on_collapse``."""


class Step(NamedTuple):
    """What one forward pass returns: the loss, and a function that computes the numbers to log."""

    loss: Tensor
    metrics: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained.

    Attributes:
        module: exactly what training changes; its state is the checkpoint.
        step: (module as the engine wrapped it, batch on the device, share of the run that is done) → loss and metrics.
        batches: (first, last) forward pass → a loader of these batches in order.
        steps_per_epoch: optimiser steps per epoch.
        identity: nested plain values that a resumed run must share: config, teacher hashes.
        probe: scores to log now and then, such as kNN; called with the weights to be scored.
        watch: looks at the logged metrics; a returned text is a warning, shown and recorded.
        name_image: the file of an image, for the list of unreadable ones.
        groups: groups of parameters for AdamW; ``lr_scale`` is a group's share of the learning rate. None: all of
            ``module``, decayed as `build_optimizer` says.
    """

    module: nn.Module
    step: Callable[[nn.Module, Any, float], Step]
    batches: Callable[[int, int], DataLoader]
    steps_per_epoch: int
    identity: Mapping[str, Any]
    probe: Callable[[Any], Metrics]
    watch: Callable[[int, Metrics], str | None]
    name_image: Callable[[int], str]
    groups: Sequence[dict[str, Any]] | None = None


def start_fabric(run: RunConfig) -> Fabric:
    """Start the engine: one process, or DDP over several; bf16 by autocast."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy = "ddp" if run.devices > 1 else "auto"
    fabric = Fabric(
        devices=run.devices, strategy=strategy, precision="bf16-mixed" if run.precision == "bf16" else "32-true"
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
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
    state = _State.create(job, optim, run, fabric)
    first = state.restore() if run.resume else 0
    if run.resume and fabric.is_global_zero:
        forget_after(Path(run.out), first)
    stream = _Stream(job.batches(first * optim.accumulate, total * optim.accumulate), fabric)
    folder, screen = (Path(run.out), sys.stderr) if fabric.is_global_zero else (None, None)
    with RunLog(folder, total, run.tensorboard, run.wandb, screen) as log:
        report = _Report(job, run, log, optim.batch_size * optim.accumulate, stream, first)
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


def _accumulate(job: Job, state: _State, stream: _Stream, count: int, progress: float) -> Step:
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


class _Stream:
    """Batches on the device; it counts the seconds that the loop waits for them."""

    def __init__(self, loader: DataLoader, fabric: Fabric):
        self.batches = iter(loader)
        self.fabric = fabric
        self.waited = 0.0
        self.unreadable: set[int] = set()

    def __next__(self) -> Any:
        start = time.monotonic()
        batch = next(self.batches)
        self.waited += time.monotonic() - start
        self.unreadable.update(batch.image[~batch.readable].tolist())
        return self.fabric.to_device(batch)


class _Report:
    """Turns results of steps into log lines, warnings and errors."""

    def __init__(self, job: Job, run: RunConfig, log: RunLog, images_per_step: int, stream: _Stream, first: int):
        self.job, self.run, self.log = job, run, log
        self.images_per_step = images_per_step
        self.stream = stream
        self.since = (time.monotonic(), 0.0, first)
        self.told: set[str] = set()
        self.skipped = 0

    def step(self, done: int, result: Step, extra: Metrics) -> None:
        values = {"loss": result.loss.detach(), **result.metrics(), **extra}
        metrics: dict[str, Any] = {name: float(value) for name, value in values.items()}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise TrainingError(
                f"loss or gradient is not finite at step {done}: {metrics}. The last good checkpoint is kept in "
                f"{self.run.out}/checkpoints; try a lower --optim.base-lr or --run.precision fp32."
            )
        now, (before, waited, step) = time.monotonic(), self.since
        self.since = (now, self.stream.waited, done)
        steps_per_s = (done - step) / max(now - before, 1e-9)
        metrics["images_per_s"] = steps_per_s * self.images_per_step
        metrics["data_wait"] = 100 * (self.stream.waited - waited) / max(now - before, 1e-9)
        metrics["memory_gib"] = memory_gib()
        metrics["epoch"] = done / self.job.steps_per_epoch
        self.log.write(done, metrics)
        self.log.progress(done, steps_per_s, metrics)
        self._warn(done, self.job.watch(done, metrics))
        self._list_unreadable()

    def probe(self, done: int, module: nn.Module) -> None:
        start = time.monotonic()
        self.log.write(done, self.job.probe(module))
        self.since = (self.since[0] + time.monotonic() - start, *self.since[1:])

    def _warn(self, done: int, warning: str | None) -> None:
        if warning is None:
            return
        self.log.write(done, {"warning": warning})
        kind = warning.partition(":")[0]  # the numbers after it change from step to step
        if kind not in self.told:
            self.log.say(f"WARNING at step {done}: {warning}")
            self.told.add(kind)
        if self.run.stop_on_collapse:
            raise TrainingError(f"stopped at step {done}: {warning}")

    def _list_unreadable(self) -> None:
        if len(self.stream.unreadable) > self.skipped:
            self.skipped = len(self.stream.unreadable)
            names = sorted(self.job.name_image(index) for index in self.stream.unreadable)
            (Path(self.run.out) / "unreadable.txt").write_text("\n".join(names) + "\n", "utf-8", "surrogateescape")
            self.log.say(f"{len(names)} unreadable images skipped so far, listed in {self.run.out}/unreadable.txt")


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
