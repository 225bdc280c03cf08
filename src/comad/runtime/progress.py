"""Between the loop and the log: batches with the time they are waited for, and results of steps as log lines."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from comad.runtime.job import Job, Metrics, RunConfig, Step, TrainingError
from comad.runtime.log import RunLog, memory_gib


class Stream:
    """Batches on the device; it counts the seconds that the loop waits for them, and those that count for no step."""

    def __init__(self, loader: DataLoader, fabric: Fabric):
        self.batches = iter(loader)
        self.fabric = fabric
        self.waited = 0.0
        self.paused = 0.0
        self.unreadable: set[int] = set()

    def __next__(self) -> Any:
        start = time.monotonic()
        try:
            batch = next(self.batches)
        except ValueError as error:  # of a worker the last line is its message, after a traceback
            raise ValueError(str(error).strip().rpartition("\nValueError: ")[2]) from error
        self.waited += time.monotonic() - start
        self.unreadable.update(batch.image[~batch.readable].tolist())
        return self.fabric.to_device(batch)

    def close(self) -> None:
        """End the workers: the program would wait for them for ever, for they ignore signals."""
        stop = getattr(self.batches, "_shutdown_workers", None)
        if stop:
            stop()


class Report:
    """Turns results of steps into log lines, warnings and errors."""

    def __init__(self, job: Job, run: RunConfig, log: RunLog, images_per_step: int, stream: Stream, first: int):
        self.job, self.run, self.log = job, run, log
        self.images_per_step = images_per_step
        self.stream = stream
        self.since = (time.monotonic(), 0.0, first)
        self.told: set[str] = set()
        self.skipped = 0

    def step(self, done: int, result: Step, extra: Metrics) -> None:
        """Log a step; ``extra`` are numbers of the loop.

        Raises:
            TrainingError: the loss or the gradient is not finite, or the run has collapsed and was told to stop.
        """
        values = {"loss": result.loss.detach(), **result.metrics(), **extra}
        metrics: dict[str, Any] = {name: float(value) for name, value in values.items()}
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            raise TrainingError(
                f"{self.log.title}loss or gradient is not finite at step {done}: {metrics}. The last good checkpoint "
                f"is kept in {self.run.out}/checkpoints; try a lower --optim.base-lr or --run.precision fp32."
            )
        now, (before, waited, step) = time.monotonic() - self.stream.paused, self.since
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
        """Score the weights and log it; the time that it takes counts for no step."""
        start = time.monotonic()
        self.log.write(done, self.job.probe(module))
        self.stream.paused += time.monotonic() - start

    def _warn(self, done: int, warning: str | None) -> None:
        if warning is None:
            return
        self.log.write(done, {"warning": warning})
        kind = warning.partition(":")[0]  # the numbers after it change from step to step
        if kind not in self.told:
            self.log.say(f"{self.log.title}WARNING at step {done}: {warning}")
            self.told.add(kind)
        if self.run.stop_on_collapse:
            raise TrainingError(f"{self.log.title}stopped at step {done}: {warning}")

    def _list_unreadable(self) -> None:
        """Add files to the list, to which other processes and earlier parts of the run add too."""
        if len(self.stream.unreadable) == self.skipped:
            return
        self.skipped = len(self.stream.unreadable)
        path, names = Path(self.run.out) / "unreadable.txt", {self.job.name_image(i) for i in self.stream.unreadable}
        listed = set(path.read_text("utf-8", "surrogateescape").splitlines()) if path.exists() else set()
        with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write("".join(f"{name}\n" for name in sorted(names - listed)))
        self.log.say(f"{len(names | listed)} unreadable images skipped so far, listed in {path}")
