"""The frozen side: load the teachers and run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from comad.distill.masking import Masks, Visible
from comad.distill.taps import LAST, Reads, block_at
from comad.models.backbone import Backbone, Hidden, Tokens, map_tokens
from comad.models.listening import listening
from comad.models.offload import offload
from comad.models.teachers import Teacher, load_on_grid
from comad.models.timm_backbone import TimmBackbone, math_attention_on_cpu

SHORT = 256
"""Patches up to which a frozen network in bf16 is faster on a CPU without AMX with attention by matrix products."""


class Said(NamedTuple):
    """What one teacher says about a batch: tokens where the method taps it; queries, keys and values if it asks."""

    tokens: Tokens
    qkv: Tokens | None = None


class Targets(NamedTuple):
    """What the frozen teachers say about one batch.

    Attributes:
        tokens: one entry per teacher, of the patches it saw, where the method taps it.
        masks: who saw what.
        qkv: queries, keys and values (width 3E) of the first teachers, of as many as the method asks for.
    """

    tokens: tuple[Tokens, ...]
    masks: Masks
    qkv: tuple[Tokens, ...] = ()


def hide_nothing_in_vain(masks: Masks, teachers: Sequence[Teacher]) -> Masks:
    """Lift the masks of teachers that compute on whole images in any case."""
    seen = zip(teachers, masks.teachers, strict=True)
    return masks._replace(teachers=tuple(visible if t.backbone.supports_masking else None for t, visible in seen))


def teacher_step(
    teachers: Sequence[Teacher],
    images: Float[Tensor, "B 3 H W"],
    masks: Masks,
    hidden: Hidden = "drop",
    reads: Reads = LAST,
) -> Targets:
    """Run every teacher on the patches it may see."""
    asked = enumerate(zip(teachers, masks.teachers, strict=True))
    return gathered([ask(teacher, m, images, visible, hidden, reads) for m, (teacher, visible) in asked], masks)


@torch.no_grad()
def ask(
    teacher: Teacher,
    number: int,
    images: Float[Tensor, "B 3 H W"],
    visible: Visible,
    hidden: Hidden = "drop",
    reads: Reads = LAST,
) -> Said:
    """Run one teacher; images are resized if its patches have another size."""
    side = teacher.backbone.grid[0] * teacher.backbone.patch_size
    if side != images.shape[-1]:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    block, qkv = blocks_read(teacher, reads, number)
    with listening(teacher.backbone, [block] if block else [], qkv) as heard:
        last = teacher.backbone(images, visible, hidden)
    tokens = heard.blocks[block] if block else _decoded(teacher, last, visible) if reads.tap.decoder else last
    return Said(tokens, heard.qkv)


def gathered(said: Sequence[Said], masks: Masks) -> Targets:
    """What all teachers say, in their order."""
    relations = tuple(part.qkv for part in said if part.qkv is not None)
    return Targets(tuple(part.tokens for part in said), masks, relations)


def _decoded(teacher: Teacher, tokens: Tokens, visible: Tensor | None) -> Tokens:
    """What the decoder of a masked autoencoder makes of its encoder's tokens, at every position."""
    backbone = teacher.backbone
    assert isinstance(backbone, TimmBackbone) and backbone.decoder is not None
    if visible is None:
        visible = torch.arange(backbone.num_patches, device=tokens.patches.device).expand(len(tokens.patches), -1)
    return Tokens(None, backbone.decoder.decode(tokens.cls, tokens.patches, visible)[:, -backbone.num_patches :])


def blocks_read(teacher: Teacher, reads: Reads, number: int) -> tuple[int, int]:
    """Numbers of the block whose tokens, and of the one whose queries, keys and values are read; 0: of none."""
    blocks = len(getattr(getattr(teacher.backbone, "vit", None), "blocks", ()))
    wanted = reads.qkv < 0 or number < reads.qkv
    return (
        block_at(reads.tap.teacher, blocks) if reads.tap.teacher < 1 else 0,
        block_at(reads.tap.qkv, blocks) if wanted else 0,
    )


def one_row_per_mask(images: Float[Tensor, "B 3 H W"], targets: Targets) -> tuple[Float[Tensor, "B2 3 H W"], Targets]:
    """Repeat images and targets where the student sees each image under several masks."""
    masks = targets.masks
    if masks.student is None or len(masks.student) == len(images):
        return images, targets
    times = len(masks.student) // len(images)

    def again(part: Tensor) -> Tensor:
        return part.repeat(times, *(1,) * (part.ndim - 1))

    tokens, qkv = (tuple(map_tokens(again, part) for part in parts) for parts in (targets.tokens, targets.qkv))
    visible = tuple(None if part is None else again(part) for part in masks.teachers)
    chance = None if masks.chance is None else again(masks.chance)
    return again(images), Targets(tokens, Masks(masks.student, visible, chance), qkv)


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
        if dtype == torch.bfloat16 and backbone.num_patches <= SHORT and not torch.cpu._is_amx_tile_supported():
            math_attention_on_cpu(backbone, device)

    return load_on_grid(specs, rows, patch_size, dtype, place)
