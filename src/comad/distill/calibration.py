"""Teachers against student, outside the step: the aligners are fitted before it, the agreement is measured between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from comad.data.images import ImageSet
from comad.data.loader import ViewDataset, evaluation_batches
from comad.distill.distiller import Distiller
from comad.distill.masking import Masks
from comad.distill.teaching import teacher_step
from comad.models.backbone import gather_patches
from comad.models.teachers import Teacher

CALIBRATION_TOKENS = 16
"""Patches per image that the aligners are fitted on."""
HELD_OUT_IMAGES = 256


def calibrate(distiller: Distiller, teachers: Sequence[Teacher], views: ViewDataset, seed: int) -> None:
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
def held_out_agreement(distiller: Distiller, teachers: Sequence[Teacher], images: ImageSet) -> dict[str, float]:
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
