"""One distillation run: from a config to a scored and exported student."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from comad.data.begin import begin_run
from comad.data.loader import Batch
from comad.data.summary import Summary
from comad.distillation.agreement import held_out_agreement
from comad.distillation.cache import TeacherCache
from comad.distillation.config import DistillConfig
from comad.distillation.distiller import Distiller, calibrate
from comad.distillation.features import MAEDecoder, TeacherOutput, map_output
from comad.distillation.health import CollapseDetector
from comad.distillation.masking import Masks, drop_unused_masks
from comad.distillation.results import DistillResult, TrainedStudent, finish
from comad.distillation.samples import leave_facts
from comad.distillation.setup import Inputs, Setup, Student, prepare
from comad.evaluation.probe import KnnProbe
from comad.evaluation.scoreboard import rehearse
from comad.models.compiling import eager_mode
from comad.models.teachers import Teacher, licence_notice
from comad.runtime.atomic import check_name
from comad.runtime.lock import holding_runs
from comad.runtime.log import first_metrics
from comad.runtime.options import identity_of
from comad.runtime.processes import wait_for_all
from comad.runtime.progress import say
from comad.runtime.recipe import write_recipe
from comad.runtime.run import Metrics, RunConfig, check_free, first_for_all, start_fabric
from comad.runtime.trainer import Job, Trainer


@holding_runs()
def distill(config: DistillConfig, inputs: Inputs | None = None) -> DistillResult | None:
    """Distil the teachers into a student, score it beside them, and export it to ``student`` in the run's folder.

    Several students share images, views and teacher passes; each is trained, scored and exported as it would be
    alone, in a folder of its own below the run's. Of several processes all score and the first writes; the others
    return None.

    Raises:
        ValueError: bad data, teachers or recipe, a run folder in use, or a resume that does not fit.
        Interrupted: a signal came; a checkpoint is written.
        TrainingError: the loss is not finite, or the run collapsed and was told to stop.
    """
    check_free(config.run)
    check_name(config.cache_folder, "--cache-folder")
    asked = config
    if config.through:
        config, inputs = distill_proxy(config, inputs)
    fabric = start_fabric(config.run, config.optim)
    setup = prepare(config, fabric, inputs)
    config, teachers = setup.config, setup.teachers
    if config.split != "none":
        rehearse(setup.splits._replace(test=getattr(setup.splits, config.split)))
    cards = [teacher.card.summary() for teacher in teachers]
    settings = f"{config.preset} by {config.settings}: {config.optim.summary}"

    def about(resumed: bool) -> str:
        going_on = replace(setup, config=replace(config, run=replace(config.run, resume=resumed)))
        lines = (announcement(going_on), *cards, licence_notice(teachers), settings, of_passes(config))
        return "\n".join(filter(None, lines))

    recipe = replace(config, through=asked.through, teachers=asked.teachers)
    recipe, runs, summary = begin_run(recipe, fabric, setup.splits, config.student_folders, about)
    config = replace(config, run=recipe.run)
    cache = open_cache(setup) if config.cache_teachers else None  # a small disk is told now
    calibrate_students(setup, [number for number, run in enumerate(runs) if not run.resume], cache)
    if fabric.is_global_zero:
        _record_students(recipe, runs, summary)
    if config.compile:
        setup.compile()
    with Trainer(make_jobs(setup, runs), setup.data, config.optim, fabric) as trainer:
        train_students(trainer, setup, cache)
    if cache and not config.cache_folder:
        fabric.barrier()
        shutil.rmtree(config.cache_in, ignore_errors=True)
    trained = [
        TrainedStudent(config.alone(number, run), student.start, state.scored)
        for number, (run, student, state) in enumerate(zip(runs, setup.students, trainer.states, strict=True))
    ]
    with eager_mode(config.compile):
        return finish(trained, setup.splits, setup.teachers_for_one(), fabric)


def announcement(setup: Setup) -> str:
    """The first line of a run: what will happen. The trainer says how long it takes, as soon as that is known."""
    config = setup.config
    sizes = [sum(x.numel() for x in student.start.parameters()) / 1e6 for student in setup.students]
    students = [f"{vit.name} ({size:.1f} M parameters)" for vit, size in zip(config.students, sizes, strict=True)]
    scores = "" if config.split == "none" else "scores, "
    return (
        f"{'going on to distil' if config.run.resume else 'distilling'} "
        f"{', '.join(teacher.name for teacher in setup.teachers)} into {', '.join(students)} by {config.preset}, "
        f"{config.optim.epochs:g} epochs of {len(setup.splits.train):,} images; then {scores}a page and the "
        f"student, in {config.run.out}."
    )


def distill_proxy(config: DistillConfig, inputs: Inputs | None) -> tuple[DistillConfig, Inputs | None]:
    """The first of two stages: the teachers into a proxy. Returns the second one, whose only teacher is the proxy.

    The proxy's run lies in ``OUT-proxy`` beside the student's. Begun, it goes on; done, it is found to be of the same
    teachers, images and options, and used again.

    Raises:
        ValueError: that folder holds the proxy of another setup, or the method cannot learn from one.
    """
    out = Path(f"{config.run.out}-proxy")
    proxy = replace(config.student, start=None, width=None, depth=None, heads=None).called(config.through)
    if isinstance(config.method.features, MAEDecoder):
        raise ValueError("a proxy has no MAE decoder, which this preset learns from; leave out --through.")
    if inputs is None or inputs.student is None:  # what the second stage would refuse is refused before the first
        with torch.random.fork_rng(devices=[]):
            student, teacher = (replace(vit, pretrained=False, start=None).build() for vit in (config.student, proxy))
            Distiller(student, [Teacher("proxy", teacher, cast(Any, None))], config.method)
    run = replace(config.run, out=str(out), resume="auto")
    distill(replace(config, through="", student=proxy, extra_students=(), split="none", run=run), inputs)
    wait_for_all()  # for the first to have written it
    splits = None if inputs is None else inputs.splits
    student = None if inputs is None else inputs.student
    teacher = f"proxy={out / 'student'}"
    return replace(config, through="", teachers=(teacher,)), Inputs(splits=splits, student=student)


def of_passes(config: DistillConfig) -> str:
    """What a step of several forward passes computes otherwise than one pass would, in words; nothing if nothing."""
    parts = [part.of_a_pass for part in config.method.parts if part.of_a_pass]
    if config.optim.passes == 1 or not parts:
        return ""
    return f"of {config.optim.pass_size} images, those of a pass, not of the whole step: {', '.join(parts)}"


def train_students(trainer: Trainer, setup: Setup, cache: TeacherCache | None) -> None:
    """The training loop: masks, teachers, then student, loss and backward of everyone."""
    masking, teachers = setup.config.method.masking, setup.teachers
    for step in trainer:
        for batch in step:
            whole = [view.float() / 255 for view in batch.views]
            views = [masking.blend(view, batch.noise) for view in whole]
            masks = drop_unused_masks(masking(batch.noise, step.progress), teachers)
            if cache:
                outputs = cached_outputs(cache, batch, masks, setup)
            else:
                outputs = teacher_outputs(whole if masking.blends_outputs else views, masks, setup)
            if masking.blends_outputs:
                outputs = [map_output(partial(masking.blend, noise=batch.noise), output) for output in outputs]
            for state in step.states:
                with step.microbatch(state):
                    loss, metrics = state.module(views[-1], outputs, masks)
                    state.backward(loss, metrics)


def open_cache(setup: Setup) -> TeacherCache:
    """The cache of the teachers' outputs; the first process looks whether there is room, before any takes it.

    Raises:
        ValueError: the disk is too small, or the folder cannot be written.
    """
    spec = setup.cache_spec()
    stores = spec.stores()
    first_for_all(lambda: spec.check_room(stores, say), setup.fabric)
    return spec.open(stores)


def teacher_outputs(views: Sequence[Tensor], masks: Masks, setup: Setup) -> list[TeacherOutput]:
    """The teachers' outputs for the views of a batch, with values in [0, 1]."""
    pairs, distiller = zip(setup.teachers, setup.teacher_views(views), strict=True), setup.students[0].distiller
    return [distiller.forward_teacher(teacher, m, view, masks) for m, (teacher, view) in enumerate(pairs)]


def cached_outputs(cache: TeacherCache, batch: Batch, masks: Masks, setup: Setup) -> list[TeacherOutput]:
    """The teachers' outputs from the cache; what is not known yet is computed and kept."""
    views, distiller = setup.teacher_views(batch.views), setup.students[0].distiller

    def compute(m: int, rows: Tensor) -> TeacherOutput:
        seen = masks._replace(teachers=tuple(None if part is None else part[rows] for part in masks.teachers))
        return distiller.forward_teacher(setup.teachers[m], m, views[m][rows].float() / 255, seen)

    return cache(batch, views, masks, compute)


def calibrate_students(
    setup: Setup, numbers: Sequence[int], cache: TeacherCache | None, limit: int | None = None
) -> None:
    """Calibrate these students on the training images, whose outputs for whole images the cache may know.

    Args:
        setup: the run.
        numbers: of the students.
        cache: of the teachers' outputs, if there is one.
        limit: takes fewer images than the method asks for.
    """
    if not numbers or not setup.config.method.num_calibration_images:
        return
    generator, whole = torch.Generator().manual_seed(setup.config.run.seed), Masks(None, (None,) * len(setup.teachers))
    known = cache if setup.example_masks().teachers == whole.teachers else None

    def outputs() -> Iterator[list[TeacherOutput]]:
        for asked in setup.calibration_views(generator, limit):
            batch = Batch(*map(setup.fabric.to_device, asked))
            views = [view.float() / 255 for view in batch.views]
            yield cached_outputs(known, batch, whole, setup) if known else teacher_outputs(views, whole, setup)

    calibrate([setup.students[number].distiller for number in numbers], outputs(), generator)


def make_jobs(setup: Setup, runs: Sequence[RunConfig]) -> list[Job]:
    """What the trainer needs to know of each student."""
    cards = {teacher.name: teacher.card.as_dict() for teacher in setup.teachers}
    data = setup.splits.train.fingerprint()
    return [
        Job(
            module=student.distiller,
            run=run,
            identity={**identity_of(setup.config.alone(number, run)), "teacher_cards": cards, "data": data},
            probe=Probe(setup, student),
            watch=CollapseDetector(first_metrics(Path(run.out)) if run.resume else None),
            rng=student.rng,
        )
        for number, (run, student) in enumerate(zip(runs, setup.students, strict=True))
    ]


class Probe:
    """Scores during the run: kNN of the student, and its agreement with the teachers, on validation images."""

    def __init__(self, setup: Setup, student: Student):
        self.setup, self.knn = setup, KnnProbe(setup.splits, student.start.image_size)

    def __call__(self, module: Distiller) -> Metrics:
        """Names → numbers."""
        with eager_mode(self.setup.config.compile):
            agreement = held_out_agreement(module, self.setup.teachers, self.setup.splits.val)
            return {**self.knn(module.student), **agreement}


def _record_students(recipe: DistillConfig, runs: Sequence[RunConfig], summary: Summary) -> None:
    """Write what is known of each student before the run; of several each one's recipe, too."""
    for number, run in enumerate(runs):
        own = recipe.alone(number, run)
        if recipe.extra_students and not run.resume:
            write_recipe(own, Path(run.out) / "config.yaml")
        leave_facts(own, summary.words, Path(run.out))
