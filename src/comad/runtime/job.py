"""What the training loop is given: a run, a job, and what a step returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.data import DataLoader

from comad.runtime.checkpoint import Generators

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

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"--run.{name.replace('_', '-')} {getattr(self, name)} is too small; use 1 or more.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is no number of 32 bits; use one from 0 on.")


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after a checkpoint was written."""


class TrainingError(Exception):
    """The run cannot go on: a non-finite loss, or a collapse with ``stop_on_collapse``."""


class Step(NamedTuple):
    """What one forward pass returns: the loss, and a function that computes the numbers to log."""

    loss: Tensor
    metrics: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained. Jobs that are trained together share ``batches`` and ``prepare``.

    Attributes:
        module: exactly what training changes; its state is the checkpoint.
        step: (module as the engine wrapped it, prepared batch, share of the run that is done) → loss and metrics.
        batches: (first, last) forward pass → a loader of these batches in order.
        steps_per_epoch: optimiser steps per epoch; a fraction where an epoch ends within a step.
        identity: nested plain values that a resumed run must share: config, teacher hashes.
        probe: scores to log now and then, such as kNN; called with the weights to be scored.
        watch: looks at the logged metrics; a returned text is a warning, shown and recorded.
        name_image: the file of an image, for the list of unreadable ones.
        groups: groups of parameters for AdamW; ``lr_scale`` is a group's share of the learning rate. None: all of
            ``module``, decayed as `build_optimizer` says.
        prepare: (batch on the device, share of the run that is done) → what the steps get; called once per batch.
        random: generators of its own, for one of several; None draws from the process's.
    """

    module: nn.Module
    step: Callable[[nn.Module, Any, float], Step]
    batches: Callable[[int, int], DataLoader]
    steps_per_epoch: float | int
    identity: Mapping[str, Any]
    probe: Callable[[Any], Metrics]
    watch: Callable[[int, Metrics], str | None]
    name_image: Callable[[int], str]
    groups: Sequence[dict[str, Any]] | None = None
    prepare: Callable[[Any, float], Any] = lambda batch, progress: batch
    random: Generators | None = None


def identity_of(config: Any, *without: str) -> dict[str, Any]:
    """What the result of a run depends on, as nested plain values.

    Args:
        config: a dataclass with ``run`` and ``loader``; of these only what changes a result is kept.
        without: further fields that change none.
    """
    plain = {key: value for key, value in asdict(config).items() if key not in without}
    plain["run"] = {key: plain["run"][key] for key in ("seed", "precision")}
    del plain["loader"]["workers"]
    return plain
