"""The training loop's other half: whoever trains writes the loop, the `Trainer` gives its steps.

    with Trainer([job], data, optim, fabric) as trainer:
        for step in trainer:
            for batch in step:
                with step.microbatch(trainer.states[0]) as state:
                    state.backward(state.module(batch))

Around each step it updates the weights, logs, scores, saves, and heeds signals; a run that goes on begins at the step
after its last checkpoint, with the same batches and the same generators.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from comad.runtime.checkpoint import (
    RngState,
    check_parts,
    checkpoints,
    differences,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from comad.runtime.log import RunLog, digest_log, memory_gib, truncate_log
from comad.runtime.memory import keep_freed_memory
from comad.runtime.optim import OptimConfig, adamw, build_optimizer
from comad.runtime.processes import mean_of_all, together
from comad.runtime.progress import duration, say, warn
from comad.runtime.run import Interrupted, Metrics, RunConfig, TrainingError, interrupt

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a run with a checkpoint: of a keyboard, of schedulers, and of a terminal that goes away."""
FORECAST_AFTER = 5.0
"""Seconds of training after which it is said how long the rest will take."""


class OtherSetupError(ValueError):
    """A checkpoint belongs to a run of other options, teachers or images."""


@runtime_checkable
class TrainingData(Protocol):
    """Training images in a deterministic order; `comad.data.loader.TrainingBatches` is one."""

    @property
    def num_images(self) -> int:
        """Of the training set."""
        ...

    def load(self, first: int, last: int, rank: int, world_size: int) -> Any:
        """The share of one process in the batches from ``first`` up to ``last``, counted from the start of the run."""

    @property
    def image_name(self) -> Callable[[int], str]:
        """Number of an image → its file, for the list of unreadable ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained. Several jobs learn from the same batches, each as it would alone.

    Attributes:
        module: exactly what training changes; its state is the checkpoint.
        run: where its checkpoints and its log go.
        identity: nested plain values that a resumed run must share: config, hashes of teachers and data.
        probe: scores to log now and then, such as kNN; called with the weights to be scored.
        watch: looks at the logged metrics; a returned text is a warning, shown and recorded.
        groups: groups of parameters for AdamW; ``lr_scale`` is a group's share of the learning rate. None: all of
            ``module``, decayed as `build_optimizer` says.
        rng: generators of its own, for one of several; None draws from the process's.
    """

    module: nn.Module
    run: RunConfig
    identity: Mapping[str, Any]
    probe: Callable[[Any], Metrics] = lambda module: {}
    watch: Callable[[int, Metrics], str | None] = lambda step, metrics: None
    groups: Sequence[dict[str, Any]] | None = None
    rng: RngState | None = None


@dataclass(eq=False)
class TrainState:
    """Everything of one job that a checkpoint holds, and the result of its last forward pass.

    Attributes:
        module: as the engine wrapped it: call it for a forward pass.
        first: steps that were done before this process.
        saved: steps that were done when the last checkpoint was written.
        logged: `digest_log` of then.
        loss, metrics: of the last forward pass; the metrics are computed only for steps that are logged.
    """

    job: Job
    module: Any
    optimizer: Any
    average: AveragedModel | None
    optim: OptimConfig
    fabric: Fabric
    first: int = 0
    saved: int = 0
    logged: str = ""
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    metrics: Callable[[], Mapping[str, Any]] = dict

    @classmethod
    def create(cls, job: Job, optim: OptimConfig, fabric: Fabric) -> TrainState:
        """Optimiser and moving average of a job; its last checkpoint if ``run.resume`` is set."""
        average = AveragedModel(job.module, multi_avg_fn=get_ema_multi_avg_fn(optim.ema)) if optim.ema else None
        if fabric.world_size > 1 and fabric.device.type == "cuda":  # torch has it for GPUs alone
            nn.SyncBatchNorm.convert_sync_batchnorm(job.module)
        how = {"fused": False} if job.run.precision == "fp16" else {}  # its scaler clips before the kernel
        optimizer = build_optimizer(job.module, optim, **how) if job.groups is None else adamw(job.groups, optim, **how)
        module, optimizer = fabric.setup(job.module, optimizer)
        if average is not None:
            average.to(fabric.device)
        state = cls(job, module, optimizer, average, optim, fabric)
        if job.run.resume:
            state.first = state.saved = state.restore()
            if fabric.is_global_zero:
                truncate_log(Path(job.run.out), state.first, state.logged)
        return state

    @property
    def scored(self) -> Any:
        """The module to score: the moving average of the weights, if one is kept."""
        return self.average.module if self.average is not None else self.job.module

    def use_rng(self) -> Any:
        """Draw from its own generators, if it has any, within the context."""
        return self.job.rng.use() if self.job.rng else nullcontext()

    def backward(self, loss: Tensor, metrics: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Add the gradient of one pass of ``optim.passes``; ``metrics`` computes further numbers for the log."""
        self.fabric.backward(loss / self.optim.passes)
        self.loss, self.metrics = loss.detach(), metrics

    def update(self, lr: float) -> Tensor:
        """One optimiser step. Returns the gradient's norm before it was clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.optim.clip or math.inf, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.job.module)
        return cast(Tensor, norm)

    @property
    def num_bytes(self) -> int:
        """Of a checkpoint: the module's state, its average, and two moments of all that is trained."""
        state = [*self.job.module.state_dict().values()]
        held = sum(x.nbytes for x in state if isinstance(x, Tensor))
        moments = sum(2 * x.nbytes for x in self.job.module.parameters() if x.requires_grad)
        return held * (1 + (self.average is not None)) + moments

    def save(self, step: int) -> None:
        """Write a checkpoint; the first process alone does."""
        with self.use_rng():
            random = random_states()
        state = {
            "step": step,
            "module": self.job.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "random": random,
            "precision": self.fabric.strategy.precision.state_dict(),
            "identity": json.dumps(self.job.identity),
            "log": digest_log(Path(self.job.run.out)),
        }
        self.saved = step
        if self.fabric.is_global_zero:
            save_checkpoint(Path(self.job.run.out) / "checkpoints", step, state, self.job.run.keep)

    def restore(self) -> int:
        """Read the newest checkpoint that fits. Returns the steps that were done.

        Raises:
            ValueError: it belongs to another setup, or none can be read.
        """
        out, faults = self.job.run.out, []
        for path in reversed(checkpoints(Path(out) / "checkpoints")):
            try:
                stored = load_checkpoint(path)
                check_parts(stored, path)
                self._refuse_another(stored["identity"])
                self._load(stored)
            except OtherSetupError:
                raise
            except Exception as error:  # parts of another kind fail in any way, those of plugins too
                faults.append(f"{path.name}: {' '.join(str(error).split())[:200]}")
                warn(f"{path} cannot be used, the one before is taken: {faults[-1]}")
            else:
                self.logged = str(stored.get("log", ""))
                return stored["step"]
        raise ValueError(f"no checkpoint of {out!r} can be used: {'; '.join(faults)}; pass --run.out for a new run.")

    def _refuse_another(self, identity: str) -> None:
        changed = differences(json.loads(identity), json.loads(json.dumps(self.job.identity)))
        if changed:
            raise OtherSetupError(
                f"cannot resume {self.job.run.out!r}: it was started with another setup: {'; '.join(changed)}; "
                "go on with its own, or pass --run.out for a new run."
            )

    def _load(self, stored: Mapping[str, Any]) -> None:
        self.job.module.load_state_dict(stored["module"])
        self.optimizer.load_state_dict(stored["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            if any(x.shape not in (parameter.shape, torch.Size()) for x in moments.values() if isinstance(x, Tensor)):
                raise ValueError("the optimiser's moments have other shapes than the weights")
        if self.average is not None:
            self.average.load_state_dict(stored["average"])
        self.fabric.strategy.precision.load_state_dict(stored.get("precision", {}))
        with self.use_rng():
            restore_random_states(stored["random"])


def reader_fault(error: BaseException) -> str | None:
    """One line with cause and remedy, if an error is that of a process that reads images; else None."""
    text = str(error)
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    remedy = "go on with --run.resume and fewer --loader.workers, or --loader.workers 0"
    if any(words in text for words in ("shared memory", "/torch_", "SIGBUS", "(shm)")):
        return (
            "the processes that read images have too little shared memory (/dev/shm); give a container more "
            f"(docker run --shm-size 8g), or {remedy}."
        )
    if "DataLoader timed out" in text:
        return f"no batch of images came in time: a reading process is stuck, or the disk is ({last}); {remedy}."
    if text.startswith("DataLoader worker"):
        return f"a process that reads images was killed, as systems do that run out of memory ({last}); {remedy}."
    if isinstance(error, OSError | MemoryError) and "DataLoader worker" in text:
        return f"a process that reads images failed: {last}; {remedy}."
    return None


class Prefetcher:
    """Batches on the device; it counts the seconds that the loop waits for them."""

    def __init__(self, loader: Any, fabric: Fabric, now: Callable[[], float]):
        self.batches, self.fabric, self.now = iter(loader), fabric, now
        self.workers = getattr(self.batches, "_workers", ())
        self.waited, self.waiting = 0.0, False
        self.unreadable: set[int] = set()
        self.told = signal.signal(signal.SIGCHLD, self._child_ended)  # torch's would raise in the middle of a step

    def __next__(self) -> Any:
        start = self.now()
        try:
            self.waiting = True
            self._child_ended()
            batch = next(self.batches)
        except ValueError as error:  # of a worker the last line is its message, after a traceback
            raise ValueError(str(error).strip().rpartition("\nValueError: ")[2]) from error
        except (OSError, RuntimeError, MemoryError) as error:
            if fault := reader_fault(error):
                raise TrainingError(fault) from error
            raise
        finally:
            self.waiting = False
        self.waited += self.now() - start
        self.unreadable.update(batch.image[~batch.readable].tolist())
        return self.fabric.to_device(batch)

    def _child_ended(self, *_: Any) -> None:
        """Raise while a batch is waited for, if a worker is dead."""
        ends = [worker.exitcode for worker in self.workers if worker.exitcode]
        if self.waiting and ends:
            cause = signal.Signals(-ends[0]).name if ends[0] < 0 else f"exit status {ends[0]}"
            raise RuntimeError(f"DataLoader worker: {cause}")

    def close(self) -> None:
        """End the workers: the program would wait for them for ever, for they ignore signals and may be stuck."""
        if sys.exc_info()[0] is not None:  # none is asked to end its work
            for worker in self.workers:
                worker.kill()
                worker.join()
        stop = getattr(self.batches, "_shutdown_workers", None)
        if stop:
            stop()
        signal.signal(signal.SIGCHLD, self.told)


class StepLogger:
    """Turns the results of one job's steps into log lines, warnings and errors."""

    def __init__(self, state: TrainState, log: RunLog, trainer: Trainer):
        self.state, self.log, self.trainer = state, log, trainer
        self.since = (trainer.seconds, 0.0, state.first)
        self.told: set[str] = set()
        self.skipped = 0

    def step(self, done: int, extra: Metrics) -> None:
        """Log a step; ``extra`` are numbers of the loop.

        Raises:
            TrainingError: the loss or the gradient is not finite, or the run has collapsed and was told to stop.
        """
        state, trainer, run = self.state, self.trainer, self.state.job.run
        with together():
            values: dict[str, Any] = {"loss": mean_of_all(state.loss), **extra}
            must = ("loss",) if run.precision == "fp16" else ("loss", "grad_norm")  # in fp16 such a step is left out
            finite = all(math.isfinite(float(values[name])) for name in must)
            with nullcontext() if finite else suppress(RuntimeError):  # an SVD of what is not finite
                values |= state.metrics()
            numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
            metrics = dict(zip(values, mean_of_all(numbers.to(state.fabric.device)).tolist(), strict=True))
        if not finite:
            raise TrainingError(
                f"{self.log.title}loss or gradient is not finite at step {done}: {metrics}. The last good checkpoint "
                f"is kept in {run.out}/checkpoints; try a lower --optim.base-lr or --run.precision fp32."
            )
        now, (before, waited, step) = trainer.seconds, self.since
        self.since = (now, trainer.prefetcher.waited, done)
        steps_per_s = (done - step) / max(now - before, 1e-9)
        metrics["images_per_s"] = steps_per_s * trainer.optim.images_per_step
        metrics["data_wait"] = 100 * (trainer.prefetcher.waited - waited) / max(now - before, 1e-9)
        metrics["memory_gib"] = memory_gib()
        metrics["epoch"] = done / trainer.steps_per_epoch
        self.log.write(done, metrics)
        self.log.progress(done, steps_per_s, metrics)
        self._warn(done, state.job.watch(done, metrics))
        self._list_unreadable()

    def _warn(self, done: int, warning: str | None) -> None:
        if warning is None:
            return
        self.log.write(done, {"warning": warning})
        kind = warning.partition(":")[0]  # the numbers after it change from step to step
        if kind not in self.told:
            self.log.say(f"{self.log.title}WARNING at step {done}: {warning}")
            self.told.add(kind)
        if self.state.job.run.stop_on_collapse:
            raise TrainingError(f"{self.log.title}stopped at step {done}: {warning}")

    def _list_unreadable(self) -> None:
        """Add files to the list, to which other processes and earlier parts of the run add too."""
        path, unreadable = Path(self.state.job.run.out) / "unreadable.txt", self.trainer.prefetcher.unreadable
        listed = set(path.read_text("utf-8", "surrogateescape").splitlines()) if path.exists() else set()
        names = {self.trainer.data.image_name(index) for index in unreadable}
        if names - listed:
            with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write("".join(f"{name}\n" for name in sorted(names - listed)))
        if len(names | listed) != self.skipped:
            self.skipped = len(names | listed)
            self.log.say(f"{self.skipped} unreadable images skipped so far, listed in {path}")


class TrainStep:
    """One optimiser step: iterate over its batches.

    Attributes:
        progress: share of the run that is done before it.
        states: of the jobs that take part; one that is ahead after a kill waits for the others.
    """

    def __init__(self, number: int, trainer: Trainer):
        self.number, self.trainer = number, trainer
        self.progress = number / trainer.total
        self.states = [state for state in trainer.states if state.first <= number]
        self.last = False

    def __iter__(self) -> Iterator[Any]:
        count = self.trainer.optim.passes
        for number in range(count):
            self.last = number == count - 1
            try:
                batch = next(self.trainer.prefetcher)
            except TrainingError:
                if number == 0:  # between two steps, where a run can go on
                    self.trainer.rescue(self.number)
                raise
            with together():
                yield batch

    @contextmanager
    def microbatch(self, state: TrainState) -> Iterator[TrainState]:
        """Forward and backward of one job on one batch; processes exchange gradients with the last batch of a step."""
        with state.use_rng(), state.fabric.no_backward_sync(state.module, enabled=not self.last):
            yield state


class Trainer:
    """Gives the steps of a run, see the module's text.

    Args:
        jobs: what learns; their runs differ in the folder alone.
        data: the training images.
        optim: optimiser and schedule.
        fabric: the engine.
        now: a clock, in seconds.

    Attributes:
        states: one per job.
        spent: what a log line, a probe and a checkpoint took, in seconds, in order of time.

    Raises:
        ValueError: a checkpoint belongs to another setup.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite, or the run has collapsed and ``run.stop_on_collapse`` is set.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        data: TrainingData,
        optim: OptimConfig,
        fabric: Fabric,
        now: Callable[[], float] = time.monotonic,
    ):
        if fabric.device.type == "cpu":  # not before: what loading frees goes back to the system
            keep_freed_memory()
        self.run, self.data, self.optim, self.fabric, self.now = jobs[0].run, data, optim, fabric, now
        self.steps_per_epoch = optim.steps_per_epoch(data.num_images)
        self.total = optim.total_steps(self.steps_per_epoch)
        self.states = [TrainState.create(job, optim, fabric) for job in jobs]
        self.first = min(state.first for state in self.states)
        self.spent: dict[str, list[float]] = {"log": [], "probe": [], "save": []}
        if fabric.is_global_zero:
            self._check_room()

    def _check_room(self) -> None:
        """Look whether the disk has room for the checkpoints that are kept, one more, and an export of the weights."""
        needed, out = 0, Path(self.run.out)
        for state in self.states:
            there = len(checkpoints(Path(state.job.run.out) / "checkpoints"))
            needed += state.num_bytes * max(1, self.run.keep + 1 - there)
            needed += sum(x.nbytes for x in state.job.module.parameters())
        free = shutil.disk_usage(out).free
        if needed > free:
            raise ValueError(
                f"{str(out)!r} has {free / 1e6:,.1f} MB free, and checkpoints and export need {needed / 1e6:,.1f} MB; "
                "make room, lower --run.keep, or name another --run.out."
            )

    @property
    def seconds(self) -> float:
        """Of a clock that stands still while the weights are scored."""
        return self.now() - sum(self.spent["probe"])

    def __enter__(self) -> Trainer:
        span = (self.first * self.optim.passes, self.total * self.optim.passes)
        with ExitStack() as context:
            self.received = context.enter_context(_signals())  # before workers are forked: Python loses Ctrl-C there
            loader = self.data.load(*span, self.fabric.global_rank, self.fabric.world_size)
            self.prefetcher = Prefetcher(loader, self.fabric, self.now)
            context.callback(self.prefetcher.close)
            context.enter_context(_threads(self.run.threads))
            logs = [context.enter_context(self._open_log(state.job.run)) for state in self.states]
            self.loggers = [StepLogger(state, log, self) for state, log in zip(self.states, logs, strict=True)]
            self.context = context.pop_all()
        if self.optim.warmup_epochs >= self.optim.epochs:
            self.loggers[0].log.say(
                f"WARNING: the learning rate only warms up, for {self.optim.warmup_epochs:g} epochs in a run of "
                f"{self.optim.epochs:g}; set a shorter --optim.warmup-epochs."
            )
        self._announce()
        return self

    def _announce(self) -> None:
        """Say what will be done."""
        batch = self.optim.batch_size * self.optim.accumulate
        done = f"from step {self.first:,} on, " if self.first else ""
        say(
            f"training: {done}{self.total:,} steps of {batch} images, {self.optim.epochs:g} epochs of "
            f"{self.data.num_images:,} images; how long it takes is said after the first steps."
        )
        self.begun, self.forecast = (self.seconds, self.first), False

    def _forecast(self, done: int) -> None:
        """Say once how long it will take; the first step is left out, for it warms things up."""
        start, step = self.begun
        if done == self.first + 1:
            self.begun = (self.seconds, done)
        elif (took := self.seconds - start) >= FORECAST_AFTER and done < self.total:
            self.forecast = True
            left = took / (done - step) * (self.total - done)
            until = time.strftime("%a %H:%M", time.localtime(time.time() + left))
            say(f"training: about {duration(left)} at the speed of the first steps, until {until}; then the scores.")

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def __iter__(self) -> Iterator[TrainStep]:
        for number in range(self.first, self.total):
            step = TrainStep(number, self)
            yield step
            lr, done = self.optim.lr(number, self.steps_per_epoch), number + 1
            norms = [state.update(lr) for state in step.states]
            stopped = self._stopped(done)
            try:
                for logger, norm in zip([x for x in self.loggers if x.state in step.states], norms, strict=True):
                    self._record(logger, done, stopped, {"lr": lr, "grad_norm": norm})
            except OSError:
                self.rescue(done)
                raise
            if not self.forecast:
                self._forecast(done)
            if stopped and done < self.total:
                self.loggers[0].log.say(f"stopped at step {done}, checkpoint written.")
                raise Interrupted(self.run.out)

    def rescue(self, done: int) -> None:
        """Write the checkpoints that can still be written, on the way to an error."""
        for state in self.states:
            if state.saved < done and state.first < done:
                with suppress(OSError):
                    state.save(done)

    def _record(self, logger: StepLogger, done: int, stopped: bool, numbers: Metrics) -> None:
        """Log, score and save what is due after a step."""
        run, ends = self.run, done == self.total
        save = stopped or ends or done % run.checkpoint_every == 0
        if save or done == 1 or done % run.log_every == 0:
            self._timed("log", lambda: logger.step(done, numbers))
        if ends:  # before the scores, that nothing which fails there costs the training
            self._timed("save", lambda: logger.state.save(done))
        if ends or (run.probe_every > 0 and done % run.probe_every == 0):
            self._timed("probe", lambda: logger.log.write(done, logger.state.job.probe(logger.state.scored)))
        if save and not ends:
            self._timed("save", lambda: logger.state.save(done))

    def _timed(self, what: str, call: Callable[[], object]) -> None:
        start = self.now()
        call()
        self.spent[what].append(self.now() - start)

    def _stopped(self, done: int) -> bool:
        """Whether a signal came; several processes ask each other now and then, so that all leave at the same step."""
        if self.fabric.world_size == 1:
            return bool(self.received)
        if done % self.run.log_every:
            return False
        count = torch.tensor(len(self.received), device=self.fabric.device)
        return bool(self.fabric.all_reduce(count, reduce_op="sum"))

    def _open_log(self, run: RunConfig) -> RunLog:
        """The log of one job; the first process alone writes and shows it."""
        name = Path(run.out).name if len(self.states) > 1 else ""
        folder = Path(run.out) if self.fabric.is_global_zero else None
        return RunLog(folder, self.total, run.tensorboard, run.wandb, name)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads within the context; 0 leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect `STOPPING` signals for the loop to act on after the step in hand; a second one acts at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            interrupt(number, frame)
        received.append(number)
        with suppress(OSError):  # print is not for handlers
            os.write(2, f"\n{signal.Signals(number).name}: ends after this step; again: at once.\n".encode())

    heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, receive) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
