"""The frozen side: load the teachers and run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from comad.distill.masking import Masks
from comad.models.backbone import Backbone, Hidden, Tokens
from comad.models.offload import offload
from comad.models.teachers import Teacher, load_on_grid


class Targets(NamedTuple):
    """What the frozen teachers say about one batch: one entry per teacher, tokens of the patches it saw."""

    tokens: tuple[Tokens, ...]
    masks: Masks


def hide_nothing_in_vain(masks: Masks, teachers: Sequence[Teacher]) -> Masks:
    """Lift the masks of teachers that compute on whole images in any case."""
    seen = zip(teachers, masks.teachers, strict=True)
    return masks._replace(teachers=tuple(None if t.backbone.sees_whole else visible for t, visible in seen))


@torch.no_grad()
def teacher_step(
    teachers: Sequence[Teacher], images: Float[Tensor, "B 3 H W"], masks: Masks, hidden: Hidden = "drop"
) -> Targets:
    """Run every teacher on the patches it may see; images are resized for a teacher with another patch size."""
    tokens = []
    for teacher, visible in zip(teachers, masks.teachers, strict=True):
        side = teacher.backbone.grid[0] * teacher.backbone.patch_size
        view = (
            images if side == images.shape[-1] else F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        )
        tokens.append(teacher.backbone(view, visible, hidden))
    return Targets(tuple(tokens), masks)


def load_teachers(
    specs: Sequence[str],
    rows: int,
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    offload_to: Path | None = None,
) -> list[Teacher]:
    """Load teachers at an image size that gives them the student's grid of ``rows`` × ``rows`` patches.

    Args:
        specs, rows, patch_size, dtype: see `comad.models.teachers.load_on_grid`.
        device: where they compute.
        offload_to: a folder on the disk where weights wait between passes, see `offload`; None keeps them in memory.

    Raises:
        ValueError: no teacher, two of the same name, or one that cannot be loaded.
    """
    if not specs:
        raise ValueError("a distillation needs at least one teacher; pass --teachers NAME=FILE or a bundled name.")

    def place(backbone: Backbone) -> None:
        if offload_to:
            offload(backbone, device, offload_to)
        else:
            backbone.to(device)

    return load_on_grid(specs, rows, patch_size, dtype, place)
