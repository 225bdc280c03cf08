"""The method on one screen: mask, encode, align, fuse, compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from comad.distill.config import Method
from comad.distill.health import Evidence, health_metrics
from comad.distill.masking import Masks
from comad.distill.teaching import Targets
from comad.models.backbone import scatter_patches
from comad.models.decoder import MaskedDecoder
from comad.models.timm_backbone import TimmBackbone
from comad.runtime.train import Step


class Distiller(nn.Module):
    """Student, decoder and aligners: exactly what training changes. Teachers stay outside.

    Args:
        student: the network to train.
        method: the five slots.
        teacher_widths: E of each teacher.
        teachers_with_cls: whether each teacher's class token carries meaning.
    """

    def __init__(
        self, student: TimmBackbone, method: Method, teacher_widths: Sequence[int], teachers_with_cls: Sequence[bool]
    ):
        super().__init__()
        self.method = method
        self.student = student
        self.aligners = method.aligner.build(teacher_widths, student.width)
        masked = method.masking.policy != "none"
        decoder = method.decoder_width, method.decoder_depth, method.decoder_heads
        active = {name: term for name, term in method.terms.items() if term.weight}
        fills = masked and method.masking.hidden == "drop" and any(t.where != "visible" for t in active.values())
        self.decoder = MaskedDecoder(student.width, student.grid, student.width, *decoder) if fills else None
        self.mask_token = (
            nn.Parameter(torch.zeros(student.width)) if masked and method.masking.hidden == "token" else None
        )
        self.projections = nn.ModuleDict(
            {name: _projection(student.width) for name, term in active.items() if term.projection}
        )
        self.teachers_with_cls = tuple(teachers_with_cls)

    def forward(self, images: Float[Tensor, "B 3 H W"], targets: Targets) -> Step:
        """One step of arXiv:2508.04816: encode the student's view, align and fuse the teachers, compare."""
        cls, patches = self.encode(images, targets.masks)
        student = torch.cat([cls.unsqueeze(1), patches], dim=1).float()  # (B, 1 + N, D)
        aligned, valid = self.align(targets)  # (M, B, 1 + N, D), (M, B, 1 + N)
        fused = self.method.fusion(student, aligned, valid)
        visible = targets.masks.student_sees(len(patches), patches.shape[1], patches.device)
        anywhere = valid.any(dim=0)
        loss, parts, compared = student.new_zeros(()), {}, fused.target
        for name, term in self.method.terms.items():
            if term.weight:
                project = self.projections[name] if term.projection else nn.Identity()
                compared = project(fused.target)
                value = term(project(student), compared, term.positions(visible, anywhere[:, 1:], anywhere[:, :1]))
                parts[name] = value.detach()
                loss = loss + term.weight * value
        evidence = Evidence.take(student[:, 1:], compared[:, 1:], fused.weights, anywhere[:, 1:])
        return Step(loss, lambda: parts | health_metrics(evidence))

    def encode(
        self, images: Float[Tensor, "B 3 H W"], masks: Masks
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B N D"]]:
        """Class token and the whole map: where patches were dropped the decoder fills them in."""
        masking = self.method.masking
        cls, patches = self.student(images, masks.student, masking.hidden, self.mask_token)
        if masking.hidden != "drop" or masks.student is None:
            return cls, patches
        whole = scatter_patches(patches, masks.student, self.student.num_patches)
        if self.decoder is None:  # no term looks at hidden patches
            return cls, whole
        filled = self.decoder(cls, patches, masks.student)
        seen = masks.student_sees(len(images), filled.shape[1], images.device).unsqueeze(-1)
        return cls, torch.where(seen, whole.to(filled.dtype), filled)

    def align(self, targets: Targets) -> tuple[Float[Tensor, "M B N1 D"], Bool[Tensor, "M B N1"]]:
        """Teacher tokens at the student's width and at their positions, and which of them are to be believed."""
        aligned, valid = [], []
        seen = targets.masks.teachers_see(len(targets.tokens[0].patches), self.student.num_patches, self.device)
        for m, (cls, patches) in enumerate(targets.tokens):
            visible, with_cls = targets.masks.teachers[m], self.teachers_with_cls[m]
            tokens = self.aligners(patches, m)
            if visible is not None and tokens.shape[1] < self.student.num_patches:
                tokens = scatter_patches(tokens, visible, self.student.num_patches)
            first = torch.zeros_like(tokens[:, :1])
            if with_cls and cls is not None:
                first = self.aligners(cls.unsqueeze(1), m)
            aligned.append(torch.cat([first, tokens], dim=1))
            valid.append(torch.cat([torch.full_like(seen[m][:, :1], with_cls), seen[m]], dim=1))
        return torch.stack(aligned).float(), torch.stack(valid)

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.pixel_mean.device


def _projection(width: int) -> nn.Module:
    """φ or ψ as a small MLP (arXiv:2508.04816, "Fusion and Distillation Losses")."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
