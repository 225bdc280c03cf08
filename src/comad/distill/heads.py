"""Trained maps on the student's side: from its tokens to what each teacher says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from comad.distill.taps import Encoded

Form = Literal["identity", "linear", "mlp", "ladder", "transformer"]


class Rungs(nn.Module):
    """The sum of one map per source; a single one but for a ladder."""

    def __init__(self, maps: Sequence[nn.Module]):
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, sources: Sequence[Float[Tensor, "B n D"]]) -> Float[Tensor, "B n E"]:
        """Map every source and add up."""
        return torch.stack([part(source) for part, source in zip(self.maps, sources, strict=True)]).sum(dim=0)


class StudentHeads(nn.Module):
    """One head per teacher, or one for all where their targets are fused; class token and patches apart if asked.

    Targets stay as the teachers give them: `forward` is the identity, and nothing on their side is trained.
    """

    def __init__(self, config: Student, widths: Sequence[int], width: int, with_cls: Sequence[bool], shared: bool):
        super().__init__()
        self.form, self.apart, self.shared = config.form, config.apart and config.form != "transformer", shared
        self.width, self.widths = width, tuple(widths)
        self.num_rungs = config.rungs if config.form == "ladder" else 1
        outs, given = (self.widths[:1], [any(with_cls)]) if shared else (self.widths, list(with_cls))
        self.patches = nn.ModuleList([self._head(config, out) for out in outs])
        heads = [(out, self.apart and has) for out, has in zip(outs, given, strict=True)]
        self.cls = nn.ModuleList([self._head(config, out) if wanted else nn.Identity() for out, wanted in heads])

    def _head(self, config: Student, out: int) -> Rungs:
        hidden = round(config.hidden_ratio * out)
        return Rungs([_map(config.form, self.width, hidden, out) for _ in range(self.num_rungs)])

    def predict(self, student: Encoded, teacher: int) -> Float[Tensor, "B N1 E"]:
        """What the student says of a teacher's tokens. The class token is 0 where there is no head for it."""
        sources = (*student.rungs, student.tapped)
        number = 0 if self.shared else teacher
        if not self.apart:
            return self.patches[number](sources).float()
        patches = self.patches[number]([source[:, 1:] for source in sources])
        first = torch.zeros_like(patches[:, :1])
        if isinstance(self.cls[number], Rungs):
            first = self.cls[number]([source[:, :1] for source in sources])
        return torch.cat([first, patches], dim=1).float()

    def forward(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n E"]:
        """A teacher's tokens, as they are."""
        return tokens.float()

    def own_loss(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Tensor | None:
        """None: heads learn from the terms."""
        return None

    def calibrate(self, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """Nothing to fit."""


def _map(form: Form, width: int, hidden: int, out: int) -> nn.Module:
    if form == "identity":
        return nn.Identity()
    if form == "linear":
        return nn.Linear(width, out)
    if form == "transformer":
        heads = max(heads for heads in range(1, max(1, width // 32) + 1) if width % heads == 0)
        return nn.Sequential(Block(width, heads, qkv_bias=True), nn.LayerNorm(width), nn.Linear(width, out))
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


@dataclass(frozen=True, kw_only=True)
class Student:
    """Maps from the student to each teacher, trained; the targets are fixed.

    Args:
        form: ``identity``; ``linear``; ``mlp``: Linear, LayerNorm, GELU, Linear; ``ladder``: the sum of an MLP from
            each of some blocks; ``transformer``: a block over all tokens, LayerNorm, Linear.
        apart: class token and patches have heads of their own; a transformer serves both.
        hidden_ratio: hidden width of an MLP, in widths of the teacher.
        rungs: of a ladder: evenly spaced blocks, the last one after the final norm.
    """

    kind: Literal["student"] = "student"
    form: Form = "linear"
    apart: bool = False
    hidden_ratio: float = 1.0
    rungs: int = 3
    calibration_images: int = 0

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], shared: bool) -> StudentHeads:
        """Randomly initialised heads; one that all teachers share if ``shared``."""
        return StudentHeads(self, teacher_widths, width, with_cls, shared)
