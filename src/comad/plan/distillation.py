"""The plan of a distillation: live and cached steps, calibration, probes and the scoreboard, each measured in part."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from comad.data.images import Splits
from comad.distill.calibration import HELD_OUT_IMAGES, calibrate, held_out_agreement
from comad.distill.config import DistillConfig
from comad.distill.parts import Parts, prepare
from comad.distill.run import make_jobs, what_to_cache
from comad.distill.teacher_cache import TeacherCache, check_room, closed_stores
from comad.evaluate.features import Features, FeatureSplits, extract_features, labelled_indices, pixel_features
from comad.evaluate.knn import KNN
from comad.evaluate.linear import LinearProbe
from comad.evaluate.probe import KnnProbe
from comad.evaluate.scoreboard import LABEL_SETS, shortage
from comad.models.backbone import Backbone
from comad.plan.assemble import Phases, Planned, assemble, engine, share_of, stage
from comad.plan.forecast import Plan
from comad.plan.measure import Measured, measure, steps_within_budget
from comad.plan.profile import StepProfile, now, profile_steps, resized, seconds_of, seconds_per_image

CALIBRATED = (64, 128)
"""Images of two calibrations that are timed."""
SCORED = (8192, 256)
"""Most images that the classifiers of the scoreboard are fitted and tried on, random ones; the rest in proportion."""


def plan_distillation(config: DistillConfig) -> Plan:
    """Set a run up as `distill` does, take a few steps of each kind, and add up what is to come. Nothing is left.

    Raises:
        ValueError: several students, bad data, teachers or recipe, or a disk too small for the teacher cache.
    """
    if config.beside:
        raise ValueError("a plan is of one student; name one --student. A second costs its own part of a step alone.")
    start, devices = now(), config.run.devices
    config, fabric = engine(config)
    parts = prepare(config, fabric)
    loading = now() - start
    unknown, cache_bytes = _what_the_cache_lacks(parts, fabric)
    calibration = _calibration_seconds(parts)
    probing: list[float] = []
    optim, (job,) = share_of(config.optim, devices), make_jobs(parts, [config.run], None, fabric)
    measured = measure(
        job,
        replace(config, optim=optim),
        fabric,
        [teacher.backbone for teacher in parts.teachers],
        lambda module: probing.append(_probe_seconds(parts, module)),
        brief=config.cache_teachers,
    )
    steps = config.optim.total_steps(job.steps_per_epoch)
    stages = {"live": stage(float(steps), measured.steps, optim, measured.flops)}
    if config.cache_teachers:
        live, cached = _with_cache(parts, measured, fabric)
        filling = unknown * min(steps, config.loader.fixed_views * job.steps_per_epoch)
        stages = {
            "live": stage(filling, live, optim, measured.flops),
            "cached": stage(steps - filling, cached, optim, measured.flops._replace(teachers=0.0)),
        }
    scoring = _scoring_seconds(parts) if config.split != "none" else 0.0
    student = parts.students[0].distiller.student
    export = sum(part.numel() * 4 for part in student.state_dict().values())
    planned = Planned("comad distill", config, devices, cache_bytes, export)
    return assemble(planned, fabric, measured, stages, Phases(loading, calibration, probing[0], scoring))


def _what_the_cache_lacks(parts: Parts, fabric: Fabric) -> tuple[float, int]:
    """Share of the teachers' answers that nobody kept yet, and bytes of all of them; the disk must have room."""
    config = parts.config
    if not config.cache_teachers:
        return 1.0, 0
    keys, shape, example = what_to_cache(config, parts.views, parts.teachers, fabric)
    stores = closed_stores(config.cache_in, keys, shape, example, config.cache_storage)
    known = check_room(config.cache_in, [name for name, _ in keys], stores, lambda text: None)
    return 1 - sum(known) / (len(known) * shape[0] * shape[1]), sum(store.num_bytes for store in stores)


def _with_cache(parts: Parts, measured: Measured, fabric: Fabric) -> tuple[StepProfile, StepProfile]:
    """Steps that fill an empty cache, and the same steps from it; it lies in a temporary folder."""
    config, size = parts.config, measured.steps.batch
    keys, shape, example = what_to_cache(config, parts.views, parts.teachers, fabric)
    count = steps_within_budget(measured.steps.seconds)
    optim = replace(config.optim, batch_size=size)
    with tempfile.TemporaryDirectory(prefix="comad-plan-") as folder:
        stores = closed_stores(Path(folder), keys, shape, example, config.cache_storage)
        cache = TeacherCache([store.open() for store in stores], shape[0])
        job = resized(make_jobs(parts, [config.run], cache, fabric)[0], size)
        live, cached = (profile_steps(job, optim, config.run, fabric, count) for _ in range(2))
    return live, cached


def _calibration_seconds(parts: Parts) -> float:
    """Calibrate on a few images, and say how long all will take: a straight line through two times."""
    config, views, distiller = parts.config, parts.views, parts.students[0].distiller
    total = min(distiller.method.calibration_images, len(views.images))
    took = []
    for count in CALIBRATED:
        start = now()
        calibrate([distiller], parts.teachers, views, config.run.seed, count)
        took.append(now() - start)
    few, more = CALIBRATED
    if total <= more:
        return took[1] * min(1.0, total / more)
    return took[1] + (total - more) * max(0.0, took[1] - took[0]) / (more - few)


def _probe_seconds(parts: Parts, module: Any) -> float:
    """Of one probe: kNN of the student, and its agreement with the teachers."""
    splits, size, teachers = parts.splits, parts.config.student.image_size, parts.teachers
    whole, part = KnnProbe(splits, size), KnnProbe(splits, size, limit=64)
    counts = [len(knn.bank) + len(knn.queries) for knn in (whole, part)]
    seconds = seconds_of(lambda: part(module.student)) * counts[0] / max(1, counts[1])
    held_out = min(HELD_OUT_IMAGES, len(splits.val))
    if not held_out:
        return seconds
    return seconds + held_out * seconds_per_image(
        lambda count: held_out_agreement(module, teachers, splits.val, count), held_out
    )


def _scoring_seconds(parts: Parts) -> float:
    """Of the scoreboard at the end: features of all labelled images for each row, and the classifiers on them."""
    config, splits = parts.config, parts.splits
    if shortage(splits, "fine"):
        return 0.0
    splits = splits._replace(test=getattr(splits, config.split))
    dtype = torch.bfloat16 if config.run.precision == "bf16" else None
    count = sum(len(labelled_indices(images)) for images in splits[:3])
    student = parts.students[0].distiller.student
    own = [student] * (3 if config.student.pretrained else 2)
    sizes: dict[tuple[int, int], float] = {}
    total = 0.0
    for backbone in (None, *(teacher.backbone for teacher in parts.teachers), *own):
        pools, width = _pools(backbone)
        if (pools, width) not in sizes:
            sizes[pools, width] = _classifier_seconds(splits, pools, width)
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
        side = backbone.grid[0] * backbone.patch_size
        return extract_features(backbone, splits.train, side, dtype, indices=indices[:count])

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
    probe, whole = LinearProbe(epochs=1), LinearProbe()
    linear = seconds_of(lambda: probe(features)) * whole.epochs / probe.epochs / shares[0]
    return linear + seconds_of(lambda: KNN()(features)) / shares[0] / min(shares[1:])
