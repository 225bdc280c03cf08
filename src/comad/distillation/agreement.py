"""How well the student agrees with its teachers on images that nobody trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from comad.data.images import ImageSet
from comad.data.loader import evaluation_views
from comad.distillation.distiller import Distiller
from comad.distillation.masking import Masks
from comad.distillation.relations import other_cosines
from comad.models.teachers import Teacher

HELD_OUT_IMAGES = 256


@torch.no_grad()
def held_out_agreement(
    distiller: Distiller, teachers: Sequence[Teacher], images: ImageSet, limit: int = HELD_OUT_IMAGES
) -> dict[str, float]:
    """Agreement with each teacher on the first ``limit`` whole images, as a mean cosine.

    Between the student's patches and the teacher's where the method brings them to one width; else between their rows
    of cosines to the other patches of the image.
    """
    if not len(images):
        return {}
    student, sums = distiller.student, [0.0] * len(teachers)
    indices, whole = torch.arange(min(limit, len(images))), Masks(None, (None,) * len(teachers))
    training = distiller.training
    distiller.eval()
    sizes = (*(teacher.backbone.image_size for teacher in teachers), student.image_size)
    for batch in evaluation_views(images, sizes, indices=indices):
        *theirs, own = (view.to(student.pixel_mean.device) for view in batch)
        outputs = [distiller.forward_teacher(t, m, theirs[m], whole) for m, t in enumerate(teachers)]
        encoded = distiller.encode(own, whole)
        pairs, _ = distiller.align(encoded, outputs, whole)
        for m, output in enumerate(outputs):
            if m in pairs and pairs[m].prediction.shape == pairs[m].target.shape:
                a, b = pairs[m].prediction[:, 1:], pairs[m].target[:, 1:]
            else:
                a, b = other_cosines(encoded.last[:, 1:]), other_cosines(output.patches)
            sums[m] += float(F.cosine_similarity(a, b, dim=-1).mean(dim=1).sum())
    distiller.train(training)
    return {f"held_out_cosine_{t.name}": total / len(indices) for t, total in zip(teachers, sums, strict=True)}
