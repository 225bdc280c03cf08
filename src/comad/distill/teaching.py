"""The frozen side: load the teachers, run them, fit the aligners to them, compare the student with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from comad.data.images import ImageSet
from comad.data.loader import ViewDataset, evaluation_batches
from comad.distill.masking import Masks
from comad.models.backbone import Hidden, Tokens, gather_patches
from comad.models.teachers import Teacher, load_teacher

CALIBRATION_TOKENS = 16
"""Patches per image that the aligners are fitted on."""
HELD_OUT_IMAGES = 256


class Targets(NamedTuple):
    """What the frozen teachers say about one batch: one entry per teacher, tokens of the patches it saw."""

    tokens: tuple[Tokens, ...]
    masks: Masks


@torch.no_grad()
def teacher_step(
    teachers: Sequence[Teacher], images: Float[Tensor, "B 3 H W"], masks: Masks, hidden: Hidden = "drop"
) -> Targets:
    """Run every teacher on the patches it may see; images are resized for a teacher with another patch size."""
    tokens = []
    for teacher, visible in zip(teachers, masks.teachers, strict=True):
        side = teacher.backbone.grid[0] * teacher.backbone.patch_size
        view = (
            images if side == images.shape[-1] else F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        )
        tokens.append(teacher.backbone(view, visible, hidden))
    return Targets(tuple(tokens), masks)


def load_teachers(
    specs: Sequence[str], rows: int, patch_size: int, dtype: torch.dtype, device: torch.device
) -> list[Teacher]:
    """Load teachers at an image size that gives them the student's grid of ``rows`` × ``rows`` patches.

    Raises:
        ValueError: no teacher, two of the same name, or one that cannot be loaded.
    """
    if not specs:
        raise ValueError("a distillation needs at least one teacher; pass --teachers NAME=FILE or a bundled name.")
    teachers = []
    for spec in specs:
        teacher = load_teacher(spec, rows * patch_size, dtype)
        if teacher.backbone.patch_size != patch_size:
            teacher = load_teacher(spec, rows * teacher.backbone.patch_size, dtype)
        teacher.backbone.to(device)
        teachers.append(teacher)
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        raise ValueError(f"two teachers have the same name: {', '.join(names)}; give them names with NAME=FILE.")
    return teachers


def calibrate(distiller: nn.Module, teachers: Sequence[Teacher], views: ViewDataset, seed: int) -> None:
    """Fit the aligners on the teachers' tokens of whole training views, the same patches for every teacher."""
    count = min(distiller.method.aligner.calibration_images, len(views.images))
    if not count:
        return
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(views.images), generator=generator)[:count].tolist()
    position = torch.rand(count, distiller.student.num_patches, generator=generator).argsort(dim=1)[
        :, :CALIBRATION_TOKENS
    ]
    loader = DataLoader(views, batch_sampler=[[(0, i) for i in chosen[s : s + 64]] for s in range(0, count, 64)])
    tokens: list[list[torch.Tensor]] = [[] for _ in teachers]
    for number, batch in enumerate(loader):
        images = batch.views[0].to(distiller.device).float() / 255
        targets = teacher_step(teachers, images, Masks(None, (None,) * len(teachers)))
        rows = position[number * 64 : number * 64 + len(images)].to(distiller.device)
        for kept, (_, patches) in zip(tokens, targets.tokens, strict=True):
            kept.append(gather_patches(patches, rows).flatten(0, 1).float())
    distiller.aligners.calibrate([torch.cat(kept) for kept in tokens])


@torch.no_grad()
def held_out_agreement(distiller: nn.Module, teachers: Sequence[Teacher], images: ImageSet) -> dict[str, float]:
    """Mean cosine between the student's patches and each teacher's aligned ones, on whole images nobody trained on."""
    if not len(images):
        return {}
    student, sums = distiller.student, [0.0] * len(teachers)
    side, indices = student.grid[0] * student.patch_size, torch.arange(min(HELD_OUT_IMAGES, len(images)))
    training = distiller.training
    distiller.eval()
    for batch in evaluation_batches(images, side, indices=indices):
        view = batch.to(distiller.device)
        patches = student(view).patches
        targets = teacher_step(teachers, view, Masks(None, (None,) * len(teachers)))
        for m, (_, tokens) in enumerate(targets.tokens):
            cosines = F.cosine_similarity(patches.float(), distiller.aligners(tokens, m).float(), dim=-1)
            sums[m] += float(cosines.mean(dim=1).sum())
    distiller.train(training)
    return {f"held_out_cosine_{t.name}": total / len(indices) for t, total in zip(teachers, sums, strict=True)}
