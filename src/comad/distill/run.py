"""One distillation run: from a config to a scored and exported student."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from comad.data.images import Splits, load_images
from comad.data.loader import Batch, EpochBatches, ViewDataset, training_batches
from comad.data.transforms import ColourChange, Crop
from comad.distill.calibration import calibrate, held_out_agreement
from comad.distill.config import DistillConfig
from comad.distill.distiller import Distiller
from comad.distill.finish import Result, finish
from comad.distill.health import Watch
from comad.distill.teacher_cache import TeacherCache
from comad.distill.teaching import hide_nothing_in_vain, load_teachers, teacher_step
from comad.distill.views import DistillViews
from comad.evaluate.probe import KnnProbe
from comad.models.teachers import Teacher, licence_notice
from comad.models.timm_backbone import TimmBackbone, plain_attention_on_cpu
from comad.runtime.log import first_metrics
from comad.runtime.recipe import write_recipe
from comad.runtime.train import Job, Metrics, Step, open_run, start_fabric, train


def distill(config: DistillConfig) -> Result | None:
    """Distil the teachers into a student, score it beside them, and export it to ``student`` in the run's folder.

    Of several processes the first does what comes after training; the others return None.

    Raises:
        ValueError: bad data, teachers or recipe, a run folder in use, or a resume that does not fit.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite, or the run collapsed and was told to stop.
    """
    fabric = start_fabric(config.run)
    fabric.seed_everything(config.run.seed, verbose=False)
    splits = load_images(config.data)
    _check(config, splits)
    student = config.student.build()
    precision = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    teachers = load_teachers(config.teachers, student.grid[0], student.patch_size, precision, fabric.device)
    out = open_run(config.run, fabric)
    start = copy.deepcopy(student)
    for line in filter(None, (*(teacher.card.summary() for teacher in teachers), licence_notice(teachers))):
        fabric.print(line)
    widths = [teacher.backbone.width for teacher in teachers]
    distiller = Distiller(student, config.method, widths, ["cls" in t.backbone.token_types for t in teachers])
    distiller.to(fabric.device)
    plain_attention_on_cpu(distiller, fabric.device)
    if not config.run.resume:
        calibrate(distiller, teachers, _views(config, splits, student, len(teachers)), config.run.seed)
        if fabric.is_global_zero:
            write_recipe(config, out / "config.yaml")
    trained = train(_job(config, splits, distiller, teachers, fabric), config.optim, config.run, fabric)
    if not fabric.is_global_zero:
        return None
    return finish(config, splits, teachers, (start, trained.student), out, fabric)


def _check(config: DistillConfig, splits: Splits) -> None:
    if config.cache_teachers and not config.loader.fixed_views:
        raise ValueError("--cache-teachers needs views that repeat; set --loader.fixed-views to 2 or more.")
    count, batch = len(splits.train), config.optim.batch_size * config.optim.accumulate
    if count < batch:
        raise ValueError(
            f"{count} training images in {config.data!r} are too few for a batch of {batch}; add images or set "
            f"--optim.batch-size {max(1, count // config.optim.accumulate)}."
        )


def _views(config: DistillConfig, splits: Splits, student: TimmBackbone, num_teachers: int) -> ViewDataset:
    size, jitter = config.student.image_size, config.augment.jitter
    colour = ColourChange(strength=jitter, hue=jitter / 4) if jitter else None
    make = DistillViews(Crop(size=size, scale=config.augment.crop_scale), colour, 1 + num_teachers, student.num_patches)
    return ViewDataset(splits.train, make, config.run.seed, 2 * size)


def _job(
    config: DistillConfig, splits: Splits, distiller: Distiller, teachers: Sequence[Teacher], fabric: Fabric
) -> Job:
    views = _views(config, splits, distiller.student, len(teachers))
    optim, fixed = config.optim, config.loader.fixed_views
    hidden = config.method.masking.teachers_hidden
    cache = TeacherCache(len(views.images), fixed) if config.cache_teachers else None
    knn = KnnProbe(splits, config.student.image_size)

    def batches(first: int, last: int) -> DataLoader:
        span, share = (first, last), (fabric.global_rank, fabric.world_size)
        order = EpochBatches(len(views.images), optim.batch_size, config.run.seed, span, fixed_views=fixed, share=share)
        return training_batches(views, order, config.loader)

    def step(module: nn.Module, batch: Batch, progress: float) -> Step:
        shared, own = (view.float() / 255 for view in batch.views)
        masks = hide_nothing_in_vain(config.method.masking(batch.noise), teachers)
        targets = (
            cache(batch, masks, lambda: teacher_step(teachers, shared, masks, hidden))
            if cache
            else teacher_step(teachers, shared, masks, hidden)
        )
        loss, metrics = module(own, targets)
        return Step(loss, lambda: _named_shares(metrics(), teachers))

    def probe(module: Distiller) -> Metrics:
        return {**knn(module.student), **held_out_agreement(module, teachers, splits.val)}

    return Job(
        module=distiller,
        step=step,
        batches=batches,
        steps_per_epoch=len(views.images) // (optim.batch_size * optim.accumulate),
        identity={**_plain(config), "teacher_cards": {t.name: t.card.as_dict() for t in teachers}},
        probe=probe,
        watch=Watch(first_metrics(Path(config.run.out)) if config.run.resume else None),
        name_image=views.images.path,
    )


def _plain(config: DistillConfig) -> dict[str, Any]:
    """The config as nested plain values, without what may differ between a run and its continuation."""
    plain = asdict(config)
    del plain["split"]
    plain["run"] = {key: plain["run"][key] for key in ("seed", "precision")}
    return plain


def _named_shares(metrics: dict[str, torch.Tensor], teachers: Sequence[Teacher]) -> dict[str, torch.Tensor]:
    names = {f"share_{m}": f"share_{teacher.name}" for m, teacher in enumerate(teachers)}
    return {names.get(key, key): value for key, value in metrics.items()}
