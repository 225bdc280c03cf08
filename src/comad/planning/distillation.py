"""The plan of a distillation: live and cached steps, calibration, probes and the scoreboard, each measured in part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from comad.data.images import Splits
from comad.distillation.agreement import HELD_OUT_IMAGES, held_out_agreement
from comad.distillation.cache import TeacherCache
from comad.distillation.config import DistillConfig
from comad.distillation.run import calibrate_students, make_jobs, train_students
from comad.distillation.setup import Inputs, Setup, prepare
from comad.evaluation.features import Features, FeatureSplits, extract_features, labelled_indices, pixel_features
from comad.evaluation.knn import KNN
from comad.evaluation.linear import LinearProbe
from comad.evaluation.probe import KnnProbe
from comad.evaluation.scoreboard import LABEL_SETS, shortage
from comad.models.backbone import Backbone
from comad.models.compiling import eager_mode
from comad.planning.advice import advise
from comad.planning.forecast import Plan, budget_seconds, largest_fit
from comad.planning.measure import Measured, Phases, assemble, engine, measure, share_of, steps_within_budget
from comad.planning.profile import StepProfile, Training, now, profile_steps, seconds_of, seconds_per_image
from comad.runtime.optim import OptimConfig
from comad.runtime.progress import say

CALIBRATED = (64, 128)
"""Images of two calibrations that are timed."""
SCORED = (8192, 256)
"""Most images that the classifiers of the scoreboard are fitted and tried on, random ones; the rest in proportion."""


def plan_distillation(config: DistillConfig) -> Plan:
    """What a run will cost, of as many epochs as its recipe or its budget says. Raises ValueError as
    `measure_distillation` does, or for a budget that is too short.
    """
    seconds = budget_seconds(config.budget) if config.budget else 0.0
    forecast = measure_distillation(replace(config, budget=""))
    plan = forecast(largest_fit(config.optim, forecast, seconds) if seconds else config.optim)
    return replace(plan, advice=advise(config, forecast, plan))


def measure_distillation(
    config: DistillConfig, inputs: Inputs | None = None, training_only: bool = False
) -> Callable[[OptimConfig], Plan]:
    """Set a run up as `distill` does and take a few steps of each kind. Nothing is left.

    Args:
        config: of the run.
        inputs: see `distill`.
        training_only: leave out what is around the training: loading, calibration, probes, scores.

    Returns:
        A function that adds up what is to come, for other numbers of epochs too.

    Raises:
        ValueError: several students, bad data, teachers or recipe, or a disk too small for the teacher cache.
    """
    if config.extra_students:
        raise ValueError("a plan is of one student; name one --student. A second costs its own part of a step alone.")
    start = now()
    alone, fabric = engine(config)
    say("planning: the run is set up and takes some steps of each kind, about a minute.")
    setup = prepare(alone, fabric, inputs)
    loading = now() - start
    unknown, cache_bytes = _missing_from_cache(setup)
    calibration = _calibration_seconds(setup)
    if config.compile:
        setup.compile()
    (job,), probing = make_jobs(setup, [alone.run]), []
    loop = partial(train_students, setup=setup, cache=None)
    measured = measure(
        Training(job, setup.data, share_of(config), fabric, loop),
        [teacher.backbone for teacher in setup.teachers],
        None if training_only else lambda module: probing.append(_probe_seconds(setup, module)),
        brief=config.cache_teachers,
    )
    live, cached = _with_cache(setup, measured) if config.cache_teachers else (measured.steps, None)
    ends = not training_only and config.split != "none" and not shortage(setup.splits, "fine")
    scoring, scored = (_scoring_seconds(setup), _num_scored(setup)) if ends else (0.0, 0)
    phases = Phases(0.0, 0.0, 0.0, 0.0, 0)
    if not training_only:
        phases = Phases(loading, calibration, probing[0], scoring, scored)
    export = sum(part.numel() * 4 for part in setup.students[0].distiller.student.state_dict().values())

    def forecast(optim: OptimConfig) -> Plan:
        steps_per_epoch = optim.steps_per_epoch(len(setup.splits.train))
        steps = optim.total_steps(steps_per_epoch)
        stages = {"live": measured.stage(steps)}
        if cached is not None:
            filling = unknown * min(steps, config.loader.fixed_views * steps_per_epoch)
            stages = {
                "live": measured.stage(filling, live),
                "cached": measured.stage(steps - filling, cached, cached=True),
            }
        planned = replace(config, optim=optim)
        return assemble("comad distill", planned, measured, stages, phases, cache=cache_bytes, export=export)

    return forecast


def _missing_from_cache(setup: Setup) -> tuple[float, int]:
    """Share of the teachers' outputs that nobody kept yet, and bytes of all of them; the disk must have room."""
    if not setup.config.cache_teachers:
        return 1.0, 0
    spec = setup.cache_spec()
    stores = spec.stores()
    known = spec.check_room(stores)
    return 1 - sum(known) / sum(store.num_rows for store in stores), sum(store.num_bytes for store in stores)


def _with_cache(setup: Setup, measured: Measured) -> tuple[StepProfile, StepProfile]:
    """Steps that fill an empty cache, and the same steps from it; it lies in a temporary folder."""
    spec, num_steps = setup.cache_spec(), steps_within_budget(measured.steps.seconds)
    with tempfile.TemporaryDirectory(prefix="comad-plan-") as folder:
        cache = TeacherCache([store.open() for store in spec.stores(Path(folder))], spec.num_images)
        training = replace(measured.training, loop=partial(train_students, setup=setup, cache=cache))
        live, cached = (profile_steps(training, measured.steps.batch, num_steps) for _ in range(2))
    return live, cached


def _calibration_seconds(setup: Setup) -> float:
    """Calibrate on a few images, and say how long all will take: a straight line through two times."""
    total = min(setup.config.method.num_calibration_images, len(setup.splits.train))
    took = []
    for count in CALIBRATED:
        start = now()
        calibrate_students(setup, [0], None, count)
        took.append(now() - start)
    few, more = CALIBRATED
    if total <= more:
        return took[1] * min(1.0, total / more)
    return took[1] + (total - more) * max(0.0, took[1] - took[0]) / (more - few)


def _probe_seconds(setup: Setup, module: Any) -> float:
    """Of one probe: kNN of the student, and its agreement with the teachers."""
    splits, size, teachers = setup.splits, setup.config.student.image_size, setup.teachers
    whole, part = KnnProbe(splits, size), KnnProbe(splits, size, limit=64)
    counts = [len(knn.bank) + len(knn.queries) for knn in (whole, part)]
    held_out = min(HELD_OUT_IMAGES, len(splits.val))

    def agree(count: int) -> object:
        return held_out_agreement(module, teachers, splits.val, count)

    with eager_mode(setup.config.compile):
        seconds = seconds_of(lambda: part(module.student)) * counts[0] / max(1, counts[1])
        return seconds + (held_out * seconds_per_image(agree, held_out) if held_out else 0.0)


def _num_scored(setup: Setup) -> int:
    """Labelled images that every network is scored on."""
    test = getattr(setup.splits, setup.config.split)
    return sum(len(labelled_indices(images)) for images in (setup.splits.train, setup.splits.val, test))


def _scoring_seconds(setup: Setup) -> float:
    """Of the scoreboard at the end: features of all labelled images for each row, and the classifiers on them."""
    config = setup.config
    splits = setup.splits._replace(test=getattr(setup.splits, config.split))
    dtype = config.run.autocast
    count = _num_scored(setup)
    student = setup.students[0].distiller.student
    own = [student] * (2 if config.student == config.student.from_scratch else 3)
    sizes: dict[tuple[int, int], float] = {}
    total = 0.0
    for backbone in (None, *(teacher.backbone for teacher in setup.teachers), *own):
        pools, width = _pools(backbone)
        if (pools, width) not in sizes:
            sizes[pools, width] = _classifier_seconds(splits, pools, width)
        with eager_mode(config.compile):
            total += sizes[pools, width] + count * _extraction_seconds(backbone, splits, dtype)
    return total


def _pools(backbone: Backbone | None) -> tuple[int, int]:
    """How many pools of features a network has, and their width."""
    return (1, 3 * 16 * 16) if backbone is None else (1 + ("cls" in backbone.token_types), backbone.width)


def _extraction_seconds(backbone: Backbone | None, splits: Splits, dtype: torch.dtype | None) -> float:
    """Of one image."""
    indices = labelled_indices(splits.train)

    def extract(count: int) -> object:
        if backbone is None:
            return pixel_features(splits.train, indices=indices[:count])
        return extract_features(backbone, splits.train, backbone.image_size, dtype, indices=indices[:count])

    return seconds_per_image(extract, len(indices))


def _classifier_seconds(splits: Splits, pools: int, width: int) -> float:
    """Of kNN and the linear probe on features of this size."""
    generator = torch.Generator().manual_seed(0)
    sets = [name for name in LABEL_SETS if shortage(splits, name) is None]
    listed = [labelled_indices(images) for images in splits[:3]]
    chosen = [indices[:most] for indices, most in zip(listed, (SCORED[0], SCORED[1], SCORED[1]), strict=True)]
    shares = [len(some) / len(whole) for some, whole in zip(chosen, listed, strict=True)]
    parts: list[Features] = []
    for images, indices in zip(splits[:3], chosen, strict=True):
        noise = torch.randn(len(indices), width, generator=generator)
        labels = {name: images.labels[name][indices] for name in sets}
        parts.append(Features({str(m): noise for m in range(pools)}, labels, images.groups[indices]))
    features = FeatureSplits(*parts)
    if any((images.labels[name] < 0).all() for images in parts for name in sets):
        return 0.0
    whole, few = LinearProbe(), 8
    steps = whole.num_steps(len(listed[0]))
    if steps > whole.direct_steps:  # of all pools and settings, then of one pool and some settings
        steps = whole.trial_steps + steps * whole.kept / len(whole.settings) / pools
    linear = seconds_of(lambda: LinearProbe(max_steps=few)(features)) * steps / few
    compared = min(len(listed[1]), KNN().chosen_on) / len(chosen[1]), len(listed[2]) / len(chosen[2])
    return linear + seconds_of(lambda: KNN()(features)) / shares[0] * max(compared)
