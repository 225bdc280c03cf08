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
from comad.distill.relations import other_cosines
from comad.distill.teaching import teacher_step
from comad.models.backbone import Tokens, gather_patches
from comad.models.teachers import Teacher

CALIBRATION_TOKENS = 16
"""Patches per image that the aligners are fitted on."""
HELD_OUT_IMAGES = 256


def calibrate(
    distillers: Sequence[Distiller],
    teachers: Sequence[Teacher],
    views: ViewDataset,
    seed: int,
    limit: int | None = None,
) -> None:
    """Fit the aligners on the teachers' tokens of whole training views, the same patches for every teacher.

    Distillers of one method, on one grid, share what the teachers say. ``limit`` takes fewer images than the method
    asks for.
    """
    count = min(distillers[0].method.calibration_images, len(views.images)) if distillers else 0
    count = count if limit is None else min(count, limit)
    if not count:
        return
    distiller = distillers[0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(views.images), generator=generator)[:count].tolist()
    position = torch.rand(count, distiller.student.num_patches, generator=generator).argsort(dim=1)[
        :, :CALIBRATION_TOKENS
    ]
    loader = DataLoader(
        views,
        batch_sampler=[[(0, i) for i in chosen[s : s + 64]] for s in range(0, count, 64)],
        generator=torch.Generator(),
    )
    found: list[list[Tokens]] = [[] for _ in teachers]
    for number, batch in enumerate(loader):
        images = batch.views[0].to(distiller.device).float() / 255
        targets = teacher_step(teachers, images, _whole(teachers), reads=distiller.method.reads)
        rows = position[number * 64 : number * 64 + len(images)].to(distiller.device)
        for kept, (cls, patches, *_) in zip(found, targets.tokens, strict=True):
            kept.append(Tokens(None if cls is None else cls.float(), gather_patches(patches, rows).float()))
    tokens = [_joined(kept) for kept in found]
    for distiller in distillers:
        distiller.calibrate(tokens)


def _whole(teachers: Sequence[Teacher]) -> Masks:
    return Masks(None, (None,) * len(teachers))


def _joined(parts: Sequence[Tokens]) -> Tokens:
    cls = [part.cls for part in parts if part.cls is not None]
    return Tokens(torch.cat(cls) if cls else None, torch.cat([part.patches for part in parts]))


@torch.no_grad()
def held_out_agreement(
    distiller: Distiller, teachers: Sequence[Teacher], images: ImageSet, limit: int = HELD_OUT_IMAGES
) -> dict[str, float]:
    """How well the student agrees with each teacher on the first ``limit`` whole images that nobody trained on.

    Mean cosine between its patches and the teacher's where the method brings them to one width; else between their
    rows of cosines to the other patches of the image.
    """
    if not len(images):
        return {}
    student, sums = distiller.student, [0.0] * len(teachers)
    side, indices = student.grid[0] * student.patch_size, torch.arange(min(limit, len(images)))
    training = distiller.training
    distiller.eval()
    for batch in evaluation_batches(images, side, indices=indices):
        view = batch.to(distiller.device)
        targets = teacher_step(teachers, view, _whole(teachers), reads=distiller.method.reads)
        encoded = distiller.encode(view, targets.masks)
        pairs, _ = distiller.align(encoded, targets)
        for m, (_, tokens, *_) in enumerate(targets.tokens):
            if m in pairs and pairs[m].prediction.shape == pairs[m].target.shape:
                ours, theirs = pairs[m].prediction[:, 1:], pairs[m].target[:, 1:]
            else:
                ours, theirs = other_cosines(encoded.last[:, 1:]), other_cosines(tokens)
            sums[m] += float(F.cosine_similarity(ours, theirs, dim=-1).mean(dim=1).sum())
    distiller.train(training)
    return {f"held_out_cosine_{t.name}": total / len(indices) for t, total in zip(teachers, sums, strict=True)}
