"""What a run of segmentation and one of detection share: the job and its loop, and what is written at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from comad.data.dense import DenseDataset, collate
from comad.data.loader import TrainingBatches
from comad.models.teachers import TeacherCard
from comad.runtime.optim import OptimConfig, not_decayed
from comad.runtime.options import identity_of
from comad.runtime.run import Metrics
from comad.runtime.trainer import Job, Trainer

NUM_SAMPLES = 8
"""Images whose answers are kept, for figures."""
PROBED = 48
"""Images that the scores during a run are of."""


def dense_job(
    config: Any, module: nn.Module, dataset: DenseDataset, card: TeacherCard, probe: Callable[[Any], Metrics]
) -> tuple[Job, TrainingBatches]:
    """What is trained, and on what.

    Args:
        config: has ``optim``, ``layer_decay``, ``loader`` and ``run``.
        module: its forward takes images and targets and returns the loss and a function that computes metrics.
        dataset: the training images.
        card: of the backbone; a resumed run must have the same.
        probe: scores now and then.

    Raises:
        ValueError: too few images for a batch.
    """
    optim, count = config.optim, len(dataset.images)
    whole = optim.images_per_step
    if count < whole:
        raise ValueError(
            f"{count} training pictures are too few for a batch of {whole}; set --optim.batch-size {count}."
        )
    job = Job(
        module=module,
        run=config.run,
        identity={**identity_of(config), "backbone": card.as_dict(), "images": count},
        probe=probe,
        groups=param_groups_layer_decay(
            module, optim.weight_decay, not_decayed(module), layer_decay=config.layer_decay
        ),
    )
    path, seed = dataset.images.path, config.run.seed
    return job, TrainingBatches(dataset, count, path, optim.pass_size, seed, config.loader, collate)


def train_dense(job: Job, data: TrainingBatches, optim: OptimConfig, fabric: Fabric) -> Any:
    """Train to the end. Returns the module to score; for what it raises see `comad.runtime.trainer.Trainer`."""
    with Trainer([job], data, optim, fabric) as trainer:
        train_steps(trainer)
    return trainer.states[0].scored


def train_steps(trainer: Trainer) -> None:
    """The training loop: the module computes its loss from images and targets."""
    for step in trainer:
        for batch in step:
            with step.microbatch(trainer.states[0]) as state:
                state.backward(*state.module(batch.images, batch.targets))


def sampled(count: int) -> list[int]:
    """Which of so many pictures have their answers kept: evenly spread."""
    return np.linspace(0, count - 1, min(NUM_SAMPLES, count)).astype(int).tolist()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file of plain values."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
