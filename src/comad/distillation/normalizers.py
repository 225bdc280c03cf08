"""Slot `normalizer`: what is done to a teacher's tokens first. Yours: subclass `Normalizer`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Tokens, map_tokens
from comad.runtime.processes import count, mean_of_all, sum_of_all
from comad.runtime.slots import Slot

EPSILON = 1e-6
SMALLEST_DEVIATION = 1e-3
"""A channel that moves less is divided by this: it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Normalizer(Slot, slot="normalizer", default="none"):
    """A fixed function of a teacher's tokens, or one with statistics, which are kept in ``state``."""

    @property
    def num_calibration_images(self) -> int:
        """Images that it must be fitted on before training; 0: none."""
        return 0

    def build(self, teacher_widths: Sequence[int]) -> nn.Module:
        """What it keeps between steps; a part of the checkpoint."""
        return nn.Module()

    def calibrate(self, state: nn.Module, tokens: Sequence[Tokens]) -> None:
        """Fit on these tokens, one entry per teacher: (n, E) and (n, k, E)."""

    @abstractmethod
    def __call__(self, state: Any, tokens: Tokens, teacher: int) -> Tokens:
        """Normalise the tokens of one teacher; ``state`` is in training mode while the student trains."""

    def follow(self, state: Any, tokens: Tokens, teacher: int, progress: float) -> None:
        """Let statistics follow a batch of the training, after it was normalised.

        Args:
            state: what `build` made.
            tokens: of the batch, as they came from the teacher.
            teacher: its number.
            progress: share of the run that is done.
        """


@dataclass(frozen=True, kw_only=True)
class NoNormalizer(Normalizer, name="none"):
    """Tokens as they are."""

    def __call__(self, state: nn.Module, tokens: Tokens, teacher: int) -> Tokens:
        """See `Normalizer`."""
        return tokens


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Normalizer, name="layer-norm"):
    """Each token to mean 0 and variance 1 over its channels."""

    def __call__(self, state: nn.Module, tokens: Tokens, teacher: int) -> Tokens:
        """See `Normalizer`."""
        return map_tokens(lambda row: F.layer_norm(row.float(), row.shape[-1:], eps=EPSILON), tokens)


@dataclass(frozen=True, kw_only=True)
class L2(Normalizer, name="l2"):
    """Each token to length 1."""

    def __call__(self, state: nn.Module, tokens: Tokens, teacher: int) -> Tokens:
        """See `Normalizer`."""
        return map_tokens(lambda row: F.normalize(row.float(), dim=-1), tokens)


class Moments(nn.Module):
    """Mean and standard deviation of every channel, of class token and patches apart; 0 and 1 at first."""

    def __init__(self, width: int):
        super().__init__()
        for name, value in (("mean", torch.zeros(width)), ("deviation", torch.ones(width))):
            for row in ("cls", "patches"):
                self.register_buffer(f"{name}_{row}", value.clone())

    @torch.no_grad()
    def follow(self, tokens: Tokens, share: float = 1.0) -> None:
        """Move by a share of the way to the moments of these tokens."""
        for row, x in (("cls", tokens.cls), ("patches", tokens.patches)):
            if x is not None:
                for name, value in zip(("mean", "deviation"), moments(x.float()), strict=True):
                    getattr(self, f"{name}_{row}").lerp_(value, share)


def moments(x: Float[Tensor, "*rows E"]) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    """Mean and standard deviation over all rows, of a training step those of all processes."""
    flat = x.flatten(0, -2)
    mean = mean_of_all(flat.mean(dim=0))
    if count() == 1:
        return mean, flat.std(dim=0, unbiased=len(flat) > 1)
    squares = sum_of_all((flat - mean).square().sum(dim=0))
    return mean, (squares / (count() * len(flat) - 1)).sqrt()


@dataclass(frozen=True, kw_only=True)
class Standardize(Normalizer, name="standardize"):
    """Each channel to mean 0 and variance 1, class tokens and patches apart.

    Args:
        over: where the moments come from: ``running``: a moving average of the batches before; ``batch``: each batch's
            own, in evaluation the moving average; ``calibration``: taken once on the run's own images, then fixed.
        momentum: share of the newest batch in the moving average at the start of the run.
        momentum_end: that share at the end of the run, by a cosine.
        calibration_images: images whose tokens the moments are taken of, for the first batch at least.
    """

    over: Literal["running", "batch", "calibration"] = "running"
    momentum: float = 1.0
    momentum_end: float = 0.001
    calibration_images: int = 512

    @property
    def of_a_pass(self) -> str:
        """See `Slot`."""
        return "" if self.over == "calibration" else "moments of the teachers' tokens"

    @property
    def num_calibration_images(self) -> int:
        """See `Normalizer`."""
        return 0 if self.over == "batch" else self.calibration_images

    def build(self, teacher_widths: Sequence[int]) -> nn.Module:
        """Moments of each teacher."""
        return nn.ModuleList([Moments(width) for width in teacher_widths])

    def calibrate(self, state: nn.Module, tokens: Sequence[Tokens]) -> None:
        """Take the moments of these tokens; a moving average starts from them."""
        for own, part in zip(cast(nn.ModuleList, state), tokens, strict=True):
            cast(Moments, own).follow(part)

    def __call__(self, state: Any, tokens: Tokens, teacher: int) -> Tokens:
        """See `Normalizer`."""
        own = state[teacher]
        cls = None if tokens.cls is None else self._standardize(own, tokens.cls.float(), "cls")
        return Tokens(cls, self._standardize(own, tokens.patches.float(), "patches"))

    def follow(self, state: Any, tokens: Tokens, teacher: int, progress: float) -> None:
        """See `Normalizer`; the moving average does."""
        if self.over != "calibration":
            rest = 0.5 * (1 + math.cos(math.pi * progress))
            state[teacher].follow(tokens, self.momentum_end + (self.momentum - self.momentum_end) * rest)

    def _standardize(self, own: Moments, x: Tensor, row: str) -> Tensor:
        mean, deviation = getattr(own, f"mean_{row}"), getattr(own, f"deviation_{row}")
        if self.over == "batch" and own.training:
            mean, deviation = moments(x)
        return (x - mean) / deviation.clamp(min=SMALLEST_DEVIATION)


@dataclass(frozen=True, kw_only=True)
class PHIS(Normalizer, name="phi-s"):
    """PHI-S: y = a·H·Vᵀ(y₀ - μ), a = 1/√mean(λ); V, λ eigen of the covariance, H a Hadamard matrix (arXiv:2410.01680).

    A rotation, so errors of all directions count alike; and every channel has variance 1.

    Args:
        cls: the class token has a map of its own; without it stays as it is, to be compared by its direction.
        calibration_images: images whose tokens it is fitted on.
    """

    cls: bool = False
    calibration_images: int = 512

    @property
    def num_calibration_images(self) -> int:
        """See `Normalizer`."""
        return self.calibration_images

    def build(self, teacher_widths: Sequence[int]) -> nn.Module:
        """One fixed affine map per teacher; a width without a Hadamard matrix is a ValueError."""
        for width in teacher_widths:
            hadamard(width)
        return fixed_linears([(width, width) for width in teacher_widths] * (2 if self.cls else 1))

    @torch.no_grad()
    def calibrate(self, state: nn.Module, tokens: Sequence[Tokens]) -> None:
        """Fit mean and rotation on the patches, and on the class tokens."""
        rows = [part.patches.flatten(0, -2) for part in tokens] + [part.cls for part in tokens if self.cls]
        for linear, row in zip(cast(Any, state), rows, strict=True):
            if row is None:
                continue
            x = row.double()
            mean = x.mean(dim=0)
            values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / max(1, len(x) - 1))
            matrix = hadamard(x.shape[1]).to(x) @ vectors.T * values.mean().clamp(min=1e-12).rsqrt()
            linear.weight.copy_(matrix)
            linear.bias.copy_(-matrix @ mean)

    def __call__(self, state: Any, tokens: Tokens, teacher: int) -> Tokens:
        """See `Normalizer`."""
        with torch.autocast(tokens.patches.device.type, enabled=False):
            own = state[teacher + len(state) // 2] if self.cls else nn.Identity()
            cls = None if tokens.cls is None else own(tokens.cls.float())
            return Tokens(cls, state[teacher](tokens.patches.float()))


def fixed_linears(shapes: Sequence[tuple[int, int]]) -> nn.ModuleList:
    """Linear maps (in, out) that calibration fits and training leaves alone; 0 until then."""
    linears = nn.ModuleList([nn.utils.skip_init(nn.Linear, *shape) for shape in shapes]).requires_grad_(False)
    for parameter in linears.parameters():
        nn.init.zeros_(parameter)
    return linears


def hadamard(order: int) -> Float[Tensor, "order order"]:
    """An orthogonal matrix of entries ±1/√order, by Paley's first construction and Sylvester's doubling.

    Raises:
        ValueError: neither gives one of this order.
    """
    size, doublings = order, 0
    while size > 2 and not (size % 4 == 0 and _is_prime(size - 1)):
        if size % 4:
            raise ValueError(f"no Hadamard matrix for width {order}; use --preset eupe, which only standardises.")
        size, doublings = size // 2, doublings + 1
    matrix = _paley(size) if size > 2 else torch.tensor([[1.0, 1.0], [1.0, -1.0]])[:size, :size]
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / order**0.5


def _paley(order: int) -> Tensor:
    """I + S, S skew, from the quadratic residues of the prime order - 1."""
    prime = order - 1
    residues = {x * x % prime for x in range(1, prime)}
    character = torch.tensor([0.0, *(1.0 if x in residues else -1.0 for x in range(1, prime))])
    index = torch.arange(prime)
    skew = torch.zeros(order, order)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(index.unsqueeze(1) - index) % prime]
    return torch.eye(order) + skew


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
