"""Whether student, teachers and method fit together, and what the student has to take over from the teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from comad.distill.config import Method
from comad.distill.fusion import fuses_targets
from comad.distill.heads import Student
from comad.models.mae_decoder import load_decoder
from comad.models.teachers import Teacher
from comad.models.timm_backbone import TimmBackbone, VitConfig


def match(method: Method, config: VitConfig, student: TimmBackbone, teachers: Sequence[Teacher]) -> VitConfig:
    """Check a method against its teachers; give the student the teachers' number of heads where attention is compared.

    timm's config has one number of heads for all blocks, so that all take it, and a student goes out as it was trained
    (arXiv:2301.01296 asks it of the last block).

    Returns:
        The student's config with that number of heads, from which its export is built.

    Raises:
        ValueError: the method does not fit these teachers.
    """
    names = ", ".join(teacher.name for teacher in teachers)
    if method.single and len(teachers) > 1:
        raise ValueError(f"this preset distils one teacher and got {names}; pass one with --teachers.")
    if len(teachers) < 2 and any(term.teachers == "rest" for term in method.active.values()):
        raise ValueError(
            f"this preset needs a masked-image teacher and then others, and got {names}; pass two or more --teachers."
        )
    _check_widths(method, teachers)
    _check_blocks(method, teachers)
    compared = teachers if method.reads.qkv < 0 else teachers[: method.reads.qkv]
    return _take_heads(config, student, compared) if compared else config


def give_decoders(specs: Sequence[str], teachers: Sequence[Teacher], dtype: torch.dtype, device: torch.device) -> None:
    """Put the decoders that teachers were trained with beside them.

    Raises:
        ValueError: a teacher has none.
    """
    for spec, teacher in zip(specs, teachers, strict=True):
        decoder = load_decoder(spec, teacher.backbone.grid)
        if not isinstance(teacher.backbone, TimmBackbone) or decoder.embed.in_features != teacher.backbone.width:
            raise ValueError(f"{spec}: its decoder is of another width than its encoder; use an unmodified folder.")
        teacher.backbone.decoder = decoder.to(device, dtype)


def widths_and_cls(method: Method, teachers: Sequence[Teacher]) -> tuple[list[int], list[bool]]:
    """Channels of each teacher where it is read, and whether its class token carries meaning."""
    if method.tap.decoder:
        decoders = [cast(TimmBackbone, teacher.backbone).decoder for teacher in teachers]
        return [decoder.embed.out_features for decoder in decoders if decoder is not None], [False] * len(teachers)
    return [teacher.backbone.width for teacher in teachers], ["cls" in t.backbone.token_types for t in teachers]


def _check_widths(method: Method, teachers: Sequence[Teacher]) -> None:
    """One head for fused targets needs targets of one width."""
    if isinstance(method.aligner, Student) and fuses_targets(method.fusion):
        widths = sorted({teacher.backbone.width for teacher in teachers})
        if len(widths) > 1:
            raise ValueError(
                f"teachers of widths {', '.join(map(str, widths))} have no mean; name teachers of one width, or take a "
                "preset that adds up losses, such as radio."
            )


def _check_blocks(method: Method, teachers: Sequence[Teacher]) -> None:
    """Reading inside a network needs a plain Vision Transformer."""
    for number, teacher in enumerate(teachers):
        inside = method.tap.teacher < 1 or method.reads.qkv < 0 or number < method.reads.qkv
        if inside and not isinstance(teacher.backbone, TimmBackbone):
            raise ValueError(
                f"{teacher.name}: this preset reads the blocks of a plain Vision Transformer, and this is none; "
                "name another teacher or preset."
            )


def _take_heads(config: VitConfig, student: TimmBackbone, teachers: Sequence[Teacher]) -> VitConfig:
    heads = sorted({cast(Any, teacher.backbone).vit.blocks[0].attn.num_heads for teacher in teachers})
    if len(heads) > 1:
        raise ValueError(
            f"teachers of {', '.join(map(str, heads))} heads have no mean of attention; name teachers of as many heads."
        )
    if student.width % heads[0]:
        raise ValueError(
            f"attention is compared head by head, and a student of width {student.width} cannot have the teacher's "
            f"{heads[0]} heads; set --student.width {max(1, round(student.width / heads[0])) * heads[0]}."
        )
    for block in cast(Any, student.vit.blocks):
        attention = block.attn
        attention.num_heads, attention.head_dim = heads[0], student.width // heads[0]
        attention.scale = attention.head_dim**-0.5
    return replace(config, heads=heads[0])
