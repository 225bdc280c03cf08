"""What a run on own images does if nobody says otherwise: chosen by their number and size, and by the machine."""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from comad.data.images import ImageSet
from comad.distillation.config import DistillConfig
from comad.models.students import is_plain

SAMPLED = 16
"""Images that are opened to see how large they are."""
ROW_BYTES = 3e5
"""Of one teacher's tokens of one view in a cache, about: 14 × 14 patches of 768 channels in bf16."""
HIGHEST_RATE = 3e-3
"""Learning rate of a network that is no plain ViT at batch 64 and more, chosen on photographs (docs/choosing.md)."""

SIZE_FLAGS = ("--student.image-size", "--student.patch-size")
CACHE_FLAGS = ("--cache-teachers", "--no-cache-teachers", "--loader.fixed-views")
NEW_VIEWS = ("--masking.mixup", "--masking.shift", "--masking.mask-ratio-end", "--masking.scales")
"""Options with which teachers see something new each time, so that nothing can be cached."""
FLAGS = (*SIZE_FLAGS, "--optim.batch-size", "--optim.epochs", "--optim.warmup-epochs", "--optim.base-lr", *CACHE_FLAGS)
"""Options that may be chosen."""


class Machine(NamedTuple):
    """What defaults depend on.

    Attributes:
        gpu: whether there is one.
        cores: of the CPU, for this process.
        free: bytes of disk that are free where runs lie.
    """

    gpu: bool
    cores: int
    free: int


def this_machine() -> Machine:
    """The one that this runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(torch.cuda.is_available(), cores, shutil.disk_usage(Path.cwd()).free)


def fit_to_data(config: DistillConfig, images: ImageSet, machine: Machine, given: Sequence[str] = ()) -> DistillConfig:
    """A recipe for own images on this machine.

    With a GPU it stays that of the paper, but for what few or small images forbid. On a CPU images have 96 pixels and
    8 × 8 patches, a run sees some 120,000 images, and teachers are asked twice per image if the disk has room for what
    they say. A network from scratch that is no plain Vision Transformer has a higher learning rate on both.

    Args:
        config: the recipe of the paper, for a method.
        images: of the training set.
        machine: see `Machine`.
        given: options that are given, such as ``--optim.epochs``; what they have a say in is left alone.
    """
    count = max(1, len(images))
    student, optim, plain = config.student, config.optim, is_plain(config.student.name)
    if not {*SIZE_FLAGS, "--student.pretrained"} & set(given):
        rows, largest = (14, 224) if machine.gpu else (8, 96)
        patch = max(2, min(largest, median_side(images)) // rows)
        if patch * rows != student.image_size:
            student = replace(student, image_size=patch * rows, patch_size=patch if plain else None)
    batch = min(count, 256 if machine.gpu else 64, 2 ** int(math.log2(max(8, count / 16))))
    optim = replace(optim, batch_size=batch)
    if not machine.gpu and "--optim.epochs" not in given:
        epochs = float(min(100, max(10, round(120_000 / count))))
        optim = replace(optim, epochs=epochs, warmup_epochs=max(1.0, epochs / 20), base_lr=1e-3)
    trained = student.pretrained or student.start or {"--student.pretrained", "--student.start"} & set(given)
    if not (plain or trained):
        known = 256 if "--optim.batch-size" in given else max(batch, 64)
        optim = replace(optim, base_lr=256 * HIGHEST_RATE / known)
    views = 0
    if not machine.gpu and config.method.masking.repeats and not {*CACHE_FLAGS, *NEW_VIEWS} & set(given):
        views = 2 if 2 * ROW_BYTES * count * max(1, len(config.teachers) or 3) < machine.free / 4 else 0
    loader = replace(config.loader, fixed_views=views or config.loader.fixed_views)
    return replace(config, student=student, optim=optim, loader=loader, cache_teachers=bool(views))


def median_side(images: ImageSet) -> int:
    """Pixels on the shorter side of a middling image, of a few that are spread over the set."""
    chosen = torch.linspace(0, len(images) - 1, min(SAMPLED, len(images))).long().tolist()
    sides = []
    for index in chosen:
        try:
            sides.append(min(images.load(index).shape[1:]))
        except ValueError:  # unreadable images are told by the run
            continue
    return round(statistics.median(sides)) if sides else 224


def told(config: DistillConfig, before: DistillConfig, images: ImageSet, machine: Machine, given: Sequence[str]) -> str:
    """What was chosen, as the options that would say so, but for those that are given."""
    parts = []
    for flag in FLAGS:
        group, _, name = flag.removeprefix("--").replace("-", "_").rpartition(".")
        ours, theirs = (getattr(getattr(part, group) if group else part, name, None) for part in (config, before))
        if ours != theirs and flag not in given:
            parts.append(flag if ours is True else f"{flag} {ours:g}")
    where = "a GPU" if machine.gpu else f"{machine.cores} CPU cores"
    return f"chosen for {len(images):,} training images on {where}, and options override it: {' '.join(parts)}"
