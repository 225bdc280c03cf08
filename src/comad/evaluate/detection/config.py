"""Recipes of detection. Add one: a value in `RECIPES`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from comad.data.loader import LoaderConfig
from comad.runtime.optim import OptimConfig
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.run import RunConfig
from comad.runtime.spelling import hint


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """The sizes of the detector.

    Args:
        kind: ``cascade`` corrects boxes in three stages, at overlaps of .5, .6 and .7; ``plain`` in one.
        channels: of the pyramid's levels.
        num_convs: convolutions of each box head and of the mask head.
        hidden: units of the box heads.
        anchor: side of the anchors in strides of their level.
        proposals: regions from the first stage, per image, in training and in the test.
        regions: of these, how many the second stage learns from.
        detections: most detections per image.
        least_score: of a detection; a lower one adds to average precision where no class is sure, and takes time.
    """

    kind: Literal["cascade", "plain"] = "cascade"
    channels: int = 256
    num_convs: tuple[int, int] = (4, 4)
    hidden: int = 1024
    anchor: int = 8
    proposals: tuple[int, int] = (2000, 1000)
    regions: int = 512
    detections: int = 100
    least_score: float = 0.05

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Overlap from which a region belongs to an object, per stage."""
        return (0.5, 0.6, 0.7) if self.kind == "cascade" else (0.5,)


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """Train a detector on a backbone, and the backbone with it, and score boxes and masks.

    Args:
        backbone: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        data: a folder in the format of COCO 2017.
        detector: its sizes.
        image_size: pixels on the side of training views, and on the longer side of images in the test.
        scale: smallest and largest longer side of an image in training, as a share of ``image_size``.
        window: patches on the side of the windows that most blocks attend within; 0: all see the whole image.
        drop_path: stochastic depth of the backbone's last block.
        layer_decay: learning rate of a block of the backbone as a share of the next one's; the heads have all of it.
        loader: how images are read.
        optim: the optimiser and how long it runs.
        run: where the run lives.
        figures: draw boxes and masks beside the truth, and the run's curves.
    """

    backbone: str = field(metadata=COMMON | NO_EFFECT)
    data: str = field(metadata=COMMON | NO_EFFECT)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    image_size: int = field(default=1024, metadata=COMMON)
    scale: tuple[float, float] = (0.1, 2.0)
    window: int = 14
    drop_path: float = 0.1
    layer_decay: float = field(default=0.7, metadata=COMMON)
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(workers=4))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=100.0,
            batch_size=64,
            base_lr=4e-4,
            warmup_epochs=0.14,
            schedule="step",
            weight_decay=0.1,
            betas=(0.9, 0.999),
            clip=0.0,
        )
    )
    run: RunConfig = field(
        default_factory=lambda: RunConfig(
            out="runs/detect", log_every=50, probe_every=10000, checkpoint_every=2000, keep=1
        )
    )
    figures: bool = field(default=False, metadata=COMMON | NO_EFFECT)


COCO = DetectConfig(backbone="", data="")
"""The recipe of ViTDet (arXiv:2203.16527, appendix): 100 epochs of 64 views of 1024 px, large-scale jitter, 1e-4."""

SCENES = replace(
    COCO,
    detector=DetectorConfig(
        channels=32,
        num_convs=(0, 2),
        hidden=256,
        anchor=4,
        proposals=(50, 50),
        regions=16,
        detections=30,
        least_score=0.005,
    ),
    image_size=128,
    scale=(0.6, 1.4),
    window=0,
    drop_path=0.0,
    layer_decay=0.5,
    loader=LoaderConfig(workers=0),
    optim=replace(
        COCO.optim,
        epochs=6.0,
        batch_size=8,
        base_lr=3.2e-2,
        warmup_epochs=0.3,
        weight_decay=0.05,
        clip=1.0,
    ),
    run=replace(COCO.run, log_every=50, probe_every=600, checkpoint_every=300, threads=1),
)
"""For the images of `comad data scenes`: minutes on one CPU core for a small student."""

RECIPES = {"coco": COCO, "scenes": SCENES}


def recipe(preset: str) -> DetectConfig:
    """A recipe, without its backbone and data.

    Raises:
        ValueError: no such recipe.
    """
    if preset not in RECIPES:
        raise ValueError(f"no preset {preset!r}; {hint(preset, RECIPES)}")
    return RECIPES[preset]
