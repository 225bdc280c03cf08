"""One job in the loop: its weights, optimiser, moving average and generators, and its part in a step."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from comad.runtime.checkpoint import (
    checkpoints,
    differences,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from comad.runtime.job import Job, Metrics, RunConfig, Step
from comad.runtime.log import truncate_log
from comad.runtime.optim import OptimConfig, adamw, build_optimizer
from comad.runtime.progress import Report


class Due(NamedTuple):
    """What is done after a step beside learning."""

    log: bool
    probe: bool
    save: bool


@dataclass
class Learner:
    """Everything that a checkpoint holds, and what of it the loop works on.

    Attributes:
        first: steps that were done before.
        report: of its results; the loop gives it one.
    """

    job: Job
    run: RunConfig
    module: Any
    optimizer: Any
    average: AveragedModel | None
    clip: float
    fabric: Fabric
    first: int = 0
    report: Report = field(init=False)

    @classmethod
    def create(cls, job: Job, optim: OptimConfig, run: RunConfig, fabric: Fabric) -> Learner:
        """Prepare a job for its steps; go on from its last checkpoint if ``run.resume`` is set."""
        average = AveragedModel(job.module, multi_avg_fn=get_ema_multi_avg_fn(optim.ema)) if optim.ema else None
        if fabric.world_size > 1 and fabric.device.type == "cuda":  # torch has it for GPUs alone
            nn.SyncBatchNorm.convert_sync_batchnorm(job.module)
        optimizer = build_optimizer(job.module, optim) if job.groups is None else adamw(job.groups, optim)
        module, optimizer = fabric.setup(job.module, optimizer)
        if average is not None:
            average.to(fabric.device)
        state = cls(job, run, module, optimizer, average, optim.clip, fabric)
        if run.resume:
            state.first = state.restore()
            if fabric.is_global_zero:
                truncate_log(Path(run.out), state.first)
        return state

    @property
    def scored(self) -> Any:
        """The module to score."""
        return self.average.module if self.average is not None else self.job.module

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return Path(self.run.out) / "checkpoints"

    def turn(self) -> AbstractContextManager:
        """Draw from its own generators, if it has any, for a while."""
        return self.job.random.turn() if self.job.random else nullcontext()

    def learn(self, batch: Any, count: int, progress: float, last: bool) -> Step:
        """Add a ``count``-th of the gradient of a prepared batch; with the ``last`` one processes exchange theirs."""
        with self.turn(), self.fabric.no_backward_sync(self.module, enabled=not last):
            result = self.job.step(self.module, batch, progress)
            self.fabric.backward(result.loss / count)
        return result

    def update(self, lr: float) -> Tensor:
        """One optimiser step. Returns the gradient's norm before it was clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.clip or math.inf, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.job.module)
        return cast(Tensor, norm)

    def record(self, done: int, due: Due, result: Step, numbers: Metrics) -> None:
        """Log, score and save what is due after a step; ``numbers`` are those of the loop."""
        if due.log:
            self.report.step(done, result, numbers)
        if due.probe:
            self.report.probe(done, self.scored)
        if due.save:
            self.save(done)

    def save(self, step: int) -> None:
        """Write a checkpoint; the first process alone does."""
        with self.turn():
            random = random_states()
        state = {
            "step": step,
            "module": self.job.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "random": random,
            "identity": json.dumps(self.job.identity),
        }
        if self.fabric.is_global_zero:
            save_checkpoint(self.folder, step, state, self.run.keep)

    def restore(self) -> int:
        """Read the last checkpoint. Returns the steps that were done.

        Raises:
            ValueError: it belongs to another setup.
        """
        path = checkpoints(self.folder)[-1]
        stored = load_checkpoint(path)
        changed = differences(json.loads(stored["identity"]), json.loads(json.dumps(self.job.identity)))
        if changed:
            raise ValueError(f"cannot resume {self.run.out!r}: it was started with another setup: {'; '.join(changed)}")
        self.job.module.load_state_dict(stored["module"])
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(stored["average"])
        with self.turn():
            restore_random_states(stored["random"])
        return stored["step"]
