"""What a comparison is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from comad.distillation.config import DistillConfig
from comad.evaluation.tuning import SMALL, Tuning


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare methods, teacher sets and seeds: equal views, data order and schedule, paired differences.

    Rows see equally many images; with --budget they train for equally long here, each by a schedule of its own length.

    Args:
        presets: the methods; each a preset, or in quotes a preset with options of `comad distill`, such as
            "comad --masking.mask-ratio 0.8".
        ablation: gate, masks, losses or teachers: the rows of the paper's Tables 6, 5, 3 and 4.
        teacher_sets: subsets of --teachers, each the names with commas between, such as mae,ibot; the beginning of a
            name will do. Left out: all teachers together.
        seeds: of weights, order, views and masks; every row is trained once for each.
        reference: the row from which differences are taken: a preset or a row's name. Left out: comad, else the first.
        baselines: further rows: teachers, untrained, init-only, supervised, pixels.
        finetune: fine-tune every row as well, by --tuning.*.
        tuning: how that is done; supervised rows take all but length, learning rates and views from it.
        recipe: of every distillation.
    """

    presets: tuple[str, ...] = ()
    ablation: str = ""
    teacher_sets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = ""
    baselines: tuple[str, ...] = ("teachers", "untrained", "init-only")
    finetune: bool = False
    tuning: Tuning = SMALL
    recipe: Annotated[DistillConfig, tyro.conf.arg(name="")] = field(default_factory=DistillConfig)
