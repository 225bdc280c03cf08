"""What a run is made of: images, teachers and students, loaded and checked before anything is written."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

from lightning_fabric import Fabric

from comad.data.images import Splits, load_images
from comad.data.loader import ViewDataset
from comad.data.transforms import ColourChange, Crop
from comad.distill.config import DistillConfig
from comad.distill.distiller import Distiller
from comad.distill.matching import give_decoders, match, widths_and_cls
from comad.distill.speed import quantize_teachers
from comad.distill.teaching import load_teachers
from comad.distill.views import DistillViews
from comad.models.compiling import need_compiler
from comad.models.onednn_linear import use_onednn_linear
from comad.models.quantized import check_quantized
from comad.models.teachers import Teacher
from comad.models.timm_backbone import TimmBackbone, math_attention_on_cpu
from comad.runtime.checkpoint import Generators


class Student(NamedTuple):
    """A student of a run.

    Attributes:
        start: the network before it learns.
        distiller: what is to be trained, on the device.
        random: generators of its own, as it would have alone.
    """

    start: TimmBackbone
    distiller: Distiller
    random: Generators


class Parts(NamedTuple):
    """All parts of a run.

    Attributes:
        config: with the students' options as the method wants them.
        splits: the images.
        teachers: frozen, on the device.
        students: in the order of ``config.students``.
    """

    config: DistillConfig
    splits: Splits
    teachers: list[Teacher]
    students: list[Student]

    @property
    def views(self) -> ViewDataset:
        """The training images as views for teachers and students."""
        config, size, jitter = self.config, self.config.student.image_size, self.config.augment.jitter
        colour = ColourChange(strength=jitter, hue=jitter / 4) if jitter else None
        crop = Crop(size=size, scale=config.augment.crop_scale)
        make = DistillViews(crop, colour, 1 + len(self.teachers), self.students[0].start.num_patches)
        return ViewDataset(self.splits.train, make, config.run.seed, 2 * size)


def prepare(config: DistillConfig, fabric: Fabric) -> Parts:
    """Load and check everything that a run needs; nothing is written.

    Raises:
        ValueError: bad data, teachers or recipe, or an option that this machine cannot follow.
    """
    splits = load_images(config.data)
    check(config, splits)
    built = _build(config, fabric)
    networks = [network for network, _ in built]
    teachers = _load_teachers(config, networks[0], fabric)
    vits = [match(config.method, vit, own, teachers) for vit, own in zip(config.students, networks, strict=True)]
    students = []
    for network, random in built:
        start = copy.deepcopy(network)
        with random.turn():
            distiller = Distiller(network, config.method, *widths_and_cls(config.method, teachers))
        distiller.to(fabric.device)
        math_attention_on_cpu(distiller, fabric.device)
        students.append(Student(start, distiller, random))
    parts = Parts(replace(config, student=vits[0], beside=tuple(vits[1:])), splits, teachers, students)
    for line in quantize_teachers(teachers, config.quantized, parts.views, fabric.device):
        fabric.print(line)
    if not config.compile and config.offload_to is None:
        for teacher in teachers:
            use_onednn_linear(teacher.backbone)
    return parts


def check(config: DistillConfig, splits: Splits) -> None:
    """Say what is wrong before anything is loaded.

    Raises:
        ValueError: options that contradict each other or this machine, or too few images for a batch.
    """
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
    if config.cache_teachers and not config.method.masking.repeats:
        raise ValueError(
            "--cache-teachers needs pictures and masks that repeat; add --no-cache-teachers, or leave out "
            f"--method.masking.{'mixup' if config.method.masking.mixup else 'student-end'}."
        )


def _build(config: DistillConfig, fabric: Fabric) -> list[tuple[TimmBackbone, Generators]]:
    """The students as they are before the run, each with generators that begin with the seed."""
    built = []
    for vit in config.students:
        fabric.seed_everything(config.run.seed, verbose=False)
        random = Generators()
        with random.turn():
            built.append((vit.build(), random))
    pairs = zip(config.students, built, strict=True)
    seen = [f"{vit.image_size} px in patches of {network.patch_size}" for vit, (network, _) in pairs]
    for vit, other in zip(config.students, seen, strict=True):
        if other != seen[0]:
            raise ValueError(
                f"students share their views, but {config.student.name} sees {seen[0]}, {vit.name} sees {other}; give "
                "--student.image-size and --student.patch-size, which hold for every --student NAME."
            )
    return built


def _load_teachers(config: DistillConfig, student: TimmBackbone, fabric: Fabric) -> list[Teacher]:
    """Teachers on the students' grid, with their decoders where the method learns from them."""
    if config.quantized:
        check_quantized(config.quantized, fabric.device, config.compile)
    grid, dtype = (student.grid[0], student.patch_size), config.teacher_dtype
    teachers = load_teachers(config.teachers, *grid, dtype, fabric.device, config.offload_to)
    if config.method.tap.decoder:
        give_decoders(config.teachers, teachers, dtype, fabric.device)
    return teachers
