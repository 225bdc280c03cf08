"""What the student and each teacher see. Add a policy of masks: a function, an entry in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from comad.models.backbone import Hidden, random_visible, visible_map

Visible = Int[Tensor, "B V"] | None


class Masks(NamedTuple):
    """Visible positions in ascending order; None: all of them.

    Attributes:
        student: one row per image, or several: all images under the first mask, then all under the next.
        teachers: one entry per teacher.
        chance: uniform in [0, 1), for what a step leaves to chance about an image and a teacher.
    """

    student: Visible
    teachers: tuple[Visible, ...]
    chance: Float[Tensor, "B M"] | None = None

    def student_sees(self, batch_size: int, num_patches: int, device: torch.device) -> Bool[Tensor, "B N"]:
        """Map of the positions that the student sees."""
        return visible_map(self.student, batch_size, num_patches, device)

    def teachers_see(self, batch_size: int, num_patches: int, device: torch.device) -> Bool[Tensor, "M B N"]:
        """Map of the positions that each teacher sees."""
        return torch.stack([visible_map(visible, batch_size, num_patches, device) for visible in self.teachers])


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Asymmetric masks (arXiv:2508.04816, "Asymmetric Masking"), and mixup.

    Args:
        policy: ``superset``: a teacher sees what the student sees and its own part of the rest; ``independent``: masks
            drawn apart, as the paper has it; ``shared``: teachers see what the student sees; ``disjoint``: the student
            sees each image twice, with no patch in common, the teachers see all; ``none``: all see all.
        student: share of patches hidden from the student.
        student_end: share hidden from it at the end of the run, if not the same; linear in between.
        unmasked_share: share of the steps in which the student sees whole images; the teachers' masks stay.
        teachers: share hidden from each teacher, in their order; the last one repeats for further teachers.
        hidden: what becomes of the student's hidden patches: ``drop`` leaves them out of its encoder and a light
            decoder fills them in, ``token`` puts a learnt token in their place, ``zero`` multiplies them by 0.
        teachers_hidden: ``drop`` leaves a teacher's hidden patches out, which saves their cost; ``zero`` is printed.
        mixup: blend each image with its neighbour in the batch (arXiv:1710.09412), for all networks by the same share.
    """

    policy: Literal["superset", "independent", "shared", "disjoint", "none"] = "superset"
    student: float = 0.75
    student_end: float | None = None
    unmasked_share: float = 0.0
    teachers: tuple[float, ...] = (0.5, 0.4, 0.3)
    hidden: Hidden = "drop"
    teachers_hidden: Literal["drop", "zero"] = "drop"
    mixup: bool = False

    def __post_init__(self) -> None:
        students = [self.student, *([] if self.student_end is None else [self.student_end])]
        for ratio in (*students, *self.teachers):
            if not 0 <= ratio < 1:
                raise ValueError(f"a mask ratio is the hidden share, at least 0 and below 1; got {ratio}.")
        if not 0 <= self.unmasked_share <= 1:
            raise ValueError(f"the share of unmasked steps is between 0 and 1; got {self.unmasked_share}.")
        if self.policy == "superset" and min(students) < max(self.teachers):
            raise ValueError(
                f"superset masks need a student ratio ({min(students)}) of at least each teacher's {self.teachers}."
            )
        if self.policy == "disjoint" and min(students) < 0.5:
            raise ValueError(f"two disjoint masks need a student ratio of at least 0.5; got {min(students)}.")

    @property
    def repeats(self) -> bool:
        """Whether the teachers see the same again whenever a view comes again."""
        return self.student_end is None and not self.mixup

    def blend(self, images: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B M1 N"]) -> Float[Tensor, "B 3 H W"]:
        """With ``mixup`` each image and the one before it, by a share of its noise that is uniform in [0, 1)."""
        if not self.mixup:
            return images
        share = noise.sum(dim=(1, 2)).remainder(1).to(images.dtype)[:, None, None, None]
        return share * images + (1 - share) * images.roll(1, dims=0)

    def num_visible(self, num_patches: int, num_teachers: int, progress: float = 0.0) -> tuple[int, tuple[int, ...]]:
        """Visible patches of the student and of each teacher; at least one."""
        end = self.student if self.student_end is None else self.student_end
        own = self.student + (end - self.student) * progress
        ratios = [self.teachers[min(m, len(self.teachers) - 1)] for m in range(num_teachers)]
        student, *teachers = (max(1, round(num_patches * (1 - ratio))) for ratio in (own, *ratios))
        return student, tuple(teachers)

    def __call__(self, noise: Float[Tensor, "B M1 N"], progress: float = 0.0) -> Masks:
        """Draw masks from uniform noise: row 0 is the student's, row m + 1 teacher m's.

        Args:
            noise: belongs to the samples.
            progress: share of the run that is done.
        """
        student, teachers = self.num_visible(noise.shape[2], noise.shape[1] - 1, progress)
        masks = POLICIES[self.policy](noise, student, teachers)
        if self.unmasked_share and masks.student is not None and float(noise[0].sum() % 1) < self.unmasked_share:
            everything = torch.arange(noise.shape[2], device=noise.device)
            masks = masks._replace(student=everything.expand(len(masks.student), -1))
        return masks._replace(chance=noise[:, 1:].sum(dim=2) % 1)  # uniform, and tells next to nothing of the masks


def _none(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    return Masks(None, (None,) * len(teachers))


def _shared(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    visible = random_visible(noise[:, 0], student)
    return Masks(visible, (visible,) * len(teachers))


def _independent(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    own = tuple(random_visible(noise[:, m + 1], count) for m, count in enumerate(teachers))
    return Masks(random_visible(noise[:, 0], student), own)


def _superset(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    visible = random_visible(noise[:, 0], student)
    own = (noise[:, m + 1].scatter(1, visible, -1.0) for m in range(len(teachers)))  # the student's patches come first
    return Masks(visible, tuple(random_visible(rest, count) for rest, count in zip(own, teachers, strict=True)))


def _disjoint(noise: Tensor, student: int, teachers: tuple[int, ...]) -> Masks:
    order = noise[:, 0].argsort(dim=1, stable=True)
    student = min(student, noise.shape[2] // 2)
    halves = torch.cat([order[:, :student], order[:, student : 2 * student]])
    return Masks(halves.sort(dim=1).values, (None,) * len(teachers))


POLICIES: dict[str, Callable[[Tensor, int, tuple[int, ...]], Masks]] = {
    "superset": _superset,
    "independent": _independent,
    "shared": _shared,
    "disjoint": _disjoint,
    "none": _none,
}
