"""Slot `features`: where teachers and student are read. Yours: subclass `FeatureSpec`, give it `read`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from comad.distillation.masking import Visible
from comad.models.backbone import Backbone, Hidden, Tokens, map_tokens
from comad.models.timm_backbone import TimmBackbone
from comad.runtime.slots import Slot

TeacherOutput = Tokens
"""What one teacher gives for a batch: its tokens where it is read, of the patches it saw; its ``qkv`` if asked."""


class StudentOutput(NamedTuple):
    """The student at every position, the class token first; 0 where a patch was dropped and nothing fills it in.

    Attributes:
        last: after the last block and the final norm.
        compared: at the depth where it is read, hidden patches filled in by the decoder if there is one.
        intermediates: after the blocks that a multi-layer projector reads, from shallow to deep.
        qkv: queries, keys and values, width 3D.
        pixels: what the pixel decoder reconstructs, and the image's own patches, each normalised; None if nothing is
            hidden.
    """

    last: Float[Tensor, "B N1 D"]
    compared: Float[Tensor, "B N1 D"]
    intermediates: tuple[Float[Tensor, "B N1 D"], ...]
    qkv: Tokens | None
    pixels: tuple[Float[Tensor, "B N1 P"], Float[Tensor, "B N1 P"]] | None


@dataclass(frozen=True, kw_only=True)
class FeatureSpec(Slot, slot="features", default="blocks"):
    """What is read of the networks.

    Args:
        pooled: the mean of the patches takes the place of the class token, in teachers and student.
        untrained_cls: class tokens that were not trained count too, such as MAE's.
    """

    pooled: bool = False
    untrained_cls: bool = False

    @property
    def student_depth(self) -> float:
        """Depth at which the student is compared: a share of its blocks; 1: all, and the final norm."""
        return 1.0

    @property
    def student_norm(self) -> bool:
        """Whether the student's final norm stands before the comparison, at depth 1."""
        return True

    @property
    def qkv_depth(self) -> float:
        """Depth of the block, in student and teachers, whose queries, keys and values are compared."""
        return 1.0

    @property
    def every_position(self) -> bool:
        """Whether a teacher speaks of positions that it did not see."""
        return False

    def width(self, backbone: Backbone) -> int:
        """Channels of a teacher's tokens where it is read."""
        return backbone.width

    def has_cls(self, backbone: Backbone) -> bool:
        """Whether there is a token in the place of the class token that carries meaning."""
        return self.pooled or "cls" in backbone.token_types or (self.untrained_cls and backbone.has_cls)

    @abstractmethod
    def read(
        self,
        backbone: Backbone,
        images: Float[Tensor, "B 3 H W"],
        visible: Visible,
        hidden: Hidden,
        needs: frozenset[str],
    ) -> TeacherOutput:
        """Run a teacher's backbone and give its tokens.

        Args:
            backbone: the frozen network.
            images: at its own size, values in [0, 1].
            visible: the patches that it may see; None: all.
            hidden: what becomes of the others.
            needs: ``tokens``, ``qkv`` or both: what objectives compare of this teacher.
        """


@dataclass(frozen=True, kw_only=True)
class Blocks(FeatureSpec, name="blocks"):
    """Tokens after a block. A depth is a share of a network's blocks; 1: all, and the final norm.

    A teacher's blocks behind the last one that is read are not computed.

    Args:
        teacher: depth of a teacher's tokens.
        student: depth of the student's tokens.
        qkv: depth of the block, in both, whose queries, keys and values are compared, if an objective does.
        final_norm: the student's final norm stands before the comparison; without it the norm is not trained.
    """

    teacher: float = 1.0
    student: float = 1.0
    qkv: float = 1.0
    final_norm: bool = True

    def __post_init__(self) -> None:
        check_depths(self.teacher, self.student, self.qkv)

    @property
    def student_depth(self) -> float:
        """See `FeatureSpec`."""
        return self.student

    @property
    def student_norm(self) -> bool:
        """See `FeatureSpec`."""
        return self.final_norm

    @property
    def qkv_depth(self) -> float:
        """See `FeatureSpec`."""
        return self.qkv

    def read(
        self,
        backbone: Backbone,
        images: Float[Tensor, "B 3 H W"],
        visible: Visible,
        hidden: Hidden,
        needs: frozenset[str],
    ) -> TeacherOutput:
        """See `FeatureSpec.read`."""
        blocks = len(backbone.blocks)
        tokens_at = block_at(self.teacher, blocks) if "tokens" in needs and self.teacher < 1 else 0
        qkv_at = block_at(self.qkv, blocks) if "qkv" in needs else 0
        early = tokens_at > 0 or "tokens" not in needs
        output = backbone(
            images, visible, hidden, intermediates=[tokens_at] if tokens_at else [], qkv=qkv_at, stop_early=early
        )
        tokens = output.intermediates[0] if tokens_at else output
        return TeacherOutput(tokens.cls, tokens.patches, (), output.qkv)


@dataclass(frozen=True, kw_only=True)
class MAEDecoder(FeatureSpec, name="mae-decoder"):
    """Tokens of a MAE teacher's decoder, at every position.

    Args:
        depth: share of its blocks after which they are read, before any norm; 1: all, and the norm.
    """

    depth: float = 0.5

    def __post_init__(self) -> None:
        check_depths(self.depth)

    @property
    def every_position(self) -> bool:
        """See `FeatureSpec`."""
        return True

    def width(self, backbone: Backbone) -> int:
        """See `FeatureSpec`."""
        return self._decoder(backbone).embed.out_features

    def has_cls(self, backbone: Backbone) -> bool:
        """A decoder's class token was not trained by itself."""
        return self.pooled or self.untrained_cls

    def read(
        self,
        backbone: Backbone,
        images: Float[Tensor, "B 3 H W"],
        visible: Visible,
        hidden: Hidden,
        needs: frozenset[str],
    ) -> TeacherOutput:
        """See `FeatureSpec.read`."""
        tokens = backbone(images, visible, hidden)
        if visible is None:
            visible = torch.arange(backbone.num_patches, device=tokens.patches.device).expand(len(tokens.patches), -1)
        decoder = self._decoder(backbone)
        blocks = None if self.depth == 1 else block_at(self.depth, len(decoder.blocks))
        decoded = decoder.decode(tokens.cls, tokens.patches, visible, blocks)
        count = backbone.num_patches
        return TeacherOutput(decoded[:, 0] if decoded.shape[1] > count else None, decoded[:, -count:])

    @staticmethod
    def _decoder(backbone: Backbone) -> Any:
        decoder = cast(TimmBackbone, backbone).decoder
        assert decoder is not None, "load the teachers' decoders first"
        return decoder


@torch.no_grad()
def forward_teacher(
    features: FeatureSpec,
    backbone: Backbone,
    images: Float[Tensor, "B 3 H W"],
    visible: Visible = None,
    hidden: Hidden = "drop",
    needs: frozenset[str] = frozenset({"tokens"}),
) -> TeacherOutput:
    """Run one frozen teacher; images of another size than its own are resized. See `FeatureSpec.read`."""
    size = backbone.image_size
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return features.read(backbone, images, visible, hidden, needs)


def map_output(function: Callable[[Tensor], Tensor], output: TeacherOutput) -> TeacherOutput:
    """Apply a function to every tensor of an output."""
    return map_tokens(function, output)._replace(qkv=output.qkv and map_tokens(function, output.qkv))


def check_depths(*depths: float) -> None:
    """Raise ValueError for what is no share of the blocks."""
    for depth in depths:
        if not 0 < depth <= 1:
            raise ValueError(f"a depth is a share of the blocks, above 0 and at most 1; got {depth}.")


def block_at(depth: float, num_blocks: int) -> int:
    """Number of the block at a depth, from 1."""
    return max(1, round(depth * num_blocks))
