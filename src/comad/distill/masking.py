"""Which patches the student and each teacher see. Add a policy: a function, an entry in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from comad.models.backbone import Hidden, draw_visible, seen

Visible = Int[Tensor, "B V"] | None


class Masks(NamedTuple):
    """Visible positions in ascending order; None: all of them."""

    student: Visible
    teachers: tuple[Visible, ...]

    def student_sees(self, batch_size: int, num_patches: int, device: torch.device) -> Bool[Tensor, "B N"]:
        """Map of the positions that the student sees."""
        return seen(self.student, batch_size, num_patches, device)

    def teachers_see(self, batch_size: int, num_patches: int, device: torch.device) -> Bool[Tensor, "M B N"]:
        """Map of the positions that each teacher sees."""
        return torch.stack([seen(visible, batch_size, num_patches, device) for visible in self.teachers])


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Asymmetric masks (arXiv:2508.04816, "Asymmetric Masking").

    Args:
        policy: ``superset``: a teacher sees what the student sees and its own part of the rest; ``independent``: masks
            drawn apart, as the paper has it; ``shared``: teachers see what the student sees; ``none``: all see all.
        student: share of patches hidden from the student.
        teachers: share hidden from each teacher, in their order; the last one repeats for further teachers.
        hidden: what becomes of the student's hidden patches: ``drop`` leaves them out of its encoder and a light
            decoder fills them in, ``token`` puts a learnt token in their place, ``zero`` multiplies them by 0.
        teachers_hidden: ``drop`` leaves a teacher's hidden patches out, which saves their cost; ``zero`` is printed.
    """

    policy: Literal["superset", "independent", "shared", "none"] = "superset"
    student: float = 0.75
    teachers: tuple[float, ...] = (0.5, 0.4, 0.3)
    hidden: Hidden = "drop"
    teachers_hidden: Literal["drop", "zero"] = "drop"

    def __post_init__(self) -> None:
        for ratio in (self.student, *self.teachers):
            if not 0 <= ratio < 1:
                raise ValueError(f"a mask ratio is the hidden share, at least 0 and below 1; got {ratio}.")
        if self.policy == "superset" and self.student < max(self.teachers):
            raise ValueError(
                f"superset masks need a student ratio ({self.student}) of at least each teacher's {self.teachers}."
            )

    def num_visible(self, num_patches: int, num_teachers: int) -> tuple[int, tuple[int, ...]]:
        """Visible patches of the student and of each teacher; at least one."""
        ratios = [self.teachers[min(m, len(self.teachers) - 1)] for m in range(num_teachers)]
        student, *teachers = (max(1, round(num_patches * (1 - ratio))) for ratio in (self.student, *ratios))
        return student, tuple(teachers)

    def __call__(self, noise: Float[Tensor, "B M1 N"]) -> Masks:
        """Draw masks from uniform noise: row 0 is the student's, row m + 1 teacher m's."""
        student, teachers = self.num_visible(noise.shape[2], noise.shape[1] - 1)
        return POLICIES[self.policy](noise, student, teachers)


def _none(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    return Masks(None, (None,) * len(teachers))


def _shared(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    visible = draw_visible(noise[:, 0], student)
    return Masks(visible, (visible,) * len(teachers))


def _independent(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    own = tuple(draw_visible(noise[:, m + 1], count) for m, count in enumerate(teachers))
    return Masks(draw_visible(noise[:, 0], student), own)


def _superset(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    visible = draw_visible(noise[:, 0], student)
    own = (noise[:, m + 1].scatter(1, visible, -1.0) for m in range(len(teachers)))  # the student's patches come first
    return Masks(visible, tuple(draw_visible(rest, count) for rest, count in zip(own, teachers, strict=True)))


POLICIES: dict[str, Callable[[Tensor, int, tuple[int, ...]], Masks]] = {
    "superset": _superset,
    "independent": _independent,
    "shared": _shared,
    "none": _none,
}
