"""Slot `aligner`: how teacher and student tokens come to one width. Yours: subclass `Aligner`.

Projectors stand on the student's side and leave the targets fixed; adapters stand on the teachers' side.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from comad.distillation.features import StudentOutput
from comad.distillation.normalizers import fixed_linears
from comad.runtime.processes import mean_of_all
from comad.runtime.slots import Slot

Head = Literal["identity", "linear", "mlp", "multi-layer", "transformer", "conv"]


@dataclass(frozen=True, kw_only=True)
class Aligner(Slot, slot="aligner", default="procrustes"):
    """Maps teacher tokens and student tokens to what is compared; what it trains or fits is kept in ``state``."""

    @property
    def num_calibration_images(self) -> int:
        """Images that it must be fitted on before training; 0: none."""
        return 0

    @property
    def num_taps(self) -> int:
        """Depths of the student that it reads."""
        return 1

    def for_depth(self, depth: int) -> Aligner:
        """What it is for a student of so many blocks."""
        return self

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], one_target: bool) -> nn.Module:
        """What it trains or fits; a part of the checkpoint.

        Args:
            teacher_widths: E of each teacher.
            width: D of the student.
            with_cls: whether a teacher's class token is compared.
            one_target: the teachers are fused into one target before the comparison.
        """
        return nn.Module()

    def calibrate(self, state: nn.Module, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """Fit on normalised tokens of the same positions, one tensor per teacher."""

    def compared_widths(self, teacher_widths: Sequence[int], width: int) -> tuple[int, ...]:
        """Channels of what is compared, one entry per teacher."""
        return (width,) * len(teacher_widths)

    def student(self, state: Any, output: StudentOutput, teacher: int) -> Float[Tensor, "B N1 K"]:
        """What the student gives for a teacher; its own tokens unless there is a projector."""
        return output.compared

    @abstractmethod
    def teacher(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n K"]:
        """The target made of a teacher's tokens."""

    def own_loss(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, ""] | None:
        """A loss of its own, beside the objectives; None: it has none."""
        return None


@dataclass(frozen=True, kw_only=True)
class ProcrustesAligner(Aligner, name="procrustes"):
    """One fixed affine map per teacher, E → D, then LayerNorm without affine: calibrated once, never trained.

    Training such a map on the target's side lets a constant target win; a map of fixed numbers cannot collapse.

    Args:
        calibration_images: images whose tokens the maps are fitted on.
    """

    calibration_images: int = 512

    @property
    def num_calibration_images(self) -> int:
        """See `Aligner`."""
        return self.calibration_images

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], one_target: bool) -> nn.Module:
        """Uncalibrated maps."""
        return fixed_linears([(teacher_width, width) for teacher_width in teacher_widths])

    @torch.no_grad()
    def calibrate(self, state: nn.Module, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """See `fit_maps`."""
        for linear, (weight, bias) in zip(
            cast(Any, state), fit_maps(tokens, cast(Any, state)[0].out_features), strict=True
        ):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    def teacher(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """See `Aligner`."""
        mapped = state[teacher](tokens.to(state[teacher].weight.dtype))
        return F.layer_norm(mapped, mapped.shape[-1:])


@dataclass(frozen=True, kw_only=True)
class AutoencoderAdapter(Aligner, name="autoencoder"):
    """LN0(W z + b), W trained by its own linear auto-encoding loss alone: the targets follow the data, not the student.

    Args:
        calibration_images: images that the maps of `ProcrustesAligner` are fitted on as a start; 0 starts at random.
    """

    calibration_images: int = 512

    @property
    def num_calibration_images(self) -> int:
        """See `Aligner`."""
        return self.calibration_images

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], one_target: bool) -> nn.Module:
        """Randomly initialised maps and their inverses."""
        encode = nn.ModuleList([nn.Linear(teacher_width, width) for teacher_width in teacher_widths])
        decode = nn.ModuleList([nn.Linear(width, teacher_width) for teacher_width in teacher_widths])
        return nn.ModuleDict({"encode": encode, "decode": decode})

    @torch.no_grad()
    def calibrate(self, state: nn.Module, tokens: Sequence[Float[Tensor, "n _"]]) -> None:
        """Start from the calibrated maps and their pseudo-inverses."""
        pairs = zip(*(cast(Any, state)[name] for name in ("encode", "decode")), strict=True)
        maps = fit_maps([part.cpu() for part in tokens], cast(Any, state)["encode"][0].out_features)
        for (encode, decode), (weight, bias) in zip(pairs, maps, strict=True):
            weight, bias = weight.float(), bias.float()
            back = torch.linalg.pinv(weight.double()).float()
            for value, fit in ((encode.weight, weight), (encode.bias, bias), (decode.weight, back)):
                value.copy_(fit)
            decode.bias.copy_(-back @ bias)

    def teacher(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """See `Aligner`; no gradient comes back through the map."""
        mapped = state["encode"][teacher](tokens.float()).float()
        return F.layer_norm(mapped, mapped.shape[-1:]).detach()

    def own_loss(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, ""]:
        """Squared error of decode(encode(z)), as a share of the variance of z."""
        x = tokens.detach().float()
        error = (state["decode"][teacher](state["encode"][teacher](x)).float() - x).square().mean()
        flat = x.flatten(0, -2)
        spread = (flat - mean_of_all(flat.mean(dim=0))).square().mean()
        return error / mean_of_all(spread).clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter(Aligner, name="adapter"):
    """ẑ = LN(W z + b), trained on the target's side (arXiv:2508.04816, "Adapter Projection"): it collapses."""

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], one_target: bool) -> nn.Module:
        """Randomly initialised maps."""
        linear = nn.ModuleList([nn.Linear(teacher_width, width) for teacher_width in teacher_widths])
        return nn.ModuleDict({"linear": linear, "norm": nn.ModuleList([nn.LayerNorm(width) for _ in teacher_widths])})

    def teacher(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n D"]:
        """See `Aligner`."""
        return state["norm"][teacher](state["linear"][teacher](tokens.float()))


class MultiLayerHead(nn.Module):
    """The sum of one map per depth that is read; a single one but for ``multi-layer`` (arXiv:2408.05088, ladder)."""

    def __init__(self, maps: Sequence[nn.Module]):
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, sources: Sequence[Float[Tensor, "B n D"]]) -> Float[Tensor, "B n E"]:
        """Map every source and add up."""
        return torch.stack([part(source) for part, source in zip(self.maps, sources, strict=True)]).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class StudentProjector(Aligner, name="projector"):
    """A trained head per teacher on the student's side, or one for all where their targets are fused.

    Args:
        head: ``identity``; ``linear``; ``mlp``: Linear, LayerNorm, GELU, Linear; ``multi-layer``: the sum of an MLP
            from each of some blocks, as wide as the student, the last four times; ``transformer``: a block over all
            tokens, Linear; ``conv``: two convolutions over the map, Linear (arXiv:2407.20179, light translator).
        separate_cls: class token and patches have heads of their own; a transformer serves both, convolutions never.
        hidden_ratio: hidden width of ``mlp``, in widths of the teacher.
        hidden_norm: LayerNorm in ``mlp``.
        taps: blocks that ``multi-layer`` reads, evenly spaced; at most every block.
        unit_length: what the heads give is brought to length 1.
    """

    head: Head = "linear"
    separate_cls: bool = False
    hidden_ratio: float = 1.0
    hidden_norm: bool = True
    taps: int = 12
    unit_length: bool = False

    @property
    def num_taps(self) -> int:
        """See `Aligner`."""
        return self.taps if self.head == "multi-layer" else 1

    def for_depth(self, depth: int) -> StudentProjector:
        """See `Aligner`."""
        return replace(self, taps=max(1, min(self.taps, depth)))

    @property
    def apart(self) -> bool:
        """Whether the class token has a head of its own."""
        return self.head == "conv" or (self.separate_cls and self.head != "transformer")

    def compared_widths(self, teacher_widths: Sequence[int], width: int) -> tuple[int, ...]:
        """The teachers' own."""
        return tuple(teacher_widths)

    def build(self, teacher_widths: Sequence[int], width: int, with_cls: Sequence[bool], one_target: bool) -> nn.Module:
        """Randomly initialised heads."""
        outs, given = (teacher_widths[:1], [any(with_cls)]) if one_target else (teacher_widths, with_cls)
        patches = nn.ModuleList([self._head(width, out) for out in outs])
        heads = [(out, self.apart and has) for out, has in zip(outs, given, strict=True)]
        cls = nn.ModuleList([self._head(width, out) if wanted else nn.Identity() for out, wanted in heads])
        return nn.ModuleDict({"patches": patches, "cls": cls})

    def _head(self, width: int, out: int) -> MultiLayerHead:
        below = [mlp(width, width, out, norm=False) for _ in range(self.num_taps - 1)]
        return MultiLayerHead([*below, self._last(width, out)])

    def _last(self, width: int, out: int) -> nn.Module:
        """From the tokens that are compared to ``out`` channels."""
        if self.head == "mlp":
            return mlp(width, round(self.hidden_ratio * out), out, self.hidden_norm)
        if self.head == "transformer":
            heads = max(heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0)
            norm: Any = partial(nn.LayerNorm, eps=1e-6)
            block = Block(width, heads, qkv_bias=True, init_values=1e-4, norm_layer=norm)
            return nn.Sequential(block, nn.Linear(width, out))
        simple = {
            "identity": nn.Identity,
            "linear": partial(nn.Linear, width, out),
            "multi-layer": partial(mlp, width, 4 * width, out, norm=False),
            "conv": partial(ConvHead, width, out),
        }
        return simple[self.head]()

    def student(self, state: Any, output: StudentOutput, teacher: int) -> Float[Tensor, "B N1 E"]:
        """See `Aligner`. The class token is 0 where there is no head for it."""
        given = self._project(state, (*output.intermediates, output.compared), teacher).float()
        return F.normalize(given, dim=-1) if self.unit_length else given

    def _project(self, state: Any, sources: Sequence[Tensor], teacher: int) -> Float[Tensor, "B N1 E"]:
        number = min(teacher, len(state["patches"]) - 1)
        if not self.apart:
            return state["patches"][number](sources)
        patches = state["patches"][number]([source[:, 1:] for source in sources])
        first = torch.zeros_like(patches[:, :1])
        if isinstance(state["cls"][number], MultiLayerHead):
            first = state["cls"][number]([source[:, :1] for source in sources])
        return torch.cat([first, patches], dim=1)

    def teacher(self, state: Any, tokens: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n E"]:
        """A teacher's tokens, as they are."""
        return tokens.float()


def mlp(width: int, hidden: int, out: int, norm: bool = True) -> nn.Module:
    """Linear, LayerNorm if asked for, GELU, Linear."""
    between = [nn.LayerNorm(hidden)] if norm else []
    return nn.Sequential(nn.Linear(width, hidden), *between, nn.GELU(), nn.Linear(hidden, out))


class ConvHead(nn.Module):
    """Norm, then twice convolution, ReLU, norm over the whole map, then a linear map; for a square map of tokens."""

    def __init__(self, width: int, out: int):
        super().__init__()

        def step() -> list[nn.Module]:
            return [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.GroupNorm(1, width)]

        self.layers = nn.Sequential(nn.GroupNorm(1, width), *step(), *step(), nn.Conv2d(width, out, 1))

    def forward(self, tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B n E"]:
        """Map the tokens of each image."""
        side = math.isqrt(tokens.shape[1])
        return self.layers(tokens.mT.unflatten(2, (side, side))).flatten(2).mT


def fit_maps(
    tokens: Sequence[Float[Tensor, "n _"]], width: int
) -> list[tuple[Float[Tensor, "width E"], Float[Tensor, " width"]]]:
    """Weight and bias of one map per teacher, fitted on tokens of the same positions.

    Per teacher: centre, the ``width`` directions of largest variance (PCA), the rotation that brings them closest to
    the mean of the teachers (orthogonal Procrustes, generalised by alternation), one scale so that channels have
    variance 1 on average. Cosines between teachers then mean something.
    """
    parts = [_principal(part.double(), width) for part in tokens]
    scores = [(part.double() - mean) @ basis * scale for part, (mean, basis, scale) in zip(tokens, parts, strict=True)]
    maps = []
    for (mean, basis, scale), rotation in zip(parts, common_rotations(scores), strict=True):
        weight = (basis * scale @ rotation).T
        maps.append((weight, -weight @ mean))
    return maps


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
