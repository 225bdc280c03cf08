"""Linear probe on frozen features: a whole grid of settings trained at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from comad.evaluate.features import FeatureSplits

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Setting(NamedTuple):
    """One point of the grid."""

    learning_rate: float
    weight_decay: float


class Weights(NamedTuple):
    """One linear classifier for each of the G settings."""

    weight: Float[Tensor, "G width C"]
    bias: Float[Tensor, "G 1 C"]


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """Test scores of the probes chosen on the validation images.

    Attributes:
        top1: label set → percent of the labelled test images that were named rightly.
        correct: label set → bool (n,), one per labelled test image, in order.
        settings: label set → the setting chosen for it.
        pool: the pool chosen, on the first label set; every label set uses it.
        validation: percent on the validation images, first label set.
    """

    top1: dict[str, float]
    correct: dict[str, Bool[Tensor, " _"]]
    settings: dict[str, Setting]
    pool: str
    validation: float


class Probe(NamedTuple):
    """The best classifier of one label set on one pool."""

    setting: Setting
    validation: float
    correct: Bool[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Multinomial logistic regression by AdamW with a cosine schedule, in float32, from zero weights.

    Features are standardised by the mean and deviation of the labelled train images.

    Attributes:
        learning_rates, weight_decays: the grid; all G settings train as one batched problem on the same batches.
        epochs, batch_size: passes over the labelled train images, images per step.
        seed: of the order of the images; the global random state is neither read nor changed.
    """

    learning_rates: tuple[float, ...] = (2e-3, 1e-2, 5e-2)
    weight_decays: tuple[float, ...] = (0.01, 1.0, 5.0)
    epochs: int = 60
    batch_size: int = 1024
    seed: int = 0

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The grid, in the order in which equal choices win."""
        return tuple(Setting(*values) for values in product(self.learning_rates, self.weight_decays))

    def __call__(self, features: FeatureSplits, device: torch.device | str = "cpu") -> LinearResult:
        """Choose the setting (per label set) and the pool by validation accuracy, never by the test images.

        Raises:
            ValueError: no label set has labelled images in all three splits.
        """
        if not features.label_sets:
            raise ValueError("The probe needs labels in train, val and test; give images in one folder per class.")
        first, *others = features.label_sets
        probes = {pool: self.probe(features, first, pool, device) for pool in features.train.pools}
        pool = max(probes, key=lambda name: probes[name].validation)
        best = {first: probes[pool], **{name: self.probe(features, name, pool, device) for name in others}}
        return LinearResult(
            top1={name: 100 * probe.correct.double().mean().item() for name, probe in best.items()},
            correct={name: probe.correct for name, probe in best.items()},
            settings={name: probe.setting for name, probe in best.items()},
            pool=pool,
            validation=best[first].validation,
        )

    def probe(self, features: FeatureSplits, label_set: str, pool: str, device: torch.device | str = "cpu") -> Probe:
        """Train the grid on one label set and one pool, and keep the setting that is best on ``val``."""
        parts = [part.labelled(label_set, pool) for part in features]
        if empty := [name for name, part in zip(features._fields, parts, strict=True) if not len(part[0])]:
            raise ValueError(f"no {label_set} label in {' and '.join(empty)}; the probe needs some in each split.")
        (train, labels), val, test = parts
        classes, targets = labels.to(device).unique(return_inverse=True)
        mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0).clamp_min(1e-6)
        weights = self.fit(((train - mean) / deviation).to(device), targets, len(classes))

        def hits(x: Tensor, y: Tensor, chosen: slice) -> Tensor:
            w, b = weights.weight[chosen], weights.bias[chosen]
            chunks = ((x - mean) / deviation).split(4096)
            predicted = [(chunk.to(device) @ w + b).argmax(dim=-1) for chunk in chunks]  # (G, n), by chunks
            return classes[torch.cat(predicted, dim=-1)].cpu() == y

        accuracy = 100 * hits(*val, chosen=slice(None)).double().mean(dim=1)
        best = int(accuracy.argmax())
        return Probe(self.settings[best], accuracy[best].item(), hits(*test, chosen=slice(best, best + 1))[0])

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n width"], y: Int[Tensor, " n"], num_classes: int) -> Weights:
        """Train all G classifiers at once on standardised features.

        Args:
            x: features of the train images.
            y: their classes, 0 to ``num_classes`` - 1.
            num_classes: C.
        """
        rates, decays = torch.tensor(self.settings, device=x.device).T.reshape(2, -1, 1, 1).unbind()
        ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1)  # the last row of the weights is the bias
        w = x.new_zeros(len(rates), ones.shape[1], num_classes)
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        generator = torch.Generator().manual_seed(self.seed)
        num_steps = self.epochs * math.ceil(len(x) / self.batch_size)
        step = 0
        for _ in range(self.epochs):
            for batch in torch.randperm(len(x), generator=generator).to(x.device).split(self.batch_size):
                rate = rates * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
                step += 1
                gradient = _gradient(w, ones[batch], y[batch])
                first.lerp_(gradient, 1 - BETA1)
                second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
                w[:, :-1].mul_(1 - rate * decays)  # decoupled; the bias does not decay
                root = (second / (1 - BETA2**step)).sqrt_().add_(EPSILON)
                w.sub_(first.div(root).mul_(rate / (1 - BETA1**step)))
        return Weights(w[:, :-1], w[:, -1:])


def _gradient(w: Float[Tensor, "G d C"], x: Float[Tensor, "b d"], y: Int[Tensor, " b"]) -> Float[Tensor, "G d C"]:
    """Gradient of the mean cross-entropy of each classifier: xᵀ (softmax(x w) - one_hot(y)) / b."""
    num_settings, width, num_classes = w.shape
    flat = w.transpose(0, 1).reshape(width, -1)
    error = (x @ flat).view(len(x), num_settings, num_classes).softmax(dim=-1)
    error -= F.one_hot(y, num_classes).unsqueeze(1)
    return (x.T @ error.view(len(x), -1)).view(width, num_settings, num_classes).transpose(0, 1) / len(x)
