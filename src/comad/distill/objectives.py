"""Distances between tokens, and where they are taken. Add one: a function of two tokens, an entry in `DISTANCES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Where = Literal["visible", "hidden", "all"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the objective.

    Args:
        where: ``visible``: patches that the student sees; ``hidden``: the others; ``all``: the whole map. Positions
            that no teacher saw never count.
        cls: the class token counts as one more position.
        distance: ``kl-student-teacher`` is KL(student‖teacher), the printed order; ``kl-teacher-student`` the usual.
        temperature: of the softmax over channels.
        weight: factor of the term; 0 leaves it out.
        projection: pass both sides through a small trained MLP first, as the paper's φ and ψ may be; it collapses.
    """

    where: Where = "visible"
    cls: bool = True
    distance: Literal["kl-student-teacher", "kl-teacher-student", "mse", "smooth-l1", "cosine"] = "kl-teacher-student"
    temperature: float = 1.0
    weight: float = 1.0
    projection: bool = False

    def positions(
        self, visible: Bool[Tensor, "B N"], valid: Bool[Tensor, "B N"], cls_valid: Bool[Tensor, "B 1"]
    ) -> Bool[Tensor, "B N1"]:
        """Which tokens count: column 0 is the class token, then the patches."""
        patches = {"visible": valid & visible, "hidden": valid & ~visible, "all": valid}[self.where]
        return torch.cat([cls_valid & self.cls, patches], dim=1)

    def __call__(
        self, student: Float[Tensor, "B n D"], target: Float[Tensor, "B n D"], counts: Bool[Tensor, "B n"]
    ) -> Float[Tensor, ""]:
        """Mean distance over the tokens that count; 0 if there are none."""
        distance = DISTANCES[self.distance](student.float(), target.float(), self.temperature)
        return (distance * counts).sum() / counts.sum().clamp(min=1)


def kl_student_teacher(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(φ(z_S) ‖ φ(z_T)), φ the softmax over channels (arXiv:2508.04816, L_token and L_spatial): (..., D) → (...)."""
    log_p, log_q = F.log_softmax(student / temperature, dim=-1), F.log_softmax(target / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def kl_teacher_student(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(φ(z_T) ‖ φ(z_S)), the order of Hinton's distillation: (..., D) → (...)."""
    return kl_student_teacher(target, student, temperature)


def mse(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean squared difference over channels: (..., D) → (...)."""
    return (student - target).square().mean(dim=-1)


def smooth_l1(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Smooth L1 with β = ``temperature``, mean over channels: (..., D) → (...)."""
    return F.smooth_l1_loss(student, target, beta=temperature, reduction="none").mean(dim=-1)


def cosine(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """1 - cosine: (..., D) → (...)."""
    return 1 - F.cosine_similarity(student, target, dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl-student-teacher": kl_student_teacher,
    "kl-teacher-student": kl_teacher_student,
    "mse": mse,
    "smooth-l1": smooth_l1,
    "cosine": cosine,
}
