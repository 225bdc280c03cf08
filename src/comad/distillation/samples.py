"""What a run leaves for its report: masks, gate, features and neighbours on a few images, and facts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from comad.data.images import ImageSet, Splits
from comad.data.loader import evaluation_batches, evaluation_views
from comad.distillation.config import DistillConfig
from comad.distillation.distiller import Distiller
from comad.distillation.masking import Masks, drop_unused_masks
from comad.evaluation.features import evaluating
from comad.evaluation.scoreboard import Score
from comad.models.backbone import Backbone
from comad.models.teachers import Teacher
from comad.reporting.samples import Classes, Neighbours, changed_options, collect, lost_by_student, write_facts

NUM_IMAGES = 8
NUM_SEARCHED = 512
"""Training images among which neighbours are looked for."""
NUM_NEIGHBOURS = 5


@torch.no_grad()
def leave_samples(
    distiller: Distiller, teachers: Sequence[Teacher], splits: Splits, scores: Sequence[Score], out: Path
) -> None:
    """Write ``report.npz`` into the run's folder."""
    shown = splits.val if len(splits.val) else splits.train
    chosen = torch.linspace(0, len(shown) - 1, min(NUM_IMAGES, len(shown))).long()
    device, method = distiller.student.pixel_mean.device, distiller.method
    sizes = (*(teacher.backbone.image_size for teacher in teachers), distiller.student.image_size)
    *views, images = (view.to(device) for view in next(iter(evaluation_views(shown, sizes, NUM_IMAGES, chosen))))
    shape = (len(images), 1 + len(teachers), distiller.student.num_patches)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    whole = Masks(None, (None,) * len(teachers), noise[:, 1:, 0])
    with evaluating(distiller):
        masks = drop_unused_masks(method.masking(noise, 0.0), teachers)
        seen = list(enumerate(zip(teachers, views, strict=True)))
        outputs = [distiller.forward_teacher(teacher, m, view, masks) for m, (teacher, view) in seen]
        shares = distiller.teacher_shares(images, outputs, masks)[:, : len(images)]
        full = [distiller.forward_teacher(teacher, m, view, whole) for m, (teacher, view) in seen]
        encoded = distiller.encode(images, whole)
        pairs, _ = distiller.align(encoded, full, whole)
        features = {teacher.name: output.patches for teacher, output in zip(teachers, full, strict=True)}
        features["student"] = encoded.last[:, 1:]
        if method.fusion.one_target and pairs:
            features["target"] = method.fusion(distiller.fusion, list(pairs.values()))[0][0].target[:, 1:]
        neighbours = _neighbours(distiller.student, teachers, splits.train, (images, *views))
    own = None if masks.student is None else masks.student[: len(images)]  # the first of several of an image
    visible = {"student": masks._replace(student=own).student_sees(len(images), shape[2], device)}
    visible |= {
        t.name: part for t, part in zip(teachers, masks.teachers_see(len(images), shape[2], device), strict=True)
    }
    collect(
        out,
        (255 * images).byte().permute(0, 2, 3, 1).cpu(),
        masks=visible,
        gate={teacher.name: part for teacher, part in zip(teachers, shares, strict=True)},
        features={name: part.float() for name, part in features.items() if part.isfinite().all()},
        neighbours=neighbours,
        classes=_classes(splits, scores),
    )


def _neighbours(student: Backbone, teachers: Sequence[Teacher], train: ImageSet, shown: Sequence[Tensor]) -> Neighbours:
    """The nearest of some training images by mean patch, for the student and every teacher, each at its own size."""
    chosen = torch.linspace(0, len(train) - 1, min(NUM_SEARCHED, len(train))).long()
    names = ["student", *(teacher.name for teacher in teachers)]
    networks = [student, *(teacher.backbone for teacher in teachers)]
    sizes = [network.image_size for network in networks]
    rows = [
        [_mean_patch(network, view.to(shown[0].device)) for network, view in zip(networks, views, strict=True)]
        for views in evaluation_views(train, sizes, 64, chosen)
    ]
    count, numbers = min(NUM_NEIGHBOURS, len(chosen)), {}
    for name, network, view, found in zip(names, networks, shown, zip(*rows, strict=True), strict=True):
        cosines = _mean_patch(network, view) @ torch.cat(found).T
        numbers[name] = chosen[cosines.topk(count, dim=1).indices.cpu()]
    needed = torch.cat([part.flatten() for part in numbers.values()]).unique()
    thumbnails = torch.cat(list(evaluation_batches(train, student.image_size, 128, needed)))
    pixels = (255 * thumbnails).byte().permute(0, 2, 3, 1)
    return Neighbours(numbers, dict(zip(needed.tolist(), pixels, strict=True)))


def _mean_patch(network: Backbone, images: Tensor) -> Tensor:
    return F.normalize(network(images).patches.float().mean(dim=1), dim=-1)


def _classes(splits: Splits, scores: Sequence[Score]) -> Classes | None:
    """Classes of the scored images, and images that the best teacher names rightly and the student does not."""
    rows = {
        role: [part for part in scores if part.row.role == role and "knn" in part.correct]
        for role in ("teacher", "student")
    }
    if not rows["student"] or "fine" not in splits.class_names:
        return None
    labels = splits.test.labels["fine"]
    known = (labels >= 0).nonzero().flatten()
    best = max(rows["teacher"], key=lambda part: part.correct["knn"].float().mean(), default=None)
    lost = known[lost_by_student(best.correct["knn"], rows["student"][-1].correct["knn"])] if best else known[:0]
    views = list(evaluation_batches(splits.test, 64, 128, lost)) if len(lost) else []
    images = [(255 * view).byte().permute(1, 2, 0) for batch in views for view in batch]
    return Classes(splits.class_names["fine"], labels[known], images, labels[lost].tolist())


def leave_facts(config: DistillConfig, data: Mapping[str, str], out: Path) -> None:
    """Write ``facts.json``: the command, what differs from the defaults, what was found in the data."""
    plain, default = (TypeAdapter(DistillConfig).dump_python(part, mode="json") for part in (config, DistillConfig()))
    command = shlex.join(["comad", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("comad", "__main__.py") else ""
    write_facts(out, {"command": command, "changed": changed_options(plain, default), "data": dict(data)})
