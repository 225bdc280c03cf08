"""One distillation run: from a config to a scored and exported student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from comad.data.images import Splits
from comad.data.loader import Batch, EpochBatches, ViewDataset, training_batches
from comad.distill.calibration import calibrate, held_out_agreement
from comad.distill.config import DistillConfig
from comad.distill.distiller import Distiller
from comad.distill.finish import Result, Trained, finish
from comad.distill.health import Watch
from comad.distill.parts import Parts, Student, prepare
from comad.distill.speed import compile_step
from comad.distill.teacher_cache import TeacherCache, key_of, open_cache
from comad.distill.teaching import Said, Targets, ask, hide_nothing_in_vain, teacher_step
from comad.evaluate.probe import KnnProbe
from comad.models.compiling import eager_mode
from comad.models.teachers import Teacher, licence_notice
from comad.runtime.job import identity_of
from comad.runtime.log import first_metrics
from comad.runtime.recipe import write_recipe
from comad.runtime.train import Job, Metrics, RunConfig, Step, open_runs, start_fabric, train_together

SAME_RESULT = ("teachers_in", "cache_folder", "split", "beside")
"""Options that may change when a run goes on."""


def distill(config: DistillConfig) -> Result | None:
    """Distil the teachers into a student, score it beside them, and export it to ``student`` in the run's folder.

    Several students share pictures, views and teacher passes; each is trained, scored and exported as it would be
    alone, in a folder of its own below the run's. Of several processes the first does what comes after training; the
    others return None.

    Raises:
        ValueError: bad data, teachers or recipe, a run folder in use, or a resume that does not fit.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite, or the run collapsed and was told to stop.
    """
    fabric = start_fabric(config.run)
    parts = prepare(config, fabric)
    config, splits, teachers, students = parts
    runs = open_runs(config.run, config.student_folders, fabric)
    for line in filter(None, (*(teacher.card.summary() for teacher in teachers), licence_notice(teachers))):
        fabric.print(line)
    views = parts.views
    cache = _open_cache(config, views, teachers, fabric)  # a disk that is too small is told before any work
    begins = [student.distiller for student, run in zip(students, runs, strict=True) if not run.resume]
    calibrate(begins, teachers, views, config.run.seed)
    configs = _alone(config, runs)
    if fabric.is_global_zero:
        _write_recipes(config, configs)
    trained = train_together(make_jobs(parts, runs, cache, fabric), config.optim, runs, fabric)
    if cache and not config.cache_folder:
        fabric.barrier()
        shutil.rmtree(config.cache_in, ignore_errors=True)
    if not fabric.is_global_zero:
        return None
    ends = [Trained(own, part.start, end) for own, part, end in zip(configs, students, trained, strict=True)]
    with eager_mode(config.compile):
        return finish(ends, splits, teachers, fabric)


def _alone(config: DistillConfig, runs: Sequence[RunConfig]) -> list[DistillConfig]:
    """The config that each student would have alone."""
    pairs = zip(config.students, runs, strict=True)
    return [replace(config, student=vit, beside=(), run=run) for vit, run in pairs]


def _write_recipes(config: DistillConfig, parts: Sequence[DistillConfig]) -> None:
    """The recipe of the run, and of several students each one's own."""
    for part in (config, *parts):
        if not part.run.resume:
            write_recipe(part, Path(part.run.out) / "config.yaml")


def _open_cache(
    config: DistillConfig, views: ViewDataset, teachers: Sequence[Teacher], fabric: Fabric
) -> TeacherCache | None:
    """The cache of what the teachers say of every view, if the run is to have one."""
    if not config.cache_teachers:
        return None
    keys, shape, example = what_to_cache(config, views, teachers, fabric)
    return open_cache(config.cache_in, keys, shape, example, config.cache_storage, fabric.print)


def what_to_cache(
    config: DistillConfig, views: ViewDataset, teachers: Sequence[Teacher], fabric: Fabric
) -> tuple[list[tuple[str, dict[str, Any]]], tuple[int, int], Callable[[int], Said]]:
    """Keys of all teachers, numbers of images and views, and what a teacher says of one sample; see `open_cache`."""
    method = config.method

    def example(m: int) -> Said:
        sample = views[0, 0]
        masks = hide_nothing_in_vain(method.masking(sample.noise.unsqueeze(0).to(fabric.device)), teachers)
        view = sample.views[0].unsqueeze(0).to(fabric.device).float() / 255
        return ask(teachers[m], m, view, masks.teachers[m], method.masking.teachers_hidden, method.reads)

    keys = [(teacher.name, key_of(teacher, m, views, method)) for m, teacher in enumerate(teachers)]
    return keys, (len(views.images), config.loader.fixed_views), example


def make_jobs(parts: Parts, runs: Sequence[RunConfig], cache: TeacherCache | None, fabric: Fabric) -> list[Job]:
    """The jobs of the loop, one per student: batches, the step, the probe, and what a resumed run must share."""
    shared = _shared(parts.config, parts.views, parts.teachers, cache, fabric)
    if parts.config.compile:
        for student in parts.students:
            compile_step(student.distiller, parts.teachers)
    configs = _alone(parts.config, runs)
    return [
        _job(config, student, shared, parts.splits, parts.teachers)
        for config, student in zip(configs, parts.students, strict=True)
    ]


def _shared(
    config: DistillConfig, views: ViewDataset, teachers: Sequence[Teacher], cache: TeacherCache | None, fabric: Fabric
) -> dict[str, Any]:
    """What the jobs of all students have in common: batches, and what the teachers say of them."""
    optim, fixed = config.optim, config.loader.fixed_views
    masking, reads = config.method.masking, config.method.reads
    hidden = masking.teachers_hidden

    def batches(first: int, last: int) -> DataLoader:
        span, share = (first, last), (fabric.global_rank, fabric.world_size)
        order = EpochBatches(len(views.images), optim.batch_size, config.run.seed, span, fixed_views=fixed, share=share)
        return training_batches(views, order, config.loader)

    def prepare(batch: Batch, progress: float) -> tuple[Tensor, Targets]:
        shared, own = batch.views
        masks = hide_nothing_in_vain(masking(batch.noise, progress), teachers)

        def compute(m: int, samples: Tensor) -> Said:
            visible = masks.teachers[m]
            chosen = None if visible is None else visible[samples.to(visible.device)]
            return ask(teachers[m], m, shared[samples.to(shared.device)].float() / 255, chosen, hidden, reads)

        targets = (
            cache(batch, masks, compute)
            if cache
            else teacher_step(teachers, masking.blend(shared.float() / 255, batch.noise), masks, hidden, reads)
        )
        return masking.blend(own.float() / 255, batch.noise), targets

    return {
        "batches": batches,
        "prepare": prepare,
        "steps_per_epoch": optim.steps_per_epoch(len(views.images)),
        "name_image": views.images.path,
    }


def _job(
    config: DistillConfig, student: Student, shared: dict[str, Any], splits: Splits, teachers: Sequence[Teacher]
) -> Job:
    """The job of one student, whose config is that of a run of its own."""
    knn = KnnProbe(splits, config.student.image_size)

    def step(module: nn.Module, batch: tuple[Tensor, Targets], progress: float) -> Step:
        loss, metrics = module(*batch)
        return Step(loss, lambda: _named_shares(metrics(), teachers))

    def probe(module: Distiller) -> Metrics:
        with eager_mode(config.compile):
            return {**knn(module.student), **held_out_agreement(module, teachers, splits.val)}

    return Job(
        **shared,
        module=student.distiller,
        step=step,
        identity={**identity_of(config, *SAME_RESULT), "teacher_cards": {t.name: t.card.as_dict() for t in teachers}},
        probe=probe,
        watch=Watch(first_metrics(Path(config.run.out)) if config.run.resume else None),
        random=student.random,
    )


def _named_shares(metrics: dict[str, torch.Tensor], teachers: Sequence[Teacher]) -> dict[str, torch.Tensor]:
    names = {f"share_{m}": f"share_{teacher.name}" for m, teacher in enumerate(teachers)}
    return {names.get(key, key): value for key, value in metrics.items()}
