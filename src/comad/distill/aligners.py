"""How teacher and student tokens come to one width. Add one: a frozen config with `build`, its name in `Aligner`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distill.heads import Student
from comad.distill.taps import Encoded


class TeacherSide(nn.Module):
    """Maps from each teacher to the student's width; the student is compared as it is.

    Attributes:
        widths: channels of what is compared, one entry per teacher.
    """

    num_rungs = 1

    def __init__(self, teacher_widths: Sequence[int], width: int):
        super().__init__()
        self.width = width
        self.widths = (width,) * len(teacher_widths)

    def predict(self, student: Encoded, teacher: int) -> Float[Tensor, "B N1 D"]:
        """The student's own tokens."""
        return student.tapped

    def own_loss(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, ""] | None:
        """A loss of the map's own, beside the terms; None: it has none."""
        return None

    def calibrate(self, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """Fit to tokens of the same positions, one tensor per teacher; here nothing to fit."""


class FrozenAligners(TeacherSide):
    """One fixed affine map per teacher, E → D, then LayerNorm without affine: fitted once, never trained.

    Training such a map on the target's side lets a constant target win; a map of fixed numbers cannot collapse.
    """

    def __init__(self, teacher_widths: Sequence[int], width: int):
        super().__init__(teacher_widths, width)
        for m, teacher_width in enumerate(teacher_widths):
            self.register_buffer(f"weight_{m}", torch.zeros(width, teacher_width))
            self.register_buffer(f"bias_{m}", torch.zeros(width))

    def forward(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """Map the tokens of one teacher."""
        weight, bias = getattr(self, f"weight_{teacher}"), getattr(self, f"bias_{teacher}")
        mapped = F.linear(tokens.to(weight.dtype), weight, bias)
        return F.layer_norm(mapped, mapped.shape[-1:])

    @torch.no_grad()
    def calibrate(self, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """Fit the maps on tokens of the same positions, one tensor per teacher.

        Per teacher: centre, the D directions of largest variance (PCA), the rotation that brings them closest to the
        mean of the teachers (orthogonal Procrustes, generalised by alternation), one scale so that channels have
        variance 1 on average. Cosines between teachers then mean something.
        """
        parts = [_principal(part.double(), self.width) for part in tokens]
        scores = [
            (part.double() - mean) @ basis * scale for part, (mean, basis, scale) in zip(tokens, parts, strict=True)
        ]
        rotations = common_rotations(scores)
        for m, ((mean, basis, scale), rotation) in enumerate(zip(parts, rotations, strict=True)):
            weight = (basis * scale @ rotation).T
            getattr(self, f"weight_{m}").copy_(weight)
            getattr(self, f"bias_{m}").copy_(-weight @ mean)


class AnchoredAligners(TeacherSide):
    """LN0(W z + b), W trained by its own linear auto-encoding loss alone: the targets follow the data, not the student.

    Started from the maps that `FrozenAligners.calibrate` fits, if calibrated.
    """

    def __init__(self, teacher_widths: Sequence[int], width: int):
        super().__init__(teacher_widths, width)
        self.encode = nn.ModuleList([nn.Linear(teacher_width, width) for teacher_width in teacher_widths])
        self.decode = nn.ModuleList([nn.Linear(width, teacher_width) for teacher_width in teacher_widths])

    def forward(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """Map the tokens of one teacher; no gradient comes back through them."""
        mapped = self.encode[teacher](tokens.float()).float()
        return F.layer_norm(mapped, mapped.shape[-1:]).detach()

    def own_loss(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, ""]:
        """Squared error of decode(encode(z)), as a share of the variance of z."""
        x = tokens.detach().float()
        error = (self.decode[teacher](self.encode[teacher](x)).float() - x).square().mean()
        return error / x.flatten(0, -2).var(dim=0, unbiased=False).mean().clamp(min=1e-12)

    @torch.no_grad()
    def calibrate(self, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """Start from the calibrated maps and their pseudo-inverses."""
        fitted = FrozenAligners([part.shape[1] for part in tokens], self.width)
        fitted.calibrate([part.cpu() for part in tokens])
        for m, (encode, decode) in enumerate(zip(self.encode, self.decode, strict=True)):
            assert isinstance(encode, nn.Linear) and isinstance(decode, nn.Linear)
            weight, bias = getattr(fitted, f"weight_{m}"), getattr(fitted, f"bias_{m}")
            back = torch.linalg.pinv(weight.double()).float()
            for value, fit in ((encode.weight, weight), (encode.bias, bias), (decode.weight, back)):
                value.copy_(fit)
            decode.bias.copy_(-back @ bias)


class TrainedAligners(TeacherSide):
    """ẑ = LN(W z + b), W, b and the norm trained with the student (arXiv:2508.04816, "Adapter Projection")."""

    def __init__(self, teacher_widths: Sequence[int], width: int):
        super().__init__(teacher_widths, width)
        self.linear = nn.ModuleList([nn.Linear(teacher_width, width) for teacher_width in teacher_widths])
        self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in teacher_widths])

    def forward(self, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """Map the tokens of one teacher."""
        return self.norm[teacher](self.linear[teacher](tokens.float()))


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """Calibrated once on the run's own images, then fixed. The default.

    Args:
        calibration_images: images whose tokens the maps are fitted on.
    """

    kind: Literal["frozen"] = "frozen"
    calibration_images: int = 512

    def build(
        self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool] = (), shared: bool = True
    ) -> FrozenAligners:
        """Uncalibrated maps; call ``calibrate`` before training."""
        return FrozenAligners(teacher_widths, width)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Trained on the teachers' side by an auto-encoding loss of its own; the terms cannot move it.

    Args:
        calibration_images: images that the maps are fitted on before; 0 starts them at random.
    """

    kind: Literal["anchor"] = "anchor"
    calibration_images: int = 512

    def build(
        self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool] = (), shared: bool = True
    ) -> AnchoredAligners:
        """Randomly initialised maps; ``calibrate`` gives them a start."""
        return AnchoredAligners(teacher_widths, width)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained on the side of the target, as the paper prints it. It collapses; for study."""

    kind: Literal["trained"] = "trained"
    calibration_images: int = 0

    def build(
        self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool] = (), shared: bool = True
    ) -> TrainedAligners:
        """Randomly initialised maps."""
        return TrainedAligners(teacher_widths, width)


Aligner = Frozen | Anchor | Trained | Student


def _principal(tokens: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the ``width`` directions of largest variance, and the scale that makes their mean variance 1.

    A teacher narrower than the student keeps all its directions; the missing ones are 0.
    """
    mean = tokens.mean(dim=0)
    covariance = (tokens - mean).T @ (tokens - mean) / len(tokens)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    kept = min(width, tokens.shape[1])
    basis = torch.zeros(tokens.shape[1], width, dtype=tokens.dtype, device=tokens.device)
    basis[:, :kept] = vectors.flip(1)[:, :kept]
    return mean, basis, values.flip(0)[:kept].mean().clamp(min=1e-12).rsqrt()


def common_rotations(scores: Sequence[Float[Tensor, "n D"]], rounds: int = 5) -> list[Float[Tensor, "D D"]]:
    """Orthogonal matrices R_m that bring all scores_m R_m close to their mean (generalised Procrustes, Gower 1975)."""
    rotations = [torch.eye(scores[0].shape[1], dtype=scores[0].dtype, device=scores[0].device) for _ in scores]
    mean = scores[0]
    for _ in range(rounds):
        for m, part in enumerate(scores):
            left, _, right = torch.linalg.svd(part.T @ mean)
            rotations[m] = left @ right
        mean = torch.stack([part @ rotation for part, rotation in zip(scores, rotations, strict=True)]).mean(dim=0)
    return rotations
