"""The five slots of a method, and a whole distillation run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from comad.data.loader import LoaderConfig
from comad.distill.aligners import Aligner, Frozen
from comad.distill.fusion import Fusion, Gate
from comad.distill.heads import Student
from comad.distill.masking import Masking
from comad.distill.normalize import Normalize, Plain
from comad.distill.objectives import Term, Which
from comad.distill.taps import Reads, Tap
from comad.distill.teacher_store import Storage
from comad.models.quantized import Quantized
from comad.models.timm_backbone import VitConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.train import RunConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of distillation: what is seen and read, how teachers are aligned and fused, what is compared.

    Args:
        masking: which patches student and teachers see.
        tap: where teachers and student are read.
        normalize: what is done to the teachers' tokens first.
        aligner: how teacher tokens and student tokens come to one width.
        fusion: how teachers become one target, or their losses one loss.
        terms: name → distance between student and target.
        single: it is made for one teacher.
        decoder_width, decoder_depth, decoder_heads: of the decoder that fills in patches dropped by the student, and
            of the one that paints pixels.
        decoder_fills: ``hidden``: visible patches come from the encoder; ``all``: the decoder gives every patch.
        queue: targets that a term over the queue keeps.
    """

    masking: Masking = field(default_factory=Masking)
    tap: Tap = field(default_factory=Tap)
    normalize: Normalize = field(default_factory=Plain)
    aligner: Aligner = field(default_factory=Frozen)
    fusion: Fusion = field(default_factory=Gate)
    terms: Mapping[str, Term] = field(
        default_factory=lambda: {
            "token": Term(where="visible", temperature=10.0),
            "spatial": Term(where="all", cls=False, temperature=10.0),
        }
    )
    single: bool = False
    decoder_width: int = 128
    decoder_depth: int = 1
    decoder_heads: int = 4
    decoder_fills: Literal["hidden", "all"] = "hidden"
    queue: int = 4096

    def __post_init__(self) -> None:
        terms, whole = self.active.values(), self.masking.policy == "none"
        if any(term.over_attention for term in terms) and not whole:
            raise ValueError("attention is compared on whole images; set --method.masking.policy none.")
        if any(term.over == "pixels" for term in terms) and whole:
            raise ValueError("pixels are painted where patches are hidden; set --method.masking.policy shared.")
        if any(term.over == "pixels" for term in terms) and self.masking.hidden != "drop":
            raise ValueError("pixels are painted of what the student sees alone; set --method.masking.hidden drop.")
        if self.tap.decoder and self.masking.teachers_hidden != "drop":
            raise ValueError("a decoder fills in what was left out; set --method.masking.teachers-hidden drop.")

    @property
    def active(self) -> dict[str, Term]:
        """The terms that have weight."""
        return {name: term for name, term in self.terms.items() if term.weight}

    @property
    def reads(self) -> Reads:
        """What the teachers have to give."""
        whose = {term.teachers for term in self.active.values() if term.over_attention}
        return Reads(self.tap, 0 if not whose else 1 if whose == {"first"} else -1)

    def chosen(self, which: Which, num_teachers: int) -> range:
        """Numbers of the teachers that a term listens to."""
        first, last = {"all": (0, num_teachers), "first": (0, 1), "rest": (1, num_teachers)}[which]
        return range(first, last)

    @property
    def num_rungs(self) -> int:
        """Places that the heads of a ladder stand on; 1 without a ladder."""
        return self.aligner.rungs if isinstance(self.aligner, Student) and self.aligner.form == "ladder" else 1

    @property
    def calibration_images(self) -> int:
        """Images that something is fitted on before the run."""
        return max(self.normalize.calibration_images, self.aligner.calibration_images)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """One random resized crop and flip shared by student and teachers; colours change for the student alone.

    Args:
        crop_scale: smallest and largest share of the picture's area.
        jitter: strength of brightness, contrast and saturation changes; hue changes by a quarter of it.
    """

    crop_scale: tuple[float, float] = (0.25, 1.0)
    jitter: float = 0.4


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distil several frozen teachers into one student.

    Args:
        data: a folder of images, or the name of a bundled set.
        teachers: each a bundled name, NAME=FILE, or a timm model name.
        student: the network to train.
        beside: further students that learn from the same teacher passes, each as if it were alone.
        method: the five slots; start from a preset and change single values.
        augment: the views.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
        preset: where the method came from, for cards and tables.
        split: images of the scores at the end: test, or val while choices are still made; none: no scores.
        cache_teachers: keep what the teachers say on disk and use it again; exact, and needs --loader.fixed-views.
        cache_folder: where. A folder that is named stays, and other runs use what they share with this one; empty: in
            the run's folder, and removed when the run is done.
        cache_storage: ``computed`` keeps the teachers' precision; ``int8`` rounds each token to half the room of bf16.
        teachers_in: ``memory`` keeps all teachers there; ``offload`` keeps one at a time, and the others in a file on
            the disk of the run (beside a GPU in host memory), for the same result in less memory.
        compile: compile the blocks of teachers and student, once per shape, which takes a minute and a C++ compiler;
            for long runs on a GPU. On a CPU it gains nothing by itself.
        teacher_precision: ``auto`` is that of the run. ``int8`` (CPUs with AVX-512; with AMX bf16 is faster) and
            ``fp8`` (GPUs such as H100) need --compile; how near their tokens are to those of bf16 is measured at the
            start and said.
    """

    data: str = "stamps"
    teachers: tuple[str, ...] = ("mae-stamps", "mocov3-stamps", "ibot-stamps")
    student: VitConfig = field(default_factory=VitConfig)
    beside: tuple[VitConfig, ...] = ()
    method: Method = field(default_factory=Method)
    augment: Augment = field(default_factory=Augment)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    split: Literal["test", "val", "none"] = "test"
    cache_teachers: bool = False
    cache_folder: str = ""
    cache_storage: Storage = "computed"
    teachers_in: Literal["memory", "offload"] = "memory"
    compile: bool = False
    teacher_precision: Literal["auto", "bf16", "fp32", "int8", "fp8"] = "auto"
    preset: tyro.conf.Suppress[str] = "comad"

    def with_method(self, method: Method, preset: str) -> DistillConfig:
        """The same recipe for a method; its teachers are cached only if what they see repeats."""
        cached = self.cache_teachers and method.masking.repeats
        return replace(self, method=method, preset=preset, cache_teachers=cached)

    @property
    def students(self) -> tuple[VitConfig, ...]:
        """All students."""
        return (self.student, *self.beside)

    @property
    def student_folders(self) -> tuple[str, ...]:
        """Of each student, below the run's folder: the architecture, numbered if it comes again; one alone has none."""
        names = [student.name for student in self.students]
        counts = [names[:place].count(name) for place, name in enumerate(names)]
        several = [name if not count else f"{name}-{count + 1}" for name, count in zip(names, counts, strict=True)]
        return tuple(several) if self.beside else ("",)

    @property
    def cache_in(self) -> Path:
        """Folder of the teacher cache."""
        return Path(self.cache_folder or Path(self.run.out) / "teacher-cache").expanduser()

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Type in which teachers are loaded."""
        chosen = self.run.precision if self.teacher_precision == "auto" else self.teacher_precision
        return torch.float32 if chosen == "fp32" else torch.bfloat16

    @property
    def quantized(self) -> Quantized | None:
        """The kind of 8 bits that teachers compute in."""
        return self.teacher_precision if self.teacher_precision in ("int8", "fp8") else None

    @property
    def offload_to(self) -> Path | None:
        """Folder where offloaded teachers wait: the nearest one that exists above the run."""
        if self.teachers_in == "memory":
            return None
        return next(folder for folder in Path(self.run.out).absolute().parents if folder.is_dir())
