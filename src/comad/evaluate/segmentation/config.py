"""Recipes of segmentation. Add one: a value in `RECIPES`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from comad.data.loader import LoaderConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.run import RunConfig
from comad.runtime.spelling import hint


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Train a segmentation head on a backbone, and the backbone with it, and score both.

    Args:
        backbone: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        data: a folder in the format of ADE20K (ADEChallengeData2016).
        head: ``upernet`` trains all; ``linear`` one linear map on the frozen features, a quick probe.
        channels: of UPerNet's maps.
        auxiliary: weight of the loss of the auxiliary head, which sees the third map.
        crop: pixels on the side of training views and of the test's windows.
        short_side: pixels on the shorter side of images, in the test and before the jitter of scale.
        scale: smallest and largest factor of that jitter.
        stride: pixels from one window of the test to the next.
        drop_path: stochastic depth of the backbone's last block.
        layer_decay: learning rate of a block of the backbone as a share of the next one's; the heads have all of it.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
        figures: draw predictions beside the truth, and the run's curves.
    """

    backbone: str = field(metadata=COMMON | NO_EFFECT)
    data: str = field(metadata=COMMON | NO_EFFECT)
    head: Literal["upernet", "linear"] = field(default="upernet", metadata=COMMON)
    channels: int = 512
    auxiliary: float = 0.4
    crop: int = field(default=512, metadata=COMMON)
    short_side: int = field(default=512, metadata=COMMON)
    scale: tuple[float, float] = (0.5, 2.0)
    stride: int = field(default=341, metadata=COMMON)
    drop_path: float = 0.1
    layer_decay: float = field(default=0.65, metadata=COMMON)
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(workers=4))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=126.7,
            batch_size=16,
            base_lr=1.6e-3,
            warmup_epochs=1.19,
            schedule="poly",
            betas=(0.9, 0.999),
            clip=0.0,
        )
    )
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            out="runs/segment", log_every=50, probe_every=16000, checkpoint_every=4000, keep=1
        )
    )
    figures: bool = field(default=False, metadata=COMMON | NO_EFFECT)


ADE20K = SegmentConfig(backbone="", data="")
"""The recipe of MAE (arXiv:2111.06377, appendix A.4) and BEiT: 160,000 steps of 16 crops at 1e-4, poly, layer decay."""

SCENES = replace(
    ADE20K,
    channels=64,
    auxiliary=0.0,
    crop=48,
    short_side=144,
    scale=(0.75, 1.5),
    stride=48,
    drop_path=0.0,
    layer_decay=0.5,
    loader=LoaderConfig(workers=0),
    optim=replace(ADE20K.optim, epochs=12.0, batch_size=32, base_lr=8e-3, warmup_epochs=0.3, clip=1.0),
    run=replace(ADE20K.run, log_every=25, probe_every=300, checkpoint_every=300, threads=1),
)
"""For the images of `comad data scenes`: minutes on one CPU core for a small student."""

LINEAR = OptimConfig(epochs=40.0, batch_size=16, base_lr=1.6e-2, warmup_epochs=1.0, schedule="poly", clip=0.0)
"""A linear head learns faster, and all of it alike."""

RECIPES = {"ade20k": ADE20K, "scenes": SCENES}


def recipe(preset: str, head: str = "upernet") -> SegmentConfig:
    """A recipe, without its backbone and data.

    Raises:
        ValueError: no such recipe.
    """
    if preset not in RECIPES:
        raise ValueError(f"no preset {preset!r}; {hint(preset, RECIPES)}")
    chosen = RECIPES[preset]
    if head != "linear":
        return chosen
    epochs, batch_size = min(LINEAR.epochs, 0.5 * chosen.optim.epochs), chosen.optim.batch_size
    return replace(chosen, head="linear", optim=replace(LINEAR, epochs=epochs, batch_size=batch_size))
