"""What a run of segmentation and one of detection share: the job and its loop, and what is written at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from comad.data.begin import begin_run
from comad.data.dense import DenseDataset, collate
from comad.data.identity import fingerprint
from comad.data.loader import TrainingBatches
from comad.models.teachers import TeacherCard
from comad.runtime.atomic import replacing, write_text
from comad.runtime.optim import not_decayed
from comad.runtime.options import identity_of
from comad.runtime.run import Metrics, check_free, start_fabric
from comad.runtime.trainer import Job, Trainer

NUM_SAMPLES = 8
"""Images whose answers are kept, for figures."""
PROBED = 48
"""Images that the scores during a run are of."""


class DenseRun(NamedTuple):
    """What a run is made of: what is trained, on what, both parts of the data, and the card of the backbone."""

    job: Job
    batches: TrainingBatches
    splits: Any
    card: TeacherCard


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
        identity={**identity_of(config), "backbone": card.as_dict(), "data": fingerprint(dataset.images)},
        probe=probe,
        groups=param_groups_layer_decay(
            module, optim.weight_decay, not_decayed(module), layer_decay=config.layer_decay
        ),
    )
    path, seed = dataset.images.path, config.run.seed
    return job, TrainingBatches(dataset, count, path, optim.pass_size, seed, config.loader, collate)


def run_dense(
    config: Any,
    prepare: Callable[[Any, Fabric], DenseRun],
    score: Callable[..., object],
    finish: Callable[[Any, Any, Any, TeacherCard], str],
) -> str:
    """Train a head and what it stands on, and score it. Of several processes the first scores; the others return "".

    Args:
        config: of the run.
        prepare: loads and checks everything; nothing is written.
        score: (module, validation images, config, limit) → scores of the first images.
        finish: (config, splits, trained module, card) → the scores of all, written to the run's folder and in words.

    Raises:
        ValueError: see `comad.data.begin.begin_run` and ``prepare``.
        Interrupted: a signal came; a checkpoint is written.
    """
    check_free(config.run)
    fabric = start_fabric(config.run, config.optim)
    job, batches, splits, card = prepare(config, fabric)
    with torch.random.fork_rng(devices=[]):  # one image, so that a scorer that fails does so before the training
        quick = replace(config, loader=replace(config.loader, workers=0))
        score(job.module.to(fabric.device), splits.validation, quick, limit=1)
    config = begin_run(config, fabric, splits).config
    with Trainer([replace(job, run=config.run)], batches, config.optim, fabric) as trainer:
        train_steps(trainer)
    return finish(config, splits, trainer.states[0].scored, card) if fabric.is_global_zero else ""


def train_steps(trainer: Trainer) -> None:
    """The training loop: the module computes its loss from images and targets."""
    for step in trainer:
        for batch in step:
            with step.microbatch(trainer.states[0]) as state:
                state.backward(*state.module(batch.images, batch.targets))


def sampled(count: int) -> list[int]:
    """Which of so many pictures have their answers kept: evenly spread."""
    return np.linspace(0, count - 1, min(NUM_SAMPLES, count)).astype(int).tolist()


def write_json(path: Path, content: Any) -> None:
    """Write plain values; the file is whole or not there."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays, compressed; the file is whole or not there."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
