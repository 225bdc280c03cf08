"""What a run is made of: images, teachers and students, loaded and checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from comad.data.identity import content_digest
from comad.data.images import Splits
from comad.data.loader import Batch, Sample, TrainingBatches, ViewDataset
from comad.data.transforms import ColourChange, Crop
from comad.distillation.cache import CacheSpec
from comad.distillation.config import DistillConfig
from comad.distillation.distiller import Distiller
from comad.distillation.features import Blocks, TeacherOutput, forward_teacher
from comad.distillation.masking import HidingPatches, Masks, drop_unused_masks
from comad.distillation.method import load_decoders
from comad.models.backbone import Backbone
from comad.models.compiling import compile_blocks, need_compiler
from comad.models.offload import offload, shard
from comad.models.onednn_linear import use_onednn_linear
from comad.models.quantized import check_quantized, precision_of, quantize
from comad.models.students import to_be_trained
from comad.models.teachers import Teacher, load_on_grid
from comad.models.timm_backbone import TimmBackbone, math_attention_on_cpu
from comad.runtime.checkpoint import RngState
from comad.runtime.options import identity_of
from comad.runtime.progress import say, track

SHORT = 256
"""Patches up to which a frozen network in bf16 is faster on a CPU without AMX with attention by matrix products."""
NEAR = 0.999
"""Mean cosine to the tokens before, under which 8 bits are warned of."""
NOT_OF_THE_OUTPUT = ("name", "source", "about", "licence")
"""Facts on a teacher's card that its outputs do not depend on."""


@dataclass(frozen=True)
class Inputs:
    """Objects in the place of names: what Python hands to a run. None: what the config names.

    Attributes:
        splits: the images.
        teachers: each as a name, or loaded.
        student: a network to train, in the place of ``config.student``.
    """

    splits: Splits | None = None
    teachers: Sequence[Any] | None = None
    student: nn.Module | None = None


class Student(NamedTuple):
    """A student of a run.

    Attributes:
        start: the network before it learns.
        distiller: what is to be trained, on the device.
        rng: generators of its own, as it would have alone.
    """

    start: Backbone
    distiller: Distiller
    rng: RngState


@dataclass(frozen=True)
class DistillViews:
    """One crop and flip for all, colours changed for the student alone, noise to draw the masks from.

    Attributes:
        crop: the shared crop, at the student's size.
        sizes: of the teachers' views, each once.
        colour: the student's change of colours; None changes nothing.
        noise_shape: one row for the student and one per teacher; N.
    """

    crop: Crop
    sizes: tuple[int, ...]
    colour: ColourChange | None
    noise_shape: tuple[int, int]

    def __call__(self, image: Tensor) -> Sample:
        """uint8 image → (teachers' view of each size, ..., student's view) and uniform noise (1 + M, N)."""
        *teachers, student = self.crop.at_sizes(image, (*self.sizes, self.crop.size))
        student = self.colour(student) if self.colour else student
        return Sample((*teachers, student), torch.rand(*self.noise_shape))


@dataclass(frozen=True)
class Setup:
    """All parts of a run.

    Attributes:
        config: with the students' options as the method wants them.
        splits: the images.
        teachers: frozen, on the device.
        students: in the order of ``config.students``.
        fabric: the engine.
    """

    config: DistillConfig
    splits: Splits
    teachers: list[Teacher]
    students: list[Student]
    fabric: Fabric

    @property
    def views(self) -> ViewDataset:
        """The training images as views for teachers and students."""
        config, size, jitter = self.config, self.config.student.image_size, self.config.augment.jitter
        colour = ColourChange(strength=jitter, hue=jitter / 4) if jitter else None
        crop, sizes = Crop(size=size, scale=config.augment.crop_scale), self.teacher_sizes
        make = DistillViews(crop, sizes, colour, (1 + len(self.teachers), self.students[0].start.num_patches))
        seed = 0 if config.loader.fixed_views else config.run.seed  # of all seeds, which then share one cache
        return ViewDataset(self.splits.train, make, seed, 2 * max(size, *sizes))

    @property
    def teacher_sizes(self) -> tuple[int, ...]:
        """Pixels on the sides of the teachers' views, each once."""
        return tuple(dict.fromkeys(teacher.backbone.image_size for teacher in self.teachers))

    def teacher_views(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Of the views of a batch, that of each teacher."""
        by_size = dict(zip(self.teacher_sizes, views, strict=False))
        return [by_size[teacher.backbone.image_size] for teacher in self.teachers]

    @property
    def data(self) -> TrainingBatches:
        """All batches of the run."""
        config, images = self.config, self.splits.train
        return TrainingBatches(
            self.views, len(images), images.path, config.optim.pass_size, config.run.seed, config.loader
        )

    def calibration_views(self, generator: torch.Generator, limit: int | None = None) -> Iterator[Batch]:
        """The first views of random training images, in batches; as many as the method asks for."""
        views = self.views
        count = min(self.config.method.num_calibration_images, len(views.images))
        chosen = torch.randperm(len(views.images), generator=generator)[: count if limit is None else min(count, limit)]
        batches = [[(0, i) for i in part.tolist()] for part in chosen.split(64)]
        loader = DataLoader(views, batch_sampler=batches, generator=torch.Generator()) if count else ()
        yield from track(loader, "calibrating", "batches", len(batches))

    def example_masks(self) -> Masks:
        """Those of a sample; what teachers cannot hide is not hidden."""
        noise = self.views[0, 0].noise.unsqueeze(0).to(self.fabric.device)
        return drop_unused_masks(self.config.method.masking(noise), self.teachers)

    def cache_spec(self) -> CacheSpec:
        """What a cache of the teachers' outputs is of.

        The number of teachers is not part of a key: masks are drawn row by row, so that a further teacher leaves the
        others' alone. Its own place is, where it is what decides over its mask.
        """
        config, views, method = self.config, self.views, self.config.method
        masking: Any = method.masking
        if isinstance(masking, HidingPatches):  # these are the student's alone
            masking = replace(masking, hidden="drop", unmasked_share=0.0)
        masks = self.example_masks()
        shared = {
            "features": identity_of(method.features),
            "augment": identity_of(config.augment),
            "view": [config.student.image_size, self.students[0].start.num_patches],
            "seed": views.seed,
            "images": content_digest(views.images),
        }
        keys = []
        for place, teacher in enumerate(self.teachers):
            card = {name: value for name, value in teacher.card.as_dict().items() if name not in NOT_OF_THE_OUTPUT}
            own = {"teacher": card, "image_size": teacher.backbone.image_size, "dtype": precision_of(teacher.backbone)}
            needs = sorted(method.teacher_needs(place, len(self.teachers)))
            hidden = None if masks.teachers[place] is None else {"masking": identity_of(masking), "place": place}
            keys.append((teacher.name, {**shared, **own, "needs": needs, "hidden": hidden}))

        def example(m: int) -> TeacherOutput:
            view = self.teacher_views(views[0, 0].views)[m].unsqueeze(0).to(self.fabric.device).float() / 255
            return self.students[0].distiller.forward_teacher(self.teachers[m], m, view, masks)

        return CacheSpec(
            config.cache_in, keys, len(views.images), config.loader.fixed_views, config.cache_storage, example
        )

    def teachers_for_one(self) -> list[Teacher]:
        """The teachers as a process can run them alone; those in shards come anew, one at a time in memory."""
        if self.config.teachers_in != "shards":
            return self.teachers
        return load_teachers(replace(self.config, teachers_in="offload"), self.students[0].start, self.fabric)

    def compile(self) -> None:
        """Compile the blocks that a step runs."""
        say("compiling: the first step takes a minute or more.")
        for backbone in (*(t.backbone for t in self.teachers), *(s.distiller.student for s in self.students)):
            compile_blocks(backbone)


def prepare(config: DistillConfig, fabric: Fabric, inputs: Inputs | None = None) -> Setup:
    """Load and check everything that a run needs; nothing is written.

    Raises:
        ValueError: bad data, teachers or recipe, or an option that this machine cannot follow.
    """
    inputs = inputs or Inputs()
    splits = inputs.splits or config.load_images()
    config.check(len(splits.train))
    if config.compile:
        need_compiler()
    if config.quantized:
        check_quantized(config.quantized, fabric.device, config.compile)
    built = _build_students(config, fabric, inputs)
    config = _for_students(config, [network for network, _ in built], fabric)
    teachers = load_teachers(config, built[0][0], fabric, inputs.teachers)
    students, vits = [], []
    for vit, (network, rng) in zip(config.students, built, strict=True):
        config.method.check(network, teachers)
        if heads := config.method.compared_heads(teachers):
            cast(TimmBackbone, network).set_heads(heads)
            vit = replace(vit, heads=heads)
        start = copy.deepcopy(network)
        with rng.use():
            distiller = Distiller(network, teachers, config.method)
        distiller.to(fabric.device)
        math_attention_on_cpu(distiller, fabric.device)
        students.append(Student(start, distiller, rng))
        vits.append(vit)
    setup = Setup(replace(config, student=vits[0], extra_students=tuple(vits[1:])), splits, teachers, students, fabric)
    if config.quantized:
        _quantize_teachers(setup)
    elif not config.compile and config.teachers_in == "memory":
        for teacher in teachers:
            use_onednn_linear(teacher.backbone)
    return setup


def _build_students(config: DistillConfig, fabric: Fabric, inputs: Inputs) -> list[tuple[Backbone, RngState]]:
    """The students as they are before the run, each with generators that begin with the seed."""
    built = []
    for vit in config.students:
        fabric.seed_everything(config.run.seed, verbose=False)
        rng = RngState()
        with rng.use():
            given = inputs.student
            network = vit.build() if given is None else to_be_trained(given, vit.name, vit.image_size)
        if config.activation_checkpointing:
            if not isinstance(network, TimmBackbone):
                raise ValueError("--activation-checkpointing is for Vision Transformers as students; leave it out.")
            network.vit.set_grad_checkpointing()
        built.append((network, rng))
    pairs = zip(config.students, built, strict=True)
    seen = [f"{network.image_size} px in patches of {network.patch_size}" for _, (network, _) in pairs]
    for vit, other in zip(config.students, seen, strict=True):
        if other != seen[0]:
            raise ValueError(
                f"students share their views, but {config.student.name} sees {seen[0]}, {vit.name} sees {other}; give "
                "--student.image-size and --student.patch-size, which hold for every --student NAME."
            )
    return built


def _for_students(config: DistillConfig, networks: Sequence[Backbone], fabric: Fabric) -> DistillConfig:
    """The config as the students can follow it; what changes is said."""
    bound = [vit.name for vit, network in zip(config.students, networks, strict=True) if not network.supports_masking]
    method, size = config.method, config.teacher_image_size
    for network in networks:
        method = method.for_student(network)
    size = "own" if bound and size == "grid" else size  # a map of few cells would leave teachers few pixels
    changes = ["student and teachers see whole images (--masking none)"] if method != config.method else []
    changes += ["teachers see images of their own size"] if size != config.teacher_image_size else []
    if changes:
        zero = "; --masking.hidden zero hides pixels of patches instead" if method != config.method else ""
        say(f"{', '.join(bound)} cannot leave out patches: {', '.join(changes)}{zero}.")
    return replace(config, method=method, teacher_image_size=size)


def load_teachers(
    config: DistillConfig, student: Backbone, fabric: Fabric, given: Sequence[Any] | None = None
) -> list[Teacher]:
    """Teachers on the students' grid, with their decoders where the method learns from them.

    Args:
        config, fabric: of the run.
        student: gives the grid.
        given: names or objects in the place of those that the config names.

    Raises:
        ValueError: there are none, one cannot be loaded, or they cannot be where they are to be.
    """
    specs = config.teachers if given is None else given
    if not specs:
        raise ValueError("a distillation needs at least one teacher; pass --teachers NAME=FILE or a bundled name.")
    if config.teachers_in == "shards" and (fabric.world_size == 1 or given is not None):
        raise ValueError("--teachers-in shards is for several processes and teachers by name; pass offload.")
    dtype, device, folder = config.teacher_dtype, fabric.device, config.offload_to

    def place(backbone: Backbone) -> None:
        if folder:
            offload(backbone, device, folder)
        elif config.teachers_in == "shards":
            shard(backbone, device)
        else:
            backbone.to(device)
        if dtype == torch.bfloat16 and backbone.num_patches <= SHORT and not torch.cpu._is_amx_tile_supported():
            math_attention_on_cpu(backbone, device)

    size = None if config.teacher_image_size == "own" else config.teacher_image_size
    teachers = load_on_grid(specs, student.grid[0], student.patch_size, dtype, place, size)
    load_decoders(config.method, [spec for spec in specs if isinstance(spec, str)], teachers, dtype)
    return teachers


def _quantize_teachers(setup: Setup) -> None:
    """Put teachers into 8 bits, in place, and say of each the mean cosine to its tokens before."""
    kind, views, device = setup.config.quantized, setup.views, setup.fabric.device
    assert kind is not None
    samples = [setup.teacher_views(views[0, index].views) for index in range(min(8, len(views.images)))]
    for m, teacher in enumerate(setup.teachers):
        images = torch.stack([sample[m] for sample in samples]).to(device).float() / 255
        before = forward_teacher(Blocks(), teacher.backbone, images).patches
        quantize(teacher.backbone, kind)
        after = forward_teacher(Blocks(), teacher.backbone, images).patches
        cosine = float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())
        warning = "" if cosine >= NEAR else f"; WARNING: under {NEAR}, --teacher-precision bf16 is nearer"
        say(f"{teacher.name}: {kind}, tokens at a cosine of {cosine:.5f} to bf16{warning}")
