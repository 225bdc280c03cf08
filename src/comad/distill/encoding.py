"""The student's side of a method: its network, what fills in what it did not see, and where it is read."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from comad.distill.config import Method
from comad.distill.masking import Masks
from comad.distill.relations import with_class_token
from comad.distill.taps import Encoded, block_at
from comad.models.backbone import Tokens, normalised_patches, scatter_patches
from comad.models.decoder import MaskedDecoder
from comad.models.listening import listening
from comad.models.timm_backbone import TimmBackbone


class StudentSide(nn.Module):
    """Student, decoders and mask token.

    Args:
        student: the network to train. Parts that no term reaches are frozen, see `freeze_unread`.
        method: the five slots.
    """

    def __init__(self, student: TimmBackbone, method: Method):
        super().__init__()
        if student.vit.cls_token is None and not method.tap.pooled:
            raise ValueError("this student has no class token; name another, or set --method.tap.pooled.")
        self.method = method
        self.student = student
        depth, masking, terms = len(student.vit.blocks), method.masking, method.active.values()
        masked = masking.policy != "none"
        size = method.decoder_width, method.decoder_depth, method.decoder_heads
        hidden = any(term.over_tokens and term.where not in ("visible", "cls") for term in terms)
        fills = masked and masking.hidden == "drop" and (hidden or method.decoder_fills == "all")
        paints = any(term.over == "pixels" for term in terms)
        self.decoder = MaskedDecoder(student.width, student.grid, student.width, *size) if fills else None
        num_pixels = 3 * student.patch_size**2
        self.painter = MaskedDecoder(student.width, student.grid, num_pixels, *size) if paints else None
        token = masked and masking.hidden == "token"
        self.mask_token = nn.Parameter(torch.zeros(student.width)) if token else None
        self.tapped = block_at(method.tap.student, depth) if method.tap.student < 1 else 0
        self.rungs = [block_at(rung / method.num_rungs, depth) for rung in range(1, method.num_rungs)]
        self.qkv = block_at(method.tap.qkv, depth) if method.reads.qkv else 0
        freeze_unread(student, method, self.qkv)

    def encode(self, images: Float[Tensor, "B 3 H W"], masks: Masks) -> Encoded:
        """Read the student wherever the method does."""
        hidden, blocks = self.method.masking.hidden, {*self.rungs, *([self.tapped] if self.tapped else [])}
        with listening(self.student, sorted(blocks), self.qkv) as heard:
            tokens = self.student(images, masks.student, hidden, self.mask_token)
        tapped = self._rows(heard.blocks[self.tapped] if self.tapped else tokens, masks, fill=True)
        return Encoded(
            last=self._rows(tokens, masks) if self.tapped else tapped,
            tapped=tapped,
            rungs=tuple(self._rows(heard.blocks[number], masks) for number in self.rungs),
            qkv=heard.qkv,
            pixels=self._paint(images, tokens, masks),
        )

    def _rows(self, tokens: Tokens, masks: Masks, fill: bool = False) -> Float[Tensor, "B N1 D"]:
        """Class token, or the mean of the patches in its place, and the whole map; by ``fill`` with the decoder's."""
        cls, patches = tokens[:2]
        if self.method.tap.pooled:
            cls = patches.mean(dim=1)
        fill = fill and self.decoder is not None and (masks.student is not None or self.method.decoder_fills == "all")
        if fill:
            patches = self._filled(tokens, masks)
        elif self.method.masking.hidden == "drop" and masks.student is not None:
            nothing = patches.new_zeros(self.student.num_patches, patches.shape[2])
            patches = scatter_patches(patches, masks.student, nothing)
        assert cls is not None
        return torch.cat([cls.unsqueeze(1), patches], dim=1).float()

    def _filled(self, tokens: Tokens, masks: Masks) -> Float[Tensor, "B N D"]:
        """The map with the decoder's patches where the student saw nothing, or everywhere."""
        assert self.decoder is not None
        cls, patches = tokens[:2]
        visible = masks.student
        if visible is None:
            visible = torch.arange(self.student.num_patches, device=patches.device).expand(len(patches), -1)
        filled = self.decoder(cls, patches, visible)
        return filled if self.method.decoder_fills == "all" else scatter_patches(patches, visible, filled)

    def _paint(
        self, images: Float[Tensor, "B 3 H W"], tokens: Tokens, masks: Masks
    ) -> tuple[Float[Tensor, "B N1 pixels"], Float[Tensor, "B N1 pixels"]] | None:
        if self.painter is None or masks.student is None:
            return None
        painted = self.painter(tokens.cls, tokens.patches, masks.student).float()
        true = normalised_patches(images, self.student.patch_size)
        return with_class_token(Tokens(torch.zeros_like(painted[:, 0]), painted)), with_class_token(
            Tokens(torch.zeros_like(true[:, 0]), true)
        )


def freeze_unread(student: TimmBackbone, method: Method, qkv: int) -> None:
    """Freeze the blocks that no term reads, so that they let pass what comes from below unchanged.

    A loss on queries, keys and values alone (TinyMIM) leaves what follows them without gradient: the output projection
    and MLP of that block, and the final norm. Their last layers are set to 0: the exported student then gives the
    tokens that its last trained block does, and fine-tuning can train the block from there.
    """
    terms, blocks = method.active.values(), cast(Any, student.vit.blocks)
    at_tap = any(term.over_tokens for term in terms)
    if any(term.over == "pixels" for term in terms) or (at_tap and method.tap.student == 1):
        return
    read = block_at(method.tap.student, len(blocks)) if at_tap else 0
    for number, block in enumerate(blocks, start=1):
        if number > read and number >= qkv:
            rest = [block.attn.proj, block.norm2, block.mlp] if number == qkv else [block]
            for part in rest:
                part.requires_grad_(False)
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
    cast(nn.Module, student.vit.norm).requires_grad_(False)
