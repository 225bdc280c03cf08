"""A method of distillation: a value that fills six slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from comad.distillation.aligners import Aligner, ProcrustesAligner, StudentProjector
from comad.distillation.features import Blocks, FeatureSpec, MAEDecoder
from comad.distillation.fusion import Consensus, Fusion, Gate
from comad.distillation.masking import HidingPatches, Masking, Superset, WholeImages
from comad.distillation.normalizers import NoNormalizer, Normalizer
from comad.distillation.objectives import FeatureLoss, Objective, TokenObjective
from comad.models.backbone import Backbone
from comad.models.mae_decoder import load_decoder
from comad.models.teachers import Teacher
from comad.models.timm_backbone import TimmBackbone
from comad.runtime.slots import Slot


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of distillation; the default is CoMAD (arXiv:2508.04816) with targets that cannot collapse.

    Args:
        masking: which patches student and teachers see.
        features: where teachers and student are read.
        normalizer: what is done to the teachers' tokens first.
        aligner: how teacher tokens and student tokens come to one width.
        fusion: how teachers become one target, or their losses one loss.
        objectives: name → what is compared by which distance; the loss is their weighted sum.
        single_teacher: it is made for one teacher.
    """

    masking: Masking = field(default_factory=Superset)
    features: FeatureSpec = field(default_factory=Blocks)
    normalizer: Normalizer = field(default_factory=NoNormalizer)
    aligner: Aligner = field(default_factory=ProcrustesAligner)
    fusion: Fusion = field(default_factory=Gate)
    objectives: Mapping[str, Objective] = field(
        default_factory=lambda: {
            "token": FeatureLoss(where="visible", temperature=10.0),
            "spatial": FeatureLoss(where="all", cls=False, temperature=10.0),
        }
    )
    single_teacher: bool = False

    def __post_init__(self) -> None:
        terms, hides = self.active.values(), isinstance(self.masking, HidingPatches)
        if not terms:
            raise ValueError("no objective has a weight, so nothing would be trained; give one a weight.")
        if self.needs("qkv") and hides:
            raise ValueError("attention is compared on whole images; set --masking none.")
        if self.needs("qkv") and (getattr(self.masking, "shift", 0.0) or getattr(self.masking, "scales", None)):
            raise ValueError("attention is compared patch by patch; set --masking.shift 0 and leave out its scales.")
        if self.needs("pixels") and not (hides and self.masking.modes[0] == "drop"):
            raise ValueError(
                "pixels are reconstructed of hidden patches, from what the student sees alone; set --masking shared "
                "and --masking.hidden drop."
            )
        if not hides and any(isinstance(term, TokenObjective) and term.where == "hidden" for term in terms):
            raise ValueError(
                "no patch is hidden, so an objective over hidden ones trains nothing; set --masking shared."
            )
        if isinstance(self.fusion, Consensus) and any(getattr(term, "teachers", "all") != "all" for term in terms):
            raise ValueError("a consensus is one of all teachers; set --fusion sum where objectives have their own.")
        if self.features.every_position and self.masking.modes[1] != "drop":
            raise ValueError("a decoder fills in what was left out; set --masking.teacher-hidden drop.")

    @property
    def active(self) -> dict[str, Objective]:
        """The objectives that have weight."""
        return {name: objective for name, objective in self.objectives.items() if objective.weight}

    @property
    def parts(self) -> tuple[Slot, ...]:
        """What fills the slots, the active objectives one by one."""
        slots = (self.masking, self.features, self.normalizer, self.aligner, self.fusion)
        return (*slots, *self.active.values())

    def needs(self, what: str) -> bool:
        """Whether an objective reads ``tokens``, ``qkv`` or ``pixels``."""
        return any(what in objective.needs for objective in self.active.values())

    def teacher_needs(self, teacher: int, num_teachers: int) -> frozenset[str]:
        """What objectives compare of a teacher: ``tokens``, ``qkv``, both or nothing."""
        using = [term.needs for term in self.active.values() if teacher in term.subset(num_teachers)]
        return frozenset().union(*using) & {"tokens", "qkv"}

    @property
    def num_calibration_images(self) -> int:
        """Images that must be calibrated on before training; 0: none."""
        return max(part.num_calibration_images for part in (self.normalizer, self.aligner, self.fusion))

    def for_student(self, student: Backbone) -> Method:
        """The method as a student can follow it: one that cannot leave out patches sees whole images.

        Raises:
            ValueError: an objective is about hidden patches, or a decoder fills them in.
        """
        masking = self.masking
        if student.supports_masking or not isinstance(masking, HidingPatches) or masking.hidden == "zero":
            return self
        hidden = any(isinstance(term, TokenObjective) and term.where == "hidden" for term in self.active.values())
        if hidden or self.needs("pixels") or self.features.every_position or masking.hidden == "token":
            raise ValueError(
                "this preset learns from patches that are left out of the student, which this student cannot do; name "
                "a plain Vision Transformer such as vit_tiny_patch16_224, or another preset such as comad or radio."
            )
        return replace(self, masking=WholeImages(mixup=masking.mixup))

    def check(self, student: Backbone, teachers: Sequence[Teacher]) -> None:
        """Make sure that the method fits a student and its teachers.

        Raises:
            ValueError: it does not; the message says what would.
        """
        names = ", ".join(teacher.name for teacher in teachers)
        if self.single_teacher and len(teachers) > 1:
            raise ValueError(f"this preset distils one teacher and got {names}; pass one with --teachers.")
        if any(not term.subset(len(teachers)) for term in self.active.values()):
            raise ValueError(
                f"this preset needs a masked-image teacher and then others, and got {names}; pass two or more "
                "--teachers."
            )
        if not student.has_cls and not self.features.pooled:
            raise ValueError("this student has no class token; name another, or set --features.pooled.")
        widths = sorted({self.features.width(teacher.backbone) for teacher in teachers})
        if isinstance(self.aligner, StudentProjector) and self.fusion.one_target and len(widths) > 1:
            raise ValueError(
                f"teachers of widths {', '.join(map(str, widths))} have no mean; name teachers of one width, or take a "
                "preset that adds up losses, such as radio."
            )
        self._check_blocks(student, teachers)

    def _check_blocks(self, student: Backbone, teachers: Sequence[Teacher]) -> None:
        """Reading inside a network needs a plain Vision Transformer; attention is compared head by head."""
        heads = set()
        if not student.blocks and (self.needs("qkv") or self.features.student_depth < 1):
            raise ValueError(
                "this preset reads blocks of the student, which must be a plain Vision Transformer; name one such as "
                "vit_tiny_patch16_224, or another preset such as comad or radio."
            )
        for number, teacher in enumerate(teachers):
            needs = self.teacher_needs(number, len(teachers))
            inside = "qkv" in needs or (isinstance(self.features, Blocks) and self.features.teacher < 1)
            if inside and not teacher.backbone.blocks:
                raise ValueError(
                    f"{teacher.name}: this preset reads the blocks of a plain Vision Transformer, and this is none; "
                    "name another teacher or preset."
                )
            if "qkv" in needs:
                heads.add(num_heads(teacher.backbone))
        if len(heads) > 1:
            raise ValueError(
                f"teachers of {', '.join(map(str, sorted(heads)))} heads have no mean of attention; name teachers of "
                "as many heads."
            )
        for count in heads:
            if student.width % count:
                fit = max(1, round(student.width / count)) * count
                raise ValueError(
                    f"attention is compared head by head, and a student of width {student.width} cannot have the "
                    f"teacher's {count} heads; set --student.width {fit}."
                )

    def compared_heads(self, teachers: Sequence[Teacher]) -> int:
        """Heads of the teachers whose attention is compared, which the student takes over; 0: none is."""
        compared = [t for m, t in enumerate(teachers) if "qkv" in self.teacher_needs(m, len(teachers))]
        return num_heads(compared[0].backbone) if compared else 0


def num_heads(backbone: Any) -> int:
    """Attention heads of a plain Vision Transformer; 0 of another network."""
    return backbone.blocks[0].attn.num_heads if backbone.blocks else 0


def load_decoders(method: Method, specs: Sequence[str], teachers: Sequence[Teacher], dtype: torch.dtype) -> None:
    """Put the decoders that teachers were trained with beside them, if the method reads them.

    Raises:
        ValueError: a teacher has none.
    """
    if not isinstance(method.features, MAEDecoder):
        return
    for spec, teacher in zip(specs, teachers, strict=True):
        decoder, backbone = load_decoder(spec, teacher.backbone.grid), teacher.backbone
        if not isinstance(backbone, TimmBackbone) or decoder.embed.in_features != backbone.width:
            raise ValueError(f"{spec}: its decoder is of another width than its encoder; use an unmodified folder.")
        backbone.decoder = decoder.to(backbone.pixel_mean.device, dtype)
