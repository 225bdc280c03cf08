"""AdamW, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim._param_groups import param_groups_weight_decay
from torch import nn

from comad.runtime.options import COMMON

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "poly": lambda share: 1 - share,
    "step": lambda share: 0.1 ** ((share >= 0.889) + (share >= 0.963)),
    "constant": lambda share: 1.0,
}
"""Share of the run after warm-up that is done → share of the way from ``min_lr`` to the peak. "step" is ViTDet's."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and how long it runs.

    Args:
        epochs: passes over the training images.
        batch_size: images whose gradients are taken together, over all processes: in one forward pass, or in parts of
            ``microbatch``.
        microbatch: most images in one forward pass; a larger ``batch_size`` is taken in equal parts.
        accumulate: batches per optimiser step; the effective batch is ``batch_size * accumulate``.
        base_lr: learning rate for an effective batch of 256; it scales linearly with the batch.
        warmup_epochs: linear warm-up from 0; ``schedule`` to ``min_lr`` afterwards.
        schedule: cosine; poly, a straight line; step, a tenth of the rate from 88.9 % on, again from 96.3 % on; or
            constant.
        min_lr: share of the peak learning rate at the end.
        weight_decay: for matrices and kernels; biases, norms, tokens and positions have none.
        betas: AdamW's momenta.
        clip: largest gradient norm; 0 does not clip.
        ema: decay of a moving average of the weights that is scored and exported instead; 0 keeps none.
    """

    epochs: float = field(default=300.0, metadata=COMMON)
    batch_size: int = field(default=256, metadata=COMMON)
    microbatch: int | None = field(default=None, metadata=COMMON)
    accumulate: int = 1
    base_lr: float = field(default=1.5e-4, metadata=COMMON)
    warmup_epochs: float = field(default=15.0, metadata=COMMON)
    schedule: Literal["cosine", "poly", "step", "constant"] = "cosine"
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 3.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "microbatch"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"--optim.{name.replace('_', '-')} {getattr(self, name)} is too small; use 1 or so.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"--optim.{name.replace('_', '-')} {value} is no number to train with; use a finite one."
                )

        if self.microbatch and self.batch_size > self.microbatch and self.batch_size % self.microbatch:
            fit = next(size for size in range(self.microbatch, 0, -1) if self.batch_size % size == 0)
            raise ValueError(
                f"--optim.batch-size {self.batch_size} is no multiple of --optim.microbatch {self.microbatch}; "
                f"use {fit}."
            )

    @property
    def pass_size(self) -> int:
        """Images in one forward pass, over all processes."""
        return min(self.batch_size, self.microbatch or self.batch_size)

    @property
    def passes(self) -> int:
        """Forward passes of an optimiser step."""
        return self.images_per_step // self.pass_size

    @property
    def images_per_step(self) -> int:
        """The effective batch."""
        return self.batch_size * self.accumulate

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.images_per_step / 256

    @property
    def summary(self) -> str:
        """The numbers that decide a training, in one line."""
        parts = f" in {self.passes} passes of {self.pass_size}" if self.passes > 1 else ""
        return (
            f"{self.epochs:g} epochs, {self.images_per_step} images a step{parts}, learning rate {self.base_lr:g} per "
            f"256 images, warm-up {self.warmup_epochs:g} epochs, then {self.schedule}, weight decay "
            f"{self.weight_decay:g}, betas {self.betas[0]:g} {self.betas[1]:g}, clip {self.clip:g}"
        )

    def lr(self, step: int, steps_per_epoch: float | int) -> float:
        """Learning rate of one optimiser step, counted from 0."""
        total, warmup = self.total_steps(steps_per_epoch), self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.peak_lr * min(1.0, (step + 1) / warmup)
        share = (step - warmup) / max(1.0, total - warmup)
        return self.peak_lr * (self.min_lr + (1 - self.min_lr) * SCHEDULES[self.schedule](min(1.0, share)))

    def total_steps(self, steps_per_epoch: float | int) -> int:
        """Optimiser steps of the whole run."""
        return max(1, round(self.epochs * steps_per_epoch))

    def steps_per_epoch(self, num_images: int) -> float:
        """Optimiser steps per pass over so many images; those that fill no batch are left out of it."""
        return num_images // self.pass_size / self.passes

    def images_seen(self, num_images: int) -> int:
        """Images in all steps of a run over so many."""
        return self.total_steps(self.steps_per_epoch(num_images)) * self.images_per_step


def build_optimizer(module: nn.Module, config: OptimConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with one dimension, tokens and positions are not decayed."""
    groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=not_decayed(module))
    return adamw(groups, config, fused)


def not_decayed(module: nn.Module) -> list[str]:
    """Names of tokens and positions; weight decay spares them."""
    return [name for name, _ in module.named_parameters() if name.endswith(("token", "pos_embed"))]


def adamw(groups: Iterable[dict[str, Any]], config: OptimConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over groups of parameters, each with its own weight decay; if ``fused`` one kernel updates many of them."""
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=fused)
