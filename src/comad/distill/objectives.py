"""Distances between tokens, and where they are taken. Add one: a function of two tokens, an entry in `DISTANCES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from comad.distill.fusion import Pair

Where = Literal["visible", "hidden", "all", "cls"]
Which = Literal["all", "first", "rest"]
Distance = Literal["kl-student-teacher", "kl-teacher-student", "mse", "smooth-l1", "l1", "cosine"]
Over = Literal["channels", "tokens", "queue", "queries-keys", "values-values", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the objective.

    Args:
        over: what is compared at a position: ``channels``: the token; ``tokens``: its cosines to the other tokens of
            the image; ``queue``: its cosines to past targets; ``queries-keys``, ``values-values``: its row of QKᵀ/√d
            or VVᵀ/√d in every head, before the softmax; ``pixels``: the student's picture and the image's own patch,
            normalised by its mean and variance, whatever the teachers say.
        teachers: whose word it is: of ``all``, of the ``first``, or of the ``rest``.
        where: ``visible``: patches that the student sees; ``hidden``: the others; ``all``: the whole map; ``cls``: no
            patch. Positions that no teacher saw never count.
        cls: the class token counts as one more position.
        distance: ``kl-student-teacher`` is KL(student‖teacher), the printed order; ``kl-teacher-student`` the usual.
        temperature: of the softmax over channels.
        weight: factor of the term; 0 leaves it out.
        projection: pass both sides through a small trained MLP first, as the paper's φ and ψ may be; it collapses.
    """

    over: Over = "channels"
    teachers: Which = "all"
    where: Where = "visible"
    cls: bool = True
    distance: Distance = "kl-teacher-student"
    temperature: float = 1.0
    weight: float = 1.0
    projection: bool = False

    def __post_init__(self) -> None:
        if self.over == "queue" and (self.where != "cls" or not self.cls):
            raise ValueError("a queue keeps class tokens; set where to cls, and cls to true, in a term over the queue.")

    @property
    def over_tokens(self) -> bool:
        """Whether it compares tokens at the tap, rather than attention or pixels."""
        return self.over in ("channels", "tokens", "queue")

    @property
    def over_attention(self) -> bool:
        """Whether it compares rows of queries and keys, or of values."""
        return self.over in ("queries-keys", "values-values")

    def positions(
        self, visible: Bool[Tensor, "B N"], valid: Bool[Tensor, "B N"], cls_valid: Bool[Tensor, "B 1"]
    ) -> Bool[Tensor, "B N1"]:
        """Which tokens count: column 0 is the class token, then the patches."""
        patches = {
            "visible": valid & visible,
            "hidden": valid & ~visible,
            "all": valid,
            "cls": torch.zeros_like(valid),
        }[self.where]
        return torch.cat([cls_valid & self.cls, patches], dim=1)

    def distances(self, pair: Pair) -> Float[Tensor, "B n"]:
        """Distance at every position; heads of attention are averaged."""
        distance = DISTANCES[self.distance](pair.prediction.float(), pair.target.float(), self.temperature)
        return distance.flatten(2).mean(dim=2) if distance.ndim > 2 else distance

    def __call__(
        self, student: Float[Tensor, "B n D"], target: Float[Tensor, "B n D"], counts: Bool[Tensor, "B n"]
    ) -> Float[Tensor, ""]:
        """Mean distance over the tokens that count; 0 if there are none."""
        return mean_distance(self.distances(Pair(student, target, counts)).unsqueeze(0), counts.unsqueeze(0), counts)


def mean_distance(distances: Float[Tensor, "P B n"], weights: Tensor, counts: Bool[Tensor, "B n"]) -> Float[Tensor, ""]:
    """Weighted sum over pairs, mean over the positions that count; 0 if there are none."""
    return (distances * (weights * counts)).sum() / counts.sum().clamp(min=1)


def kl_student_teacher(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(φ(z_S) ‖ φ(z_T)), φ the softmax over channels (arXiv:2508.04816, L_token and L_spatial): (..., D) → (...)."""
    if temperature != 1:
        student, target = student / temperature, target / temperature
    log_p, log_q = F.log_softmax(student, dim=-1), F.log_softmax(target, dim=-1)
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


def l1(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean absolute difference over channels: (..., D) → (...)."""
    return (student - target).abs().mean(dim=-1)


def cosine(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """1 - cosine: (..., D) → (...)."""
    return 1 - F.cosine_similarity(student, target, dim=-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl-student-teacher": kl_student_teacher,
    "kl-teacher-student": kl_teacher_student,
    "mse": mse,
    "smooth-l1": smooth_l1,
    "l1": l1,
    "cosine": cosine,
}
