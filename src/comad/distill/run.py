"""One distillation run: from a config to a scored and exported student."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comad.data.images import Splits, load_images
from comad.data.loader import Batch, EpochBatches, ViewDataset, training_batches
from comad.data.transforms import ColourChange, Crop
from comad.distill.calibration import calibrate, held_out_agreement
from comad.distill.config import DistillConfig
from comad.distill.distiller import Distiller
from comad.distill.finish import Result, finish
from comad.distill.health import Watch
from comad.distill.matching import give_decoders, match, widths_and_cls
from comad.distill.speed import compile_step, quantize_teachers
from comad.distill.teacher_cache import TeacherCache, key_of, open_cache
from comad.distill.teaching import Said, ask, hide_nothing_in_vain, load_teachers, teacher_step
from comad.distill.views import DistillViews
from comad.evaluate.probe import KnnProbe
from comad.models.compiling import as_written, need_compiler
from comad.models.quantized import check_quantized
from comad.models.teachers import Teacher, licence_notice
from comad.models.timm_backbone import TimmBackbone, plain_attention_on_cpu
from comad.runtime.log import first_metrics
from comad.runtime.recipe import write_recipe
from comad.runtime.train import Job, Metrics, Step, open_run, start_fabric, train

SAME_RESULT = ("teachers_in", "cache_folder", "split")
"""Options that may change when a run goes on."""


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
    teachers = _load_teachers(config, student, fabric)
    config = replace(config, student=match(config.method, config.student, student, teachers))
    out = open_run(config.run, fabric)
    start = copy.deepcopy(student)
    for line in filter(None, (*(teacher.card.summary() for teacher in teachers), licence_notice(teachers))):
        fabric.print(line)
    distiller = Distiller(student, config.method, *widths_and_cls(config.method, teachers))
    distiller.to(fabric.device)
    plain_attention_on_cpu(distiller, fabric.device)
    views = _views(config, splits, student, len(teachers))
    for line in quantize_teachers(teachers, config.quantized, views, fabric.device):
        fabric.print(line)
    cache = _open_cache(config, views, teachers, fabric)  # a disk that is too small is told before any work
    if not config.run.resume:
        calibrate(distiller, teachers, views, config.run.seed)
        if fabric.is_global_zero:
            write_recipe(config, out / "config.yaml")
    if config.compile:
        compile_step(distiller, teachers)
    trained = train(_job(config, splits, distiller, teachers, cache, fabric), config.optim, config.run, fabric)
    if cache and not config.cache_folder:
        fabric.barrier()
        shutil.rmtree(config.cache_in, ignore_errors=True)
    if not fabric.is_global_zero:
        return None
    with as_written(config.compile):
        return finish(config, splits, teachers, (start, trained.student), out, fabric)


def _load_teachers(config: DistillConfig, student: TimmBackbone, fabric: Fabric) -> list[Teacher]:
    """Teachers on the student's grid, with their decoders where the method learns from them."""
    if config.quantized:
        check_quantized(config.quantized, fabric.device, config.compile)
    grid, dtype = (student.grid[0], student.patch_size), config.teacher_dtype
    teachers = load_teachers(config.teachers, *grid, dtype, fabric.device, config.offload_to)
    if config.method.tap.decoder:
        give_decoders(config.teachers, teachers, dtype, fabric.device)
    return teachers


def _check(config: DistillConfig, splits: Splits) -> None:
    if config.compile:
        need_compiler()
    if config.cache_teachers and not config.loader.fixed_views:
        raise ValueError("--cache-teachers needs views that repeat; set --loader.fixed-views to 2 or more.")
    count, batch = len(splits.train), config.optim.batch_size * config.optim.accumulate
    if count < batch:
        raise ValueError(
            f"{count} training images in {config.data!r} are too few for a batch of {batch}; add images or set "
            f"--optim.batch-size {max(1, count // config.optim.accumulate)}."
        )
    if config.quantized and config.teachers_in == "offload":
        raise ValueError(
            f"--teacher-precision {config.quantized} keeps teachers in memory, at half the room; leave out "
            "--teachers-in offload."
        )
    if config.cache_teachers and config.method.masking.student_end is not None:
        raise ValueError(
            "--cache-teachers needs masks that repeat; add --no-cache-teachers, or leave out "
            "--method.masking.student-end."
        )


def _views(config: DistillConfig, splits: Splits, student: TimmBackbone, num_teachers: int) -> ViewDataset:
    size, jitter = config.student.image_size, config.augment.jitter
    colour = ColourChange(strength=jitter, hue=jitter / 4) if jitter else None
    make = DistillViews(Crop(size=size, scale=config.augment.crop_scale), colour, 1 + num_teachers, student.num_patches)
    return ViewDataset(splits.train, make, config.run.seed, 2 * size)


def _open_cache(
    config: DistillConfig, views: ViewDataset, teachers: Sequence[Teacher], fabric: Fabric
) -> TeacherCache | None:
    """The cache of what the teachers say of every view, if the run is to have one."""
    if not config.cache_teachers:
        return None

    method = config.method

    def example(m: int) -> Said:
        sample = views[0, 0]
        masks = hide_nothing_in_vain(method.masking(sample.noise.unsqueeze(0).to(fabric.device)), teachers)
        view = sample.views[0].unsqueeze(0).to(fabric.device).float() / 255
        return ask(teachers[m], m, view, masks.teachers[m], method.masking.teachers_hidden, method.reads)

    keys = [(teacher.name, key_of(teacher, m, views, method)) for m, teacher in enumerate(teachers)]
    shape = len(views.images), config.loader.fixed_views
    return open_cache(config.cache_in, keys, shape, example, config.cache_storage, fabric.print)


def _job(
    config: DistillConfig,
    splits: Splits,
    distiller: Distiller,
    teachers: Sequence[Teacher],
    cache: TeacherCache | None,
    fabric: Fabric,
) -> Job:
    views = _views(config, splits, distiller.student, len(teachers))
    optim, fixed = config.optim, config.loader.fixed_views
    hidden, reads = config.method.masking.teachers_hidden, config.method.reads
    knn = KnnProbe(splits, config.student.image_size)

    def batches(first: int, last: int) -> DataLoader:
        span, share = (first, last), (fabric.global_rank, fabric.world_size)
        order = EpochBatches(len(views.images), optim.batch_size, config.run.seed, span, fixed_views=fixed, share=share)
        return training_batches(views, order, config.loader)

    def step(module: nn.Module, batch: Batch, progress: float) -> Step:
        shared, own = batch.views
        masks = hide_nothing_in_vain(config.method.masking(batch.noise, progress), teachers)

        def compute(m: int, samples: Tensor) -> Said:
            visible = masks.teachers[m]
            chosen = None if visible is None else visible[samples.to(visible.device)]
            return ask(teachers[m], m, shared[samples.to(shared.device)].float() / 255, chosen, hidden, reads)

        targets = (
            cache(batch, masks, compute)
            if cache
            else teacher_step(teachers, shared.float() / 255, masks, hidden, reads)
        )
        loss, metrics = module(own.float() / 255, targets)
        return Step(loss, lambda: _named_shares(metrics(), teachers))

    def probe(module: Distiller) -> Metrics:
        with as_written(config.compile):
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
    plain = {key: value for key, value in asdict(config).items() if key not in SAME_RESULT}
    plain["run"] = {key: plain["run"][key] for key in ("seed", "precision")}
    return plain


def _named_shares(metrics: dict[str, torch.Tensor], teachers: Sequence[Teacher]) -> dict[str, torch.Tensor]:
    names = {f"share_{m}": f"share_{teacher.name}" for m, teacher in enumerate(teachers)}
    return {names.get(key, key): value for key, value in metrics.items()}
