"""What is done to a teacher's tokens first. Add one: a frozen config with `build`, its name in `Normalize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from comad.models.backbone import Tokens, map_tokens

ROWS = ("cls", "patches")
EPSILON = 1e-6


class PlainNorm(nn.Module):
    """A function of one token, without state."""

    def __init__(self, function: Literal["none", "layer-norm", "l2"]):
        super().__init__()
        self.function = function

    def forward(self, tokens: Tokens, teacher: int) -> Tokens:
        """Normalise the tokens of one teacher."""
        if self.function == "none":
            return tokens
        if self.function == "l2":
            return map_tokens(lambda row: F.normalize(row.float(), dim=-1), tokens)
        return map_tokens(lambda row: F.layer_norm(row.float(), row.shape[-1:]), tokens)

    def calibrate(self, tokens: Sequence[Tokens]) -> None:
        """Nothing to fit."""


class Standardiser(nn.Module):
    """Every channel to mean 0 and variance 1, class tokens and patches apart."""

    steps: Tensor

    def __init__(self, widths: Sequence[int], over: Literal["running", "batch", "calibration"], momentum: float):
        super().__init__()
        self.over = over
        self.momentum = momentum
        self.register_buffer("steps", torch.zeros(len(widths), dtype=torch.int64))
        for m, width in enumerate(widths):
            for row in ROWS:
                self.register_buffer(f"mean_{row}_{m}", torch.zeros(width))
                self.register_buffer(f"variance_{row}_{m}", torch.ones(width))

    def forward(self, tokens: Tokens, teacher: int) -> Tokens:
        """Normalise the tokens of one teacher; ``running`` statistics follow the batch while training."""
        if self.over == "running" and self.training:
            self.steps[teacher] += 1
            self._follow(tokens, teacher, (1 / self.steps[teacher]).clamp(min=self.momentum))
        cls = None if tokens.cls is None else self._standardise(tokens.cls.float(), "cls", teacher)
        return Tokens(cls, self._standardise(tokens.patches.float(), "patches", teacher))

    def _standardise(self, x: Tensor, row: str, teacher: int) -> Tensor:
        mean, variance = getattr(self, f"mean_{row}_{teacher}"), getattr(self, f"variance_{row}_{teacher}")
        if self.over == "batch":
            mean, variance = _moments(x)
        return (x - mean) * (variance + EPSILON).rsqrt()

    @torch.no_grad()
    def _follow(self, tokens: Tokens, teacher: int, share: Float[Tensor, ""]) -> None:
        """Move the stored moments by a share of the way to those of these tokens."""
        for row in ROWS:
            x = getattr(tokens, row)
            if x is not None:
                for name, value in zip(("mean", "variance"), _moments(x.float()), strict=True):
                    getattr(self, f"{name}_{row}_{teacher}").lerp_(value, share)

    def calibrate(self, tokens: Sequence[Tokens]) -> None:
        """Take the moments of these tokens, one entry per teacher; with ``running`` until the first batch."""
        if self.over != "batch":
            for m, part in enumerate(tokens):
                self._follow(part, m, torch.ones((), device=self.steps.device))


def _moments(x: Float[Tensor, "*rows E"]) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    flat = x.flatten(0, -2)
    return flat.mean(dim=0), flat.var(dim=0, unbiased=False)


class PhiStandardiser(nn.Module):
    """PHI-S: y = a·H·Vᵀ(y₀ - μ), a = 1/√mean(λ); V, λ eigen of the covariance, H a Hadamard matrix (arXiv:2410.01680).

    A rotation, so errors of all directions count alike; and every channel has variance 1. The class token stays as it
    is, for it is compared by its direction.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        for m, width in enumerate(widths):
            self.register_buffer(f"mean_{m}", torch.zeros(width))
            self.register_buffer(f"matrix_{m}", hadamard(width))

    def forward(self, tokens: Tokens, teacher: int) -> Tokens:
        """Normalise the patches of one teacher."""
        mean, matrix = getattr(self, f"mean_{teacher}"), getattr(self, f"matrix_{teacher}")
        with torch.autocast(mean.device.type, enabled=False):
            return tokens._replace(patches=(tokens.patches.float() - mean) @ matrix.T)

    def invert(self, patches: Float[Tensor, "B n E"], teacher: int) -> Float[Tensor, "B n E"]:
        """Give back the teacher's own patches."""
        mean, matrix = getattr(self, f"mean_{teacher}"), getattr(self, f"matrix_{teacher}")
        return (torch.linalg.inv(matrix.double()) @ patches.double().mT).mT.to(patches.dtype) + mean

    @torch.no_grad()
    def calibrate(self, tokens: Sequence[Tokens]) -> None:
        """Fit mean and rotation on the patches of these tokens, one entry per teacher."""
        for m, part in enumerate(tokens):
            x = part.patches.flatten(0, -2).double()
            mean = x.mean(dim=0)
            values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
            matrix = hadamard(x.shape[1]).to(x) @ vectors.T * values.mean().clamp(min=1e-12).rsqrt()
            getattr(self, f"mean_{m}").copy_(mean)
            getattr(self, f"matrix_{m}").copy_(matrix)


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


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Each token by itself: as it is, normalised over its channels, or brought to length 1."""

    kind: Literal["plain"] = "plain"
    function: Literal["none", "layer-norm", "l2"] = "none"
    calibration_images: int = 0

    def build(self, widths: Sequence[int]) -> PlainNorm:
        """One function for all teachers."""
        return PlainNorm(self.function)


@dataclass(frozen=True, kw_only=True)
class Standardise:
    """Each channel to mean 0 and variance 1.

    Args:
        over: where the moments come from: ``running``: a moving average of the batches; ``batch``: each batch's own;
            ``calibration``: taken once on the run's own images, then fixed.
        momentum: of the moving average; it starts as the plain mean of the batches so far.
        calibration_images: images whose tokens the moments are taken of.
    """

    kind: Literal["standardise"] = "standardise"
    over: Literal["running", "batch", "calibration"] = "running"
    momentum: float = 0.01
    calibration_images: int = 512

    def build(self, widths: Sequence[int]) -> Standardiser:
        """Moments 0 and 1 at first."""
        return Standardiser(widths, self.over, self.momentum)


@dataclass(frozen=True, kw_only=True)
class PhiS:
    """Rotate so that all channels have the same variance, then one scale; fitted once on the run's own images."""

    kind: Literal["phi-s"] = "phi-s"
    calibration_images: int = 512

    def build(self, widths: Sequence[int]) -> PhiStandardiser:
        """Uncalibrated; call ``calibrate`` before training."""
        return PhiStandardiser(widths)


Normalize = Plain | Standardise | PhiS
