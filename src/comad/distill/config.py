"""The five slots of a method, and a whole distillation run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import tyro

from comad.data.loader import LoaderConfig
from comad.distill.aligners import Aligner, Frozen
from comad.distill.fusion import Fusion, Gate
from comad.distill.masking import Masking
from comad.distill.objectives import Term
from comad.models.timm_backbone import VitConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.train import RunConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of distillation: what is seen, how teachers are aligned and fused, what is compared.

    Args:
        masking: which patches student and teachers see.
        aligner: how teacher tokens come to the student's width.
        fusion: how they become one target.
        terms: name → distance between student and target.
        decoder_width, decoder_depth, decoder_heads: of the decoder that fills in patches dropped by the student.
    """

    masking: Masking = field(default_factory=Masking)
    aligner: Aligner = field(default_factory=Frozen)
    fusion: Fusion = field(default_factory=Gate)
    terms: Mapping[str, Term] = field(
        default_factory=lambda: {"token": Term(where="visible"), "spatial": Term(where="all", cls=False)}
    )
    decoder_width: int = 128
    decoder_depth: int = 1
    decoder_heads: int = 4


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
        method: the five slots; start from a preset and change single values.
        augment: the views.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
        preset: where the method came from, for cards and tables.
        split: images of the scores at the end: test, or val while choices are still made; none: no scores.
        cache_teachers: keep teacher outputs in memory and use them again; exact, and needs --loader.fixed-views.
    """

    data: str = "stamps"
    teachers: tuple[str, ...] = ("mae-stamps", "mocov3-stamps", "ibot-stamps")
    student: VitConfig = field(default_factory=VitConfig)
    method: Method = field(default_factory=Method)
    augment: Augment = field(default_factory=Augment)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    split: Literal["test", "val", "none"] = "test"
    cache_teachers: bool = False
    preset: tyro.conf.Suppress[str] = "comad"
