"""Optimiser settings that methods were published with (``--recipe-of``). Add one: an entry in `PUBLISHED`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from comad.distillation.config import DistillConfig
from comad.presets import METHODS
from comad.runtime.optim import OptimConfig
from comad.runtime.spelling import hint


@dataclass(frozen=True, kw_only=True)
class Published:
    """Optimiser settings of a paper or of its code (``--recipe-of``), as its smallest student was trained.

    Attributes:
        source: where they stand.
        optim: learning rates per 256 images. Batches above 256 are taken in passes of 256.
        crop_scale, jitter: of the views.
        drop_path: of the student.
    """

    source: str
    optim: OptimConfig
    crop_scale: tuple[float, float] = (0.2, 1.0)
    jitter: float = 0.0
    drop_path: float = 0.0

    def applied(self, config: DistillConfig, name: str) -> DistillConfig:
        """A recipe with these settings in place of its own."""
        return replace(
            config,
            optim=self.optim,
            augment=replace(config.augment, crop_scale=self.crop_scale, jitter=self.jitter),
            student=replace(config.student, drop_path=self.drop_path),
            recipe_of=name,
        )


_PAPER = Published(
    source="arXiv:2508.04816, Experiments; betas and clipping are the common ones, crops not said",
    optim=OptimConfig(epochs=300.0, batch_size=4096, microbatch=256, base_lr=1.5e-4, warmup_epochs=15.0),
    crop_scale=(0.25, 1.0),
    jitter=0.4,
)
IMAGENET = 1_281_167
"""Images of ImageNet-1k. Published numbers of steps are as many epochs of it."""
_MAE = OptimConfig(epochs=300.0, batch_size=4096, microbatch=256, base_lr=1.5e-4, warmup_epochs=15.0, clip=0.0)
_TINYMIM = Published(
    source="README.md, main_pretrain.py and models_tinymim.py of github.com/OliverRensu/TinyMIM",
    optim=_MAE,
    jitter=0.4,
    drop_path=0.1,
)

_UNIC = replace(
    _MAE,
    epochs=200.0,
    batch_size=512,
    base_lr=3e-4,
    warmup_epochs=10.0,
    weight_decay=0.03,
    betas=(0.9, 0.99),
    min_lr=1e-6 / 6e-4,
)
"""DUNE's are near it."""

PUBLISHED: dict[str, Published] = {
    **{name: _PAPER for name in METHODS if name == "mean" or name.startswith("comad")},
    **dict.fromkeys(("tinymim", "m-tinymim", "tinymim-feat"), _TINYMIM),
    "dmae": Published(
        source="pretrain.sh and main_distill.py of github.com/UCSC-VLAA/DMAE",
        optim=replace(_MAE, epochs=100.0, warmup_epochs=20.0),
    ),
    "g2sd": Published(
        source="GD.sh, main_distill.py and engine_distill.py of github.com/pengzhiliang/G2SD",
        optim=replace(_MAE, warmup_epochs=10.0, min_lr=2.5e-6 / 2.4e-3),
    ),
    "dmjd": Published(  # its rate counts each image once for every mask: 6e-4 / 0.6
        source="PRETRAIN.md and main_pretrain.py of github.com/mx-mark/DMJD",
        optim=replace(_MAE, epochs=400.0, batch_size=512, base_lr=1e-3, warmup_epochs=20.0),
        crop_scale=(0.5, 1.0),
    ),
    "unic": Published(
        source="main_unic.py and README.md of github.com/naver/unic, on 4 GPUs",
        optim=_UNIC,
        crop_scale=(0.08, 1.0),
        jitter=0.4,
        drop_path=0.1,
    ),
    "dune": Published(
        source="main_dune.py and README.md of github.com/naver/dune, its first stage, on 4 GPUs",
        optim=replace(_UNIC, epochs=100.0, warmup_epochs=20.0, clip=1.0),
        crop_scale=(0.4, 1.0),
        jitter=0.4,
    ),
    "radio": Published(
        source="arXiv:2312.06709, section 4; betas, clipping, warm-up, crops and colours are the common ones",
        optim=OptimConfig(
            epochs=round(600_000 * 1024 / IMAGENET, 3),
            batch_size=1024,
            microbatch=256,
            base_lr=1e-3 / 4,
            weight_decay=0.02,
        ),
        crop_scale=(0.25, 1.0),
        jitter=0.4,
    ),
    "eupe": Published(  # 2e-5, scaled as the code of its authors does: by 4 √(8192 / 1024)
        source="arXiv:2603.22387, section 4.1, stage 2; configs/config.py of github.com/facebookresearch/EUPE; betas, "
        "clipping, warm-up, crops and strength of colours are the common ones",
        optim=OptimConfig(
            epochs=round(390_000 * 8192 / IMAGENET, 3),
            batch_size=8192,
            microbatch=256,
            base_lr=2e-5 * 4 * math.sqrt(8) / 32,
            weight_decay=1e-4,
        ),
        crop_scale=(0.25, 1.0),
        jitter=0.4,
    ),
    "theia": Published(
        source="training/frame_level.yaml of github.com/bdaiinstitute/theia, on 8 GPUs",
        optim=replace(
            _MAE,
            epochs=50.0,
            batch_size=128,
            base_lr=1e-3,
            warmup_epochs=5.0,
            schedule="constant",
            weight_decay=0.01,
            betas=(0.9, 0.999),
        ),
        crop_scale=(1.0, 1.0),
    ),
    "gram": Published(  # 5e-4 at 1536, there scaled by the root of the batch; its epochs depend on the set
        source="_methods/distillationv3 of github.com/lightly-ai/lightly-train; epochs and warm-up are the common ones",
        optim=replace(_MAE, batch_size=1536, base_lr=5e-4 / 6, weight_decay=0.04, betas=(0.9, 0.999), clip=1.0),
        crop_scale=(0.25, 1.0),
        jitter=0.4,
    ),
}
"""Preset → what it was published with."""

NOT_FOLLOWED = {
    "phi-s": "it was trained by LAMB (arXiv:2410.01680, table 10), which is not built here",
    "c-radio": "its report (arXiv:2601.17237) gives none, and its training code is not public",
    "siglino": "of arXiv:2512.20157 steps and sizes alone are known here, and its training code is not public",
    "hybrid": "of arXiv:2306.15876 its 300 epochs alone are known here, and its code is not public",
    "dmt-like": "of arXiv:2312.11938 they are not known here, and its code is not public",
    "consensus": "it is this project's own",
}
"""Preset → why it is not in `PUBLISHED`."""


def published(name: str) -> Published:
    """The optimiser settings of a method.

    Raises:
        ValueError: none are known that one could follow here.
    """
    if name in NOT_FOLLOWED:
        reason = f"{NOT_FOLLOWED[name]}; known are those of {', '.join(PUBLISHED)}."
        raise ValueError(f"no published optimiser settings of {name!r} to follow: {reason}")
    if name not in PUBLISHED:
        raise ValueError(f"no published optimiser settings of {name!r}; {hint(name, PUBLISHED)}")
    return PUBLISHED[name]
