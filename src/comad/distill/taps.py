"""Where networks are read, and what the student gives there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from comad.models.backbone import Tokens


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where teachers and student are read. A depth is a share of a network's blocks; 1: all, and the final norm.

    Args:
        teacher, student: depth of the tokens that are compared.
        qkv: depth of the block, in both, whose queries, keys and values are compared, if a term does.
        decoder: compare with the tokens of a teacher's MAE decoder, all positions, at depth ``teacher`` of it.
        pooled: the mean of the patches takes the place of the class token.
    """

    teacher: float = 1.0
    student: float = 1.0
    qkv: float = 1.0
    decoder: bool = False
    pooled: bool = False

    def __post_init__(self) -> None:
        for depth in (self.teacher, self.student, self.qkv):
            if not 0 < depth <= 1:
                raise ValueError(f"a depth is a share of the blocks, above 0 and at most 1; got {depth}.")


def block_at(depth: float, num_blocks: int) -> int:
    """Number of the block at a depth, from 1."""
    return max(1, round(depth * num_blocks))


class Reads(NamedTuple):
    """What a pass through the teachers has to give.

    Attributes:
        tap: where.
        qkv: of how many of the teachers queries, keys and values are wanted; -1: of all.
    """

    tap: Tap = Tap()
    qkv: int = 0


LAST = Reads()
"""Tokens after the last block, and nothing else."""


class Encoded(NamedTuple):
    """The student at every position, the class token first; 0 where a patch was dropped and nothing fills it in.

    Attributes:
        last: after the last block and the final norm.
        tapped: at the depth of the tap, hidden patches filled in by the decoder if there is one.
        rungs: after the blocks that a ladder stands on, from below.
        qkv: queries, keys and values, width 3D.
        pixels: what the painter paints, and the image's own patches, each normalised; None if nothing is hidden.
    """

    last: Float[Tensor, "B N1 D"]
    tapped: Float[Tensor, "B N1 D"]
    rungs: tuple[Float[Tensor, "B N1 D"], ...]
    qkv: Tokens | None
    pixels: tuple[Float[Tensor, "B N1 P"], Float[Tensor, "B N1 P"]] | None
