"""How a backbone is fine-tuned. Add a recipe: a value in `RECIPES`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from comad.data.bundled import BUNDLED
from comad.data.load import DataConfig
from comad.data.loader import LoaderConfig
from comad.models.backbone import Pool
from comad.runtime.optim import OptimConfig
from comad.runtime.options import COMMON, NO_EFFECT
from comad.runtime.run import RunConfig
from comad.runtime.spelling import hint


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a backbone is fine-tuned.

    Args:
        optim: the optimiser and how long it runs.
        layer_decay: factor of the learning rate per layer below the heads; 1 trains all layers alike.
        drop_path: stochastic depth at the last block; it falls to 0 at the first.
        smoothing: share of a label that is spread over all classes.
        mixup: parameter of the beta distribution by which images are blended; 0 leaves it out.
        cutmix: the same for pasting a part of one image into another.
        pool: what is classified: the mean patch token, or the class token.
        crop_scale: smallest and largest share of the image's area in a training view.
        jitter: strength of colour changes, as in a distillation.
    """

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=100.0, batch_size=256, base_lr=1e-3, warmup_epochs=5.0, betas=(0.9, 0.999)
        )
    )
    layer_decay: float = field(default=0.75, metadata=COMMON)
    drop_path: float = field(default=0.1, metadata=COMMON)
    smoothing: float = 0.1
    mixup: float = field(default=0.8, metadata=COMMON)
    cutmix: float = field(default=1.0, metadata=COMMON)
    pool: Pool = field(default="patch", metadata=COMMON)
    crop_scale: tuple[float, float] = (0.25, 1.0)
    jitter: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay {self.layer_decay} is out of range; use a factor above 0, 1 at the most.")
        for name in ("drop_path", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is a share, at least 0 and below 1.")


PAPER = Tuning()
"""arXiv:2508.04816: 100 epochs, AdamW, learning rate 1e-3, weight decay 0.05. The rest, on which it is silent, as for
MAE (arXiv:2111.06377, table 9): layer decay 0.75, drop path, smoothing 0.1, mixup 0.8, cutmix 1, but no RandAugment."""

SMALL = replace(
    PAPER,
    optim=replace(PAPER.optim, epochs=20.0, batch_size=128, base_lr=1e-2, warmup_epochs=2.0),
    layer_decay=0.5,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
)
"""For thousands of images, minutes on two CPU cores; chosen by validation images (docs/experiments/choices.md)."""

RECIPES: dict[str, Tuning] = {"paper": PAPER, "small": SMALL}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(DataConfig):
    """Fine-tune a backbone with labels.

    Args:
        backbone: an exported folder, NAME=FILE, a bundled teacher, or a timm model name.
        image_size: pixels on the side of the view; left out, 224, and on stamps as many as give 6 × 6 patches.
        tuning: how it is trained.
        try_lr: values of --optim.base-lr to try; the one that is best on the validation images is reported.
        try_epochs: values of --optim.epochs to try, each with each learning rate.
        split: the images of the score: test, which are looked at once, after the choice; val keeps them unseen.
        export: formats in which the classifier leaves, with its classes' names, as by comad export: timm onnx ...
        loader: how images are read.
        run: where the run lives.
    """

    backbone: str = field(metadata=COMMON | NO_EFFECT)
    image_size: int | None = field(default=None, metadata=COMMON)
    tuning: Annotated[Tuning, tyro.conf.arg(name="")] = field(default_factory=Tuning)
    try_lr: tuple[float, ...] = field(default=(), metadata=COMMON | NO_EFFECT)
    try_epochs: tuple[float, ...] = field(default=(), metadata=COMMON | NO_EFFECT)
    split: Literal["test", "val"] = field(default="test", metadata=COMMON | NO_EFFECT)
    export: tuple[str, ...] = field(default=(), metadata=COMMON | NO_EFFECT)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/finetune"))


def recipe(name: str, data: str) -> Tuning:
    """A recipe by name; without one ``small`` for bundled sets and ``paper`` for folders.

    Raises:
        ValueError: no such recipe.
    """
    name = name or ("small" if data in BUNDLED else "paper")
    if name not in RECIPES:
        raise ValueError(f"no preset {name!r} to fine-tune with; {hint(name, RECIPES)}")
    return RECIPES[name]
