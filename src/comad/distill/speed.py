"""What makes a step faster: teachers in 8 bits, and how near they stay to what they were; compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from comad.data.loader import ViewDataset
from comad.distill.distiller import Distiller
from comad.distill.teaching import ask, blocks_read
from comad.models.compiling import compile_blocks
from comad.models.quantized import Quantized, quantize
from comad.models.teachers import Teacher
from comad.models.timm_backbone import TimmBackbone

NEAR = 0.999
"""Mean cosine to the tokens before, under which 8 bits are warned of."""
NUM_IMAGES = 8


def quantize_teachers(
    teachers: Sequence[Teacher], kind: Quantized | None, views: ViewDataset, device: torch.device
) -> Iterator[str]:
    """Put teachers into 8 bits, in place, if any is wanted; for each a line: the mean cosine to its tokens before.

    Raises:
        ValueError: one is no plain Vision Transformer.
    """
    if kind is None:
        return
    samples = [views[0, index].views[0] for index in range(min(NUM_IMAGES, len(views.images)))]
    images = torch.stack(samples).to(device).float() / 255
    for number, teacher in enumerate(teachers):
        before = ask(teacher, number, images, None).tokens.patches
        quantize(teacher.backbone, kind)
        after = ask(teacher, number, images, None).tokens.patches
        cosine = float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())
        warning = "" if cosine >= NEAR else f"; WARNING: under {NEAR}, --teacher-precision bf16 is nearer"
        yield f"{teacher.name}: {kind}, tokens at a cosine of {cosine:.5f} to bf16{warning}"


def compile_step(distiller: Distiller, teachers: Sequence[Teacher]) -> None:
    """Compile the blocks that a step runs; not those which the method reads inside."""
    for number, teacher in enumerate(teachers):
        if isinstance(teacher.backbone, TimmBackbone):
            compile_blocks(teacher.backbone.vit, blocks_read(teacher, distiller.method.reads, number))
    compile_blocks(distiller.student.vit, (distiller.tapped, *distiller.rungs, distiller.qkv))
