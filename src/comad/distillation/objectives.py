"""Slot `objective`: what is compared, and by which distance. Yours: subclass `Objective`, give it `pairs`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.features import StudentOutput, TeacherOutput
from comad.distillation.fusion import Pair
from comad.distillation.hog import CHANNELS, hog_patches
from comad.distillation.relations import (
    Dispersion,
    Queue,
    angle,
    attention_logits,
    mean_of_maps,
    relative_distances,
    token_logits,
    with_class_token,
)
from comad.models.backbone import normalise_patches
from comad.runtime.processes import count, own_rows, rows_of_all, sum_of_all
from comad.runtime.slots import Slot
from comad.runtime.spelling import hint

Teachers = Literal["all", "first", "rest"]
"""The teachers that an objective uses."""
Pairs = Sequence[Pair]
Seen = Bool[Tensor, "B N"]
Compared = tuple[list[Pair], Bool[Tensor, "B n"]]
"""The pairs that an objective compares, and the positions at which it does."""


class Shapes(NamedTuple):
    """What objectives are built for.

    Attributes:
        student: channels of the student's tokens.
        compared: channels of what is compared, one entry per pair.
        num_heads: of the student's attention.
        patch_size: of the student.
    """

    student: int
    compared: tuple[int, ...]
    num_heads: int
    patch_size: int


@dataclass(frozen=True, kw_only=True)
class Objective(Slot, slot="objective", default="feature"):
    """One term of the loss: ``weight`` times the mean distance over the positions that it compares.

    Attributes:
        needs: what it reads: ``tokens`` (fused pairs of tokens), ``qkv`` or ``pixels``.

    Args:
        teachers: the teachers that this loss uses: ``all``, the ``first``, or the ``rest``.
        weight: factor of the term; 0 leaves it out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    teachers: Teachers = "all"
    weight: float = 1.0

    def subset(self, num_teachers: int) -> range:
        """Numbers of the teachers that it uses."""
        first, last = {"all": (0, num_teachers), "first": (0, 1), "rest": (1, num_teachers)}[self.teachers]
        return range(first, last)

    @property
    def uses_cls(self) -> bool:
        """Whether class tokens are compared."""
        return False

    @property
    def distance_key(self) -> Hashable:
        """Objectives with the same key differ in positions alone and share their distances; None: it has its own."""
        return None

    def build(self, shapes: Shapes) -> nn.Module:
        """What it trains or keeps between steps; a part of the checkpoint."""
        return nn.Module()

    @abstractmethod
    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """What is compared, and where.

        Args:
            state: what `build` made.
            pairs: tokens of student and teachers, aligned and fused; class token first.
            student: everything that is read of the student.
            teachers: everything that is read of the teachers that it uses.
            visible: the patches that the student sees.
        """

    @abstractmethod
    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """The distance at every position."""


def mean_over(
    distances: Float[Tensor, "P B n"], pairs: Sequence[Pair], positions: Bool[Tensor, "B n"], own: bool = False
) -> Float[Tensor, "P B"]:
    """Weighted mean over the positions that count, split into what each pair and each image adds to it.

    With ``own`` of each pair over those where it has a target. In a training step the positions of all processes are
    counted, so that the mean over the processes is that of the whole batch.
    """
    weights = torch.stack([pair.weight for pair in pairs])
    counted = positions.sum()
    if own:
        counted = torch.stack([(pair.valid & positions).sum() for pair in pairs]).unsqueeze(1)
    return (distances * (weights * positions)).sum(dim=2) / (sum_of_all(counted).clamp(min=1) / count())


@dataclass(frozen=True, kw_only=True)
class TokenObjective(Objective):
    """Compares tokens.

    Args:
        where: ``visible``: patches that the student sees; ``hidden``: the others; ``all``: the whole map; ``cls``: no
            patch. Positions that no teacher saw never count.
        cls: the class token counts as one more position.
    """

    where: Literal["visible", "hidden", "all", "cls"] = "visible"
    cls: bool = True

    @property
    def uses_cls(self) -> bool:
        """See `Objective`."""
        return self.cls

    def positions(self, pairs: Sequence[Pair], visible: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N1"]:
        """Which tokens count: column 0 is the class token, then the patches."""
        valid = torch.stack([pair.valid for pair in pairs]).any(dim=0)
        cls, patches = valid[:, :1], valid[:, 1:]
        shown = {"visible": visible, "hidden": ~visible, "all": patches, "cls": torch.zeros_like(patches)}[self.where]
        return torch.cat([cls & self.cls, patches & shown], dim=1)


@dataclass(frozen=True, kw_only=True)
class FeatureLoss(TokenObjective, name="feature"):
    """Distance between tokens (arXiv:2508.04816, L_token and L_spatial).

    Args:
        distance: ``kl-student-teacher`` is KL(student‖teacher), the printed order; ``kl-teacher-student`` the usual;
            ``mse``, ``smooth-l1``, ``l1``, ``cosine``.
        temperature: of the softmax over channels; of ``smooth-l1`` its β.
        projection: pass both sides through a small trained MLP first, as the paper's φ and ψ may be; it collapses.
    """

    distance: str = "kl-teacher-student"
    temperature: float = 1.0
    projection: bool = False

    def __post_init__(self) -> None:
        check_distance(self.distance)

    @property
    def distance_key(self) -> Hashable:
        """See `Objective`."""
        return None if self.projection else (type(self), self.teachers, self.distance, self.temperature)

    def build(self, shapes: Shapes) -> nn.Module:
        """φ or ψ as a small MLP (arXiv:2508.04816, "Fusion and Distillation Losses"), if asked for."""
        if not self.projection:
            return nn.Identity()
        return nn.Sequential(
            nn.Linear(shapes.student, shapes.student), nn.GELU(), nn.Linear(shapes.student, shapes.student)
        )

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Tokens, through the projection if there is one."""
        if self.projection:
            return [p._replace(prediction=state(p.prediction), target=state(p.target)) for p in pairs], self.positions(
                pairs, visible
            )
        return list(pairs), self.positions(pairs, visible)

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return DISTANCES[self.distance](pair.prediction.float(), pair.target.float(), self.temperature)


@dataclass(frozen=True, kw_only=True)
class RelationLoss(TokenObjective, name="relation"):
    """KL(teacher‖student) of each token's softmax of cosines to the other tokens of the image.

    Args:
        temperature: of that softmax.
        with_itself: the token's cosine to itself, which is always 1, takes part.
    """

    where: Literal["visible", "hidden", "all"] = "all"
    cls: bool = False
    temperature: float = 0.07
    with_itself: bool = False

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Rows of cosines."""
        positions = self.positions(pairs, visible)
        rows = partial(token_logits, counts=positions, with_itself=self.with_itself)
        return [p._replace(prediction=rows(p.prediction), target=rows(p.target)) for p in pairs], positions

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return kl_teacher_student(pair.prediction, pair.target, self.temperature)


@dataclass(frozen=True, kw_only=True)
class ClsObjective(Objective):
    """Compares class tokens, each pair by itself."""

    @property
    def uses_cls(self) -> bool:
        """See `Objective`."""
        return True

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Class tokens alone."""
        alone = [Pair(*(part[:, :1] for part in pair)) for pair in pairs]
        states = list(state.children()) or [None] * len(alone)
        found = [self.cls_pair(own, pair) for own, pair in zip(states, alone, strict=True)]
        return found, torch.stack([pair.valid for pair in found]).any(dim=0)

    @abstractmethod
    def cls_pair(self, state: Any, pair: Pair) -> Pair:
        """What is compared of a pair of class tokens; ``state`` is this pair's part of what `build` made."""


@dataclass(frozen=True, kw_only=True)
class QueueLoss(ClsObjective, name="queue"):
    """KL(teacher‖student) of the class token's softmax of cosines to the last targets, this batch's included.

    Args:
        size: targets that are kept.
        temperature: of that softmax.
    """

    size: int = 4096
    temperature: float = 0.07

    @property
    def of_a_pass(self) -> str:
        """See `Slot`."""
        return "newest targets in the queue"

    def build(self, shapes: Shapes) -> nn.Module:
        """A queue per pair."""
        return nn.ModuleList([Queue(self.size, width) for width in shapes.compared])

    def cls_pair(self, state: Any, pair: Pair) -> Pair:
        """Cosines of class tokens to the queue, in which the targets take the place of the oldest first."""
        if state.training:
            state.push(pair.target[:, 0])
        return pair._replace(prediction=state(pair.prediction), target=state(pair.target))

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return kl_teacher_student(pair.prediction, pair.target, self.temperature)


@dataclass(frozen=True, kw_only=True)
class AttentionLoss(Objective, name="attention"):
    """KL(teacher‖student) of rows of attention, mean over heads and teachers (TinyMIM, arXiv:2301.01296).

    Args:
        relation: softmax(QKᵀ/√d) or softmax(VVᵀ/√d).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"qkv"})
    relation: Literal["queries-keys", "values-values"] = "queries-keys"

    def build(self, shapes: Shapes) -> nn.Module:
        """Nothing is trained; the number of heads is kept."""
        state = nn.Module()
        state.num_heads = shapes.num_heads  # pyright: ignore[reportArgumentType]
        return state

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Logits of rows, before the softmax."""
        assert student.qkv is not None
        theirs = [output.qkv for output in teachers if output.qkv is not None]
        with_cls = student.qkv.cls is not None and all(part.cls is not None for part in theirs)
        sides = [part if with_cls else part._replace(cls=None) for part in (student.qkv, *theirs)]
        ours, *maps = (attention_logits(with_class_token(part), state.num_heads, self.relation) for part in sides)
        everywhere = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device)
        return [Pair(ours, mean_of_maps(maps), everywhere, everywhere)], everywhere

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return kl_teacher_student(pair.prediction, pair.target, 1.0).mean(dim=2)


@dataclass(frozen=True, kw_only=True)
class PixelLoss(Objective, name="pixels"):
    """Mean squared error of reconstructed hidden patches to the image's own (MAE, arXiv:2111.06377).

    Args:
        normalize: each patch by its own mean and variance; without it pixels are as the student's input.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    normalize: bool = True

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Pixels of all patches; the hidden ones count."""
        assert student.pixels is not None, "pixels are reconstructed where the student has a mask"
        reconstructed, own = student.pixels
        own = normalise_patches(own) if self.normalize else own
        return [Pair(reconstructed, own, ~visible, ~visible)], ~visible

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return mse(pair.prediction, pair.target, 1.0)


@dataclass(frozen=True, kw_only=True)
class HOGLoss(Objective, name="hog"):
    """Distance to histograms of the image's gradients (DMJD, arXiv:2301.00230); no teacher takes part.

    Args:
        where: ``hidden``: patches from the pixel decoder, through a linear map; ``visible``: the student's tokens,
            through an MLP of three layers and a linear map.
        distance: see `FeatureLoss`.
        temperature: of ``smooth-l1`` its β.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    where: Literal["hidden", "visible"] = "hidden"
    distance: str = "mse"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_distance(self.distance)

    def build(self, shapes: Shapes) -> nn.Module:
        """What predicts the histograms.

        Raises:
            ValueError: the patches are no whole number of cells.
        """
        if shapes.patch_size % 2:
            raise ValueError(f"a patch has 2 × 2 cells, and {shapes.patch_size} pixels are odd; take even patches.")
        if self.where == "hidden":
            return nn.Linear(3 * shapes.patch_size**2, CHANNELS)
        width = shapes.student
        layers = [[nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()] for _ in range(2)]
        last = nn.Linear(width, width), nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, CHANNELS)
        return nn.Sequential(*layers[0], *layers[1], *last)

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Histograms of the patches that count."""
        assert student.pixels is not None, "pixels are reconstructed where the student has a mask"
        reconstructed, own = student.pixels
        size, side = math.isqrt(own.shape[2] // 3), math.isqrt(own.shape[1])
        images = own.unflatten(2, (size, size, 3)).unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
        target = hog_patches(images.reshape(len(own), 3, side * size, side * size), size)
        hidden = self.where == "hidden"
        counts = ~visible if hidden else visible
        prediction = state(reconstructed if hidden else student.last[:, 1:])
        return [Pair(prediction, target, counts, counts)], counts

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return DISTANCES[self.distance](pair.prediction.float(), pair.target.float(), self.temperature)


@dataclass(frozen=True, kw_only=True)
class MapLoss(TokenObjective, name="map"):
    """1 - cosine of the whole maps: all tokens that count, side by side (Theia, arXiv:2407.20179)."""

    where: Literal["visible", "hidden", "all"] = "all"
    cls: bool = False

    def pairs(
        self, state: Any, pairs: Pairs, student: StudentOutput, teachers: Sequence[TeacherOutput], visible: Seen
    ) -> Compared:
        """Maps as one vector per image; a token with weight 0 is 0, and the map has the mean weight of its tokens."""
        positions = self.positions(pairs, visible)
        found = []
        for prediction, target, valid, weight in pairs:
            counts = (positions & (weight > 0)).unsqueeze(-1)
            ours, theirs = ((x * counts).flatten(1).unsqueeze(1) for x in (prediction, target))
            mean = (weight * counts[..., 0]).sum(dim=1, keepdim=True) / counts.sum(dim=1).clamp(min=1)
            found.append(Pair(ours, theirs, (valid & positions).any(dim=1, keepdim=True), mean))
        return found, positions.any(dim=1, keepdim=True)

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return cosine(pair.prediction, pair.target, 1.0)


@dataclass(frozen=True, kw_only=True)
class AngleLoss(ClsObjective, name="angle"):
    """Squared angle of class tokens, over the mean one of the teacher's own to their mean direction (arXiv:2601.17237).

    Teachers whose class tokens point in much the same direction count no less than others.
    """

    @property
    def of_a_pass(self) -> str:
        """See `Slot`."""
        return "means of the teachers' directions so far"

    def build(self, shapes: Shapes) -> nn.Module:
        """Statistics per pair."""
        return nn.ModuleList([Dispersion(width) for width in shapes.compared])

    def cls_pair(self, state: Any, pair: Pair) -> Pair:
        """Class tokens, weighed by their teacher's dispersion."""
        if state.training:
            state.follow(pair.target[:, 0])
        return pair._replace(weight=pair.weight / state.angle)

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`."""
        return angle(pair.prediction, pair.target).square()


@dataclass(frozen=True, kw_only=True)
class DistanceLoss(ClsObjective, name="distances"):
    """Asymmetric relations of the images of a batch (SigLino, arXiv:2512.20157): smooth L1 of class tokens' distances.

    Images nearer in the teacher than the median are drawn together where the student has them further apart, the others
    are pushed apart where it has them nearer. Distances are shares of their mean.
    """

    @property
    def of_a_pass(self) -> str:
        """See `Slot`."""
        return "images that distances are taken between"

    def cls_pair(self, state: Any, pair: Pair) -> Pair:
        """Distances between all images of the whole batch."""
        ours, theirs = (relative_distances(rows_of_all(side[:, 0])).unsqueeze(1) for side in pair[:2])
        return pair._replace(prediction=ours, target=theirs)

    def distance_of(self, pair: Pair) -> Float[Tensor, "B n"]:
        """See `Objective`; mean over the other images."""
        ours, theirs = pair.prediction, pair.target
        others = ~torch.eye(len(ours), dtype=torch.bool, device=ours.device).unsqueeze(1)
        near = theirs < theirs[others].median() if len(ours) > 1 else others
        error = torch.where(near, ours - theirs, theirs - ours).clamp(min=0) * others
        distances = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none").sum(dim=2)
        return own_rows(distances) / max(1, len(ours) - 1)


def check_distance(name: str) -> None:
    """Raise ValueError if there is no such distance."""
    if name not in DISTANCES:
        raise ValueError(f"no distance {name!r}; {hint(name, DISTANCES)}")


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
"""Distance → function of (student, target, temperature)."""
