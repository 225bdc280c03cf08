"""What a run of segmentation and one of detection share: the job of the loop, and what is written at its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader

from comad.data.dense import DenseBatch, DenseDataset, collate
from comad.data.loader import EpochBatches, training_batches
from comad.models.teachers import TeacherCard
from comad.runtime.job import identity_of
from comad.runtime.optim import not_decayed
from comad.runtime.train import Job, Metrics, Step

NUM_SAMPLES = 8
"""Pictures whose answers are kept, for figures."""
PROBED = 48
"""Pictures that the scores during a run are of."""


def dense_job(
    config: Any,
    module: nn.Module,
    dataset: DenseDataset,
    fabric: Fabric,
    card: TeacherCard,
    probe: Callable[[Any], Metrics],
) -> Job:
    """The job of training a dense head.

    Args:
        config: has ``optim``, ``layer_decay``, ``loader`` and ``run``.
        module: its forward takes images and targets and returns a `Step`.
        dataset: the training pictures.
        fabric: the engine.
        card: of the backbone; a resumed run must have the same.
        probe: scores now and then.
    """
    batch_size, count = config.optim.batch_size, len(dataset.images)
    whole = batch_size * config.optim.accumulate
    if count < whole:
        raise ValueError(
            f"{count} training pictures are too few for a batch of {whole}; set --optim.batch-size {count}."
        )

    def batches(first: int, last: int) -> DataLoader:
        share = (fabric.global_rank, fabric.world_size)
        order = EpochBatches(
            count, batch_size, config.run.seed, (first, last), fixed_views=config.loader.fixed_views, share=share
        )
        return training_batches(dataset, order, config.loader, collate)

    def step(wrapped: nn.Module, batch: DenseBatch, progress: float) -> Step:
        return wrapped(batch.images, batch.targets)

    return Job(
        module=module,
        step=step,
        batches=batches,
        steps_per_epoch=config.optim.steps_per_epoch(count),
        identity={**identity_of(config, "figures", "backbone", "data"), "backbone": card.as_dict()},
        probe=probe,
        watch=lambda done, metrics: None,
        name_image=dataset.images.path,
        groups=param_groups_layer_decay(
            module, config.optim.weight_decay, not_decayed(module), layer_decay=config.layer_decay
        ),
    )


def sampled(count: int) -> list[int]:
    """Which of so many pictures have their answers kept: evenly spread."""
    return np.linspace(0, count - 1, min(NUM_SAMPLES, count)).astype(int).tolist()


def tell(message: str) -> None:
    """Show a line before the run."""
    sys.stderr.write(f"comad: {message}\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file of plain values."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
