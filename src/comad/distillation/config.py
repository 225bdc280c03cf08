"""What a distillation is made of: the options of `comad distill`, and of recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from comad.data.load import DataConfig
from comad.data.loader import LoaderConfig
from comad.distillation.method import Method
from comad.models.quantized import Quantized
from comad.models.students import VitConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Augment:
    """One random resized crop and flip shared by student and teachers; colours change for the student alone.

    Args:
        crop_scale: smallest and largest share of the image's area.
        jitter: strength of brightness, contrast and saturation changes; hue changes by a quarter of it.
    """

    crop_scale: tuple[float, float] = (0.25, 1.0)
    jitter: float = 0.4


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DataConfig):
    """Distil several frozen teachers into one student.

    Args:
        teachers: each a bundled name, NAME=FILE, or a timm model name.
        student: the network to train.
        extra_students: further students that learn from the same teacher passes, each as if it were alone.
        method: what fills the slots; start from a preset and change single values.
        augment: the views.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
        preset: where the method came from, for cards and tables.
        recipe_of: the published method whose optimiser settings were taken; empty: the common ones.
        split: images of the scores at the end: test, or val while choices are still made; none: no scores.
        cache_teachers: keep the teachers' outputs on disk and use them again; exact, and needs --loader.fixed-views.
        cache_folder: where. A folder that is named stays, and other runs use what they share with this one; empty: in
            the run's folder, and removed when the run is done.
        cache_storage: ``computed`` keeps the teachers' precision; ``int8`` rounds each token to half the room of bf16.
        teachers_in: ``memory`` keeps all teachers there; ``offload`` keeps one at a time, and the others in a file on
            the disk of the run (beside a GPU in host memory), for the same result in less memory.
        through: timm's name of a proxy, larger than the student: the teachers are distilled into it first, in a folder
            beside the run's, which later runs use again; then the proxy alone into the student (arXiv:2603.22387).
        teacher_image_size: pixels on the side of the teachers' views, which show the student's crop: ``own`` is what
            each was made for; ``grid`` as many as give it the student's grid, so that a Vision Transformer can
            leave out masked patches; or a number. ``:size=`` behind a teacher's name goes before it.
        budget: how long the whole command may take here, as 90s, 20min or 1.5h: the number of epochs is chosen by a
            measurement at the start, warm-up in proportion, said and recorded; a resumed run keeps it.
        compile: compile the blocks of teachers and student, once per shape, which takes a minute and a C++ compiler;
            for long runs on a GPU. On a CPU it gains nothing by itself.
        activation_checkpointing: keep of the student's blocks the inputs alone and compute the rest again in the
            backward pass: less memory, a third more time of the student.
        teacher_precision: ``auto`` is that of the run. ``int8`` (CPUs with AVX-512; with AMX bf16 is faster) and
            ``fp8`` (GPUs such as H100) need --compile; how near their tokens are to those of bf16 is measured at the
            start and said.
        plugin: Python files with members of slots of your own.
    """

    teachers: tuple[str, ...] = field(
        default=("mae-stamps", "mocov3-stamps", "ibot-stamps"), metadata=COMMON | NO_EFFECT
    )
    student: VitConfig = field(default_factory=VitConfig)
    extra_students: tyro.conf.Suppress[tuple[VitConfig, ...]] = field(default=(), metadata=NO_EFFECT)
    method: Annotated[Method, tyro.conf.arg(name="")] = field(default_factory=Method)
    augment: Augment = field(default_factory=Augment)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    split: Literal["test", "val", "none"] = field(default="test", metadata=COMMON | NO_EFFECT)
    cache_teachers: bool = field(default=False, metadata=COMMON | NO_EFFECT)
    cache_folder: str = field(default="", metadata=NO_EFFECT)
    cache_storage: Literal["computed", "int8"] = "computed"
    teachers_in: Literal["memory", "offload", "shards"] = field(default="memory", metadata=NO_EFFECT)
    through: str = field(default="", metadata=NO_EFFECT)
    teacher_image_size: Literal["own", "grid"] | int = field(default="own", metadata=COMMON)
    budget: str = field(default="", metadata=COMMON | NO_EFFECT)
    compile: bool = field(default=False, metadata=COMMON)
    activation_checkpointing: bool = field(default=False, metadata=NO_EFFECT)
    teacher_precision: Literal["auto", "bf16", "fp32", "int8", "fp8"] = "auto"
    preset: tyro.conf.Suppress[str] = field(default="comad", metadata=NO_EFFECT)
    recipe_of: tyro.conf.Suppress[str] = field(default="", metadata=NO_EFFECT)
    plugin: tyro.conf.Suppress[tuple[str, ...]] = field(default=(), metadata=NO_EFFECT)

    def with_method(self, method: Method, preset: str) -> DistillConfig:
        """The same recipe for a method; its teachers are cached only if what they see repeats."""
        cached = self.cache_teachers and method.masking.repeats
        return replace(self, method=method, preset=preset, cache_teachers=cached)

    @property
    def settings(self) -> str:
        """Whose optimiser settings these are, in words; single ones may have been changed."""
        return f"the published settings of {self.recipe_of}" if self.recipe_of else "the common settings"

    @property
    def students(self) -> tuple[VitConfig, ...]:
        """All students."""
        return (self.student, *self.extra_students)

    @property
    def student_folders(self) -> tuple[str, ...]:
        """Of each student, below the run's folder: the architecture, numbered if it comes again; one alone has none."""
        names = [student.label for student in self.students]
        counts = [names[:place].count(name) for place, name in enumerate(names)]
        several = [name if not count else f"{name}-{count + 1}" for name, count in zip(names, counts, strict=True)]
        return tuple(several) if self.extra_students else ("",)

    def alone(self, number: int, run: RunConfig) -> DistillConfig:
        """The config that one of the students would have in a run of its own."""
        return replace(self, student=self.students[number], extra_students=(), run=run)

    @property
    def cache_in(self) -> Path:
        """Folder of the cache of teacher outputs."""
        return Path(self.cache_folder or Path(self.run.out) / "teacher-cache").expanduser()

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Type in which teachers are loaded."""
        chosen = self.run.precision if self.teacher_precision == "auto" else self.teacher_precision
        return {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}.get(chosen, torch.bfloat16)

    @property
    def quantized(self) -> Quantized | None:
        """The kind of 8 bits that teachers compute in."""
        return self.teacher_precision if self.teacher_precision in ("int8", "fp8") else None

    @property
    def offload_to(self) -> Path | None:
        """Folder where offloaded teachers wait: the nearest one that exists above the run."""
        if self.teachers_in != "offload":
            return None
        return next(folder for folder in Path(self.run.out).absolute().parents if folder.is_dir())

    def check(self, num_images: int) -> None:
        """Say what is wrong before anything is loaded.

        Raises:
            ValueError: options that contradict each other, or too few images for a batch.
        """
        if self.budget:
            raise ValueError(f"--budget {self.budget} is turned into epochs by comad distill; set --optim.epochs here.")
        if self.cache_teachers and not self.loader.fixed_views:
            raise ValueError("--cache-teachers needs views that repeat; set --loader.fixed-views to 2 or more.")
        batch = self.optim.images_per_step
        if num_images < batch:
            raise ValueError(
                f"{num_images} training images in {self.data!r} are too few for a batch of {batch}; add images or set "
                f"--optim.batch-size {max(1, num_images // self.optim.accumulate)}."
            )
        if self.quantized and self.teachers_in != "memory":
            raise ValueError(
                f"--teacher-precision {self.quantized} keeps teachers in memory, at half the room; leave out "
                f"--teachers-in {self.teachers_in}."
            )
        if self.run.precision == "fp16" and self.extra_students:
            raise ValueError("--run.precision fp16 scales one loss; name one --student, or pass bf16.")
        if self.teachers_in == "shards" and self.method.needs("qkv"):
            raise ValueError("queries, keys and values are read inside a block; pass --teachers-in offload for shards.")
        if self.cache_teachers and not self.method.masking.repeats:
            option = next(
                name for name in ("mixup", "shift", "mask_ratio_end") if getattr(self.method.masking, name, 0)
            )
            raise ValueError(
                "--cache-teachers needs images and masks that repeat; add --no-cache-teachers, or leave out "
                f"--masking.{option.replace('_', '-')}"
                f"{' (or add --masking.mixup-outputs)' if option == 'mixup' else ''}."
            )
