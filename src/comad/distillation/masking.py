"""Slot `masking`: which patches student and teachers see. Members are policies; yours: subclass `HidingPatches`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from comad.models.backbone import Hidden, random_visible, visible_map
from comad.models.teachers import Teacher
from comad.runtime.processes import own_rows, rows_of_all
from comad.runtime.slots import Slot

Visible = Int[Tensor, "B V"] | None


class Masks(NamedTuple):
    """Visible positions in ascending order; None: all of them.

    Attributes:
        student: one row per image, or several: all images under the first mask, then all under the next.
        teachers: one entry per teacher.
        noise: uniform in [0, 1), for what a fusion leaves to chance about an image and a teacher.
        shifts: patches, down and right, by which each network's images are moved; row 0 is the student's.
        progress: share of the run that is done.
        scale: size of the student's images in this step, as a share of its own.
    """

    student: Visible
    teachers: tuple[Visible, ...]
    noise: Float[Tensor, "B M"] | None = None
    shifts: Int[Tensor, "B M1 2"] | None = None
    progress: float = 0.0
    scale: float = 1.0

    def student_sees(self, batch_size: int, num_patches: int, device: torch.device) -> Bool[Tensor, "B N"]:
        """Map of the positions that the student sees."""
        return visible_map(self.student, batch_size, num_patches, device)

    def teachers_see(self, batch_size: int, num_patches: int, device: torch.device) -> Bool[Tensor, "M B N"]:
        """Map of the positions that each teacher sees, and that neither its nor the student's shift moved out."""
        seen = torch.stack([visible_map(visible, batch_size, num_patches, device) for visible in self.teachers])
        if self.shifts is None:
            return seen
        inside = torch.stack([inside_after(self.shifts[:, m], num_patches) for m in range(1 + len(self.teachers))])
        return seen & inside[1:] & inside[0]


@dataclass(frozen=True, kw_only=True)
class Masking(Slot, slot="masking", default="superset"):
    """What the networks see of an image.

    Args:
        mixup: blend each image with its neighbour in the batch (arXiv:1710.09412), for all networks by the same share.
    """

    mixup: bool = False

    @property
    def of_a_pass(self) -> str:
        """See `Slot`."""
        return "neighbours that images are mixed with" if self.mixup else ""

    @property
    def repeats(self) -> bool:
        """Whether the teachers see the same again whenever a view comes again, so that their outputs can be cached."""
        return not self.mixup

    @property
    def blends_outputs(self) -> bool:
        """Whether teachers see the images as they are, and their outputs are blended instead."""
        return False

    def blend(self, part: Tensor, noise: Float[Tensor, "B M1 N"]) -> Tensor:
        """With ``mixup`` each row and the one before it, by a share of its noise that is uniform in [0, 1)."""
        if not self.mixup:
            return part
        share = noise.sum(dim=(1, 2)).remainder(1).to(part.dtype).view(-1, *(1,) * (part.ndim - 1))
        return share * part + (1 - share) * own_rows(rows_of_all(part).roll(1, dims=0))

    def __call__(self, noise: Float[Tensor, "B M1 N"], progress: float = 0.0) -> Masks:
        """Draw masks from uniform noise: row 0 is the student's, row m + 1 teacher m's.

        Args:
            noise: belongs to the samples.
            progress: share of the run that is done.
        """
        masks, chance = self.draw(noise, progress), noise[:, 1:].sum(dim=2) % 1
        return masks._replace(noise=chance, progress=progress)  # uniform, and tells next to nothing of the masks

    @property
    def modes(self) -> tuple[Hidden, Hidden]:
        """What becomes of hidden patches of the student, and of the teachers."""
        return "drop", "drop"

    @property
    def every_position(self) -> bool:
        """Whether a teacher counts at positions that were hidden from it."""
        return False

    @abstractmethod
    def draw(self, noise: Float[Tensor, "B M1 N"], progress: float) -> Masks:
        """The masks of a policy; see `__call__`."""


@dataclass(frozen=True, kw_only=True)
class WholeImages(Masking, name="none"):
    """Student and teachers see whole images.

    Args:
        shift: standard deviation, in patches, of how far each network's images are moved, by whole patches and each
            network on its own; what both networks kept is compared (arXiv:2601.17237, "Shift Equivariance").
        scales: sizes of the student's images, as shares of its own, of which each step draws one; its tokens are then
            brought to its own grid (arXiv:2601.17237, "Stochastic Resolutions"). None: its own size alone.
        mixup_outputs: with ``mixup`` teachers see the images as they are, and their outputs are blended as the
            student's images are; so they can be cached.
    """

    shift: float = 0.0
    scales: tuple[float, ...] | None = None
    mixup_outputs: bool = False

    def __post_init__(self) -> None:
        if any(not 0 < scale <= 1 for scale in self.scales or ()):
            raise ValueError(
                "the student's images are as large as its own at most: each of --masking.scales is in (0, 1]."
            )
        if self.mixup_outputs and not self.mixup:
            raise ValueError("outputs of teachers are blended where the student's images are; set --masking.mixup.")

    @property
    def blends_outputs(self) -> bool:
        """See `Masking.blends_outputs`."""
        return self.mixup_outputs

    @property
    def repeats(self) -> bool:
        """See `Masking.repeats`."""
        return self.mixup_outputs >= self.mixup and not self.shift

    def draw(self, noise: Float[Tensor, "B M1 N"], progress: float) -> Masks:
        """No masks."""
        shifts = None
        if self.shift:  # normal, made of the first two numbers
            shifts = (torch.special.ndtri(noise[:, :, :2].clamp(min=1e-6)) * self.shift).round().long()
        scale = self.scales[int(float(noise[0].sum() % 1) * len(self.scales))] if self.scales else 1.0
        return Masks(None, (None,) * (noise.shape[1] - 1), shifts=shifts, scale=scale)


@dataclass(frozen=True, kw_only=True)
class HidingPatches(Masking):
    """What policies that hide patches have in common (arXiv:2508.04816, "Asymmetric Masking").

    Args:
        mask_ratio: share of patches hidden from the student.
        mask_ratio_end: share hidden from it at the end of the run, if not the same; linear in between.
        unmasked_share: share of the steps in which the student sees whole images; the teachers' masks stay.
        hidden: what becomes of the student's hidden patches: ``drop`` leaves them out of its encoder and a light
            decoder fills them in, ``token`` puts a learnt mask token in their place, ``zero`` multiplies them by 0.
        decoder_width: width of the decoder that fills in patches dropped by the student.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        decoder_output: ``hidden``: visible patches come from the encoder; ``all``: the decoder gives every patch.
    """

    mask_ratio: float = 0.75
    mask_ratio_end: float | None = None
    unmasked_share: float = 0.0
    hidden: Hidden = "drop"
    decoder_width: int = 128
    decoder_depth: int = 1
    decoder_heads: int = 4
    decoder_output: Literal["hidden", "all"] = "hidden"

    def __post_init__(self) -> None:
        check_ratios(self.student_ratios)
        if not 0 <= self.unmasked_share <= 1:
            raise ValueError(f"the share of unmasked steps is between 0 and 1; got {self.unmasked_share}.")

    @property
    def student_ratios(self) -> tuple[float, ...]:
        """The student's mask ratio at the start and, if it moves, at the end."""
        return (self.mask_ratio,) if self.mask_ratio_end is None else (self.mask_ratio, self.mask_ratio_end)

    @property
    def repeats(self) -> bool:
        """See `Masking.repeats`."""
        return self.mask_ratio_end is None and not self.mixup

    @property
    def modes(self) -> tuple[Hidden, Hidden]:
        """See `Masking.modes`."""
        return self.hidden, "drop"

    def draw(self, noise: Float[Tensor, "B M1 N"], progress: float) -> Masks:
        """Masks of the policy; in a share of the steps the student's are lifted."""
        start, end = self.student_ratios[0], self.student_ratios[-1]
        masks = self.policy(noise, num_visible(noise.shape[2], start + (end - start) * progress))
        if self.unmasked_share and masks.student is not None and first_chance(noise) < self.unmasked_share:
            everything = torch.arange(noise.shape[2], device=noise.device)
            masks = masks._replace(student=everything.expand(len(masks.student), -1))
        return masks

    @abstractmethod
    def policy(self, noise: Float[Tensor, "B M1 N"], count: int) -> Masks:
        """Masks that leave so many patches visible to the student."""


@dataclass(frozen=True, kw_only=True)
class AsymmetricMasks(HidingPatches):
    """Student and teachers have masks of their own.

    Args:
        teacher_mask_ratios: share hidden from each teacher, in their order; the last one repeats for further teachers.
        teacher_hidden: ``drop`` leaves a teacher's hidden patches out, which saves their cost; ``zero`` is printed.
        count_hidden: a teacher counts at the positions hidden from it too, as printed; with ``zero`` alone.
    """

    teacher_mask_ratios: tuple[float, ...] = (0.5, 0.4, 0.3)
    teacher_hidden: Literal["drop", "zero"] = "drop"
    count_hidden: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratios(self.teacher_mask_ratios)
        if self.count_hidden and self.teacher_hidden != "zero":
            raise ValueError("a dropped position has no token to count; set --masking.teacher-hidden zero.")

    @property
    def every_position(self) -> bool:
        """See `Masking.every_position`."""
        return self.count_hidden

    @property
    def modes(self) -> tuple[Hidden, Hidden]:
        """See `Masking.modes`."""
        return self.hidden, self.teacher_hidden

    def teacher_masks(self, noise: Float[Tensor, "B M N"]) -> tuple[Visible, ...]:
        """For each teacher the patches with the smallest noise, as many as its ratio leaves."""
        last = len(self.teacher_mask_ratios) - 1
        ratios = [self.teacher_mask_ratios[min(m, last)] for m in range(noise.shape[1])]
        return tuple(random_visible(noise[:, m], num_visible(noise.shape[2], ratio)) for m, ratio in enumerate(ratios))


@dataclass(frozen=True, kw_only=True)
class Superset(AsymmetricMasks, name="superset"):
    """A teacher sees what the student sees and its own part of the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.student_ratios) < max(self.teacher_mask_ratios):
            raise ValueError(
                f"superset masks need a student ratio ({min(self.student_ratios)}) of at least each teacher's "
                f"{self.teacher_mask_ratios}."
            )

    def policy(self, noise: Float[Tensor, "B M1 N"], count: int) -> Masks:
        """See `HidingPatches.policy`."""
        visible = random_visible(noise[:, 0], count)
        rest = noise[:, 1:].scatter(2, visible.unsqueeze(1).expand(-1, noise.shape[1] - 1, -1), -1.0)
        return Masks(visible, self.teacher_masks(rest))  # the student's patches come first


@dataclass(frozen=True, kw_only=True)
class Independent(AsymmetricMasks, name="independent"):
    """Masks of student and teachers are drawn apart, as the paper has it."""

    def policy(self, noise: Float[Tensor, "B M1 N"], count: int) -> Masks:
        """See `HidingPatches.policy`."""
        return Masks(random_visible(noise[:, 0], count), self.teacher_masks(noise[:, 1:]))


@dataclass(frozen=True, kw_only=True)
class Shared(HidingPatches, name="shared"):
    """Teachers see what the student sees."""

    def policy(self, noise: Float[Tensor, "B M1 N"], count: int) -> Masks:
        """See `HidingPatches.policy`."""
        visible = random_visible(noise[:, 0], count)
        return Masks(visible, (visible,) * (noise.shape[1] - 1))


@dataclass(frozen=True, kw_only=True)
class Disjoint(HidingPatches, name="disjoint"):
    """The student sees each image twice, with no patch in common; the teachers see all.

    Args:
        block: patches on the side of the squares that are hidden or shown as a whole.
    """

    block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"a block has a side of at least one patch; got {self.block}.")
        if min(self.student_ratios) < 0.5:
            raise ValueError(
                f"two disjoint masks need a student ratio of at least 0.5; got {min(self.student_ratios)}."
            )

    def policy(self, noise: Float[Tensor, "B M1 N"], count: int) -> Masks:
        """See `HidingPatches.policy`."""
        patches = blocks(noise.shape[2], self.block).to(noise.device)
        order = noise[:, 0, : len(patches)].argsort(dim=1, stable=True)
        count = min(max(1, count // patches.shape[1]), len(patches) // 2)
        halves = torch.cat([order[:, :count], order[:, count : 2 * count]])
        return Masks(patches[halves].flatten(1).sort(dim=1).values, (None,) * (noise.shape[1] - 1))


def first_chance(noise: Float[Tensor, "B M1 N"]) -> float:
    """A number in [0, 1) that the first image of the whole batch brings."""
    return float(rows_of_all(noise[0].sum().view(1))[0] % 1)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Patches that a mask ratio leaves; at least one."""
    return max(1, round(num_patches * (1 - mask_ratio)))


def blocks(num_patches: int, side: int) -> Int[Tensor, "blocks size"]:
    """The patches of every square block of so many patches on its side.

    Raises:
        ValueError: the grid is no whole number of blocks.
    """
    rows = math.isqrt(num_patches) if side > 1 else 1
    columns = num_patches // rows
    if rows * columns != num_patches or rows % side or columns % side:
        raise ValueError(f"blocks of {side} patches do not fill {num_patches} patches; set --masking.block 1.")
    grid = torch.arange(num_patches).view(rows // side, side, columns // side, side)
    return grid.transpose(1, 2).reshape(-1, side * side)


def move(x: Float[Tensor, "B C h w"], shift: Int[Tensor, "B 2"]) -> Float[Tensor, "B C h w"]:
    """Move maps down and right by whole cells; what leaves on one side comes back on the other."""
    rows, columns = (
        (torch.arange(size, device=x.device) - shift[:, axis, None]) % size for axis, size in enumerate(x.shape[2:])
    )
    x = x.gather(2, rows[:, None, :, None].expand_as(x))
    return x.gather(3, columns[:, None, None, :].expand_as(x))


def move_patches(patches: Float[Tensor, "B N E"], shift: Int[Tensor, "B 2"]) -> Tensor:
    """`move` for patches of a square grid."""
    side = math.isqrt(patches.shape[1])
    return move(patches.mT.unflatten(2, (side, side)), shift).flatten(2).mT


def inside_after(shift: Int[Tensor, "B 2"], num_patches: int) -> Bool[Tensor, "B N"]:
    """Positions of a square grid that a move keeps inside."""
    side = math.isqrt(num_patches)
    moved = torch.arange(side, device=shift.device) + shift.unsqueeze(-1)  # (B, 2, side)
    rows, columns = ((moved >= 0) & (moved < side)).unbind(dim=1)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1)


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise ValueError for a share that cannot be hidden."""
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise ValueError(f"a mask ratio is the hidden share, at least 0 and below 1; got {ratio}.")


def drop_unused_masks(masks: Masks, teachers: Sequence[Teacher]) -> Masks:
    """Lift the masks of teachers that compute on whole images in any case."""
    pairs = zip(teachers, masks.teachers, strict=True)
    return masks._replace(teachers=tuple(v if teacher.backbone.supports_masking else None for teacher, v in pairs))
