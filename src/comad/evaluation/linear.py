"""Linear probe on frozen features: a whole grid of settings trained at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from comad.evaluation.evaluation import Evaluation, Result
from comad.evaluation.features import FeatureSplits


class Setting(NamedTuple):
    """One point of the grid."""

    learning_rate: float
    weight_decay: float


class Classifiers(nn.Module):
    """One linear classifier for each of the G settings, on features standardised by those of the train images."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, train: Float[Tensor, "n width"], num_classes: int, num_settings: int):
        super().__init__()
        deviation, mean = torch.std_mean(train, dim=0, correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation.clamp_min(1e-6))
        zeros = [train.new_zeros(num_classes, train.shape[1]) for _ in range(num_settings)]
        self.weights = nn.ParameterList(zeros)
        self.biases = nn.ParameterList([weight[:, 0].clone() for weight in zeros])

    def forward(self, features: Float[Tensor, "b width"]) -> Float[Tensor, "b G C"]:
        """Class scores of all settings, by one product of matrices."""
        x = (features - self.mean) / self.deviation
        return F.linear(x, torch.cat(list(self.weights)), torch.cat(list(self.biases))).unflatten(
            1, (len(self.weights), -1)
        )


class Probe(NamedTuple):
    """The best classifier of one label set on one pool.

    Attributes:
        setting: of it.
        ranking: all settings that were trained, the best first.
        validation: its percent on the validation images.
        correct: its answers on the test images.
    """

    setting: Setting
    ranking: tuple[Setting, ...]
    validation: float
    correct: Bool[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Evaluation, name="linear"):
    """Multinomial logistic regression by AdamW with a cosine schedule, from zero weights.

    Features are standardised by the mean and deviation of the labelled train images. Where training takes more than
    ``direct_steps``, a whole short schedule first chooses the pool and the settings that are worth the full one.

    Args:
        learning_rates: of the grid.
        weight_decays: of the grid; all G settings are trained together, on the same batches.
        epochs: passes over the labelled train images.
        max_steps: fewer passes if they would take more steps than this.
        direct_steps: training that is no longer than this is of all pools and settings.
        trial_steps: else steps of the first choice among them.
        kept: settings that are trained in full after it.
        batch_size: images per step.
        precision: of the products; ``auto`` is bf16 after a choice among many where the hardware has it, else fp32.
        seed: of the order of the images; the global random state is neither read nor changed.
    """

    title: ClassVar[str] = "linear"

    learning_rates: tuple[float, ...] = (2e-3, 1e-2, 5e-2)
    weight_decays: tuple[float, ...] = (0.01, 1.0, 5.0)
    epochs: int = 60
    max_steps: int = 2500
    direct_steps: int = 500
    trial_steps: int = 200
    kept: int = 2
    batch_size: int = 1024
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The grid, in the order in which equal choices win."""
        return tuple(Setting(*values) for values in product(self.learning_rates, self.weight_decays))

    def num_steps(self, num_images: int) -> int:
        """Steps of a full schedule."""
        return min(self.max_steps, self.epochs * math.ceil(num_images / self.batch_size))

    def __call__(self, features: FeatureSplits, device: torch.device | str = "cpu") -> Result:
        """Choose the setting (per label set) and the pool by validation accuracy, never by the test images.

        Raises:
            ValueError: no label set has labelled images in all three splits.
        """
        first, *others = self.label_sets(features)
        pool, probe = self.best(features, first, tuple(features.train.pools), device)
        probes = {first: probe, **{name: self.best(features, name, (pool,), device)[1] for name in others}}
        scores = self.results(features, {name: found.correct for name, found in probes.items()})
        return Result(scores, {"pool_linear": pool, "validation_linear": probe.validation})

    def best(
        self, features: FeatureSplits, label_set: str, pools: tuple[str, ...], device: torch.device | str = "cpu"
    ) -> tuple[str, Probe]:
        """The pool and the setting that are best on ``val``, and the classifier."""
        total = self.num_steps(int(features.train.known(label_set).sum()))
        direct = total <= self.direct_steps
        first = total if direct else self.trial_steps
        probes = {pool: self.probe(features, label_set, pool, self.settings, first, device) for pool in pools}
        pool = max(probes, key=lambda name: probes[name].validation)
        if direct:
            return pool, probes[pool]
        return pool, self.probe(features, label_set, pool, probes[pool].ranking[: self.kept], total, device)

    def probe(
        self,
        features: FeatureSplits,
        label_set: str,
        pool: str,
        settings: tuple[Setting, ...],
        num_steps: int,
        device: torch.device | str = "cpu",
    ) -> Probe:
        """Train settings on one label set and one pool, and keep the one that is best on ``val``."""
        (train, labels), val, test = (part.labelled(label_set, pool) for part in features)
        classes, targets = labels.to(device).unique(return_inverse=True)
        many = self.num_steps(len(train)) > self.direct_steps
        half = self.precision == "bf16" or (self.precision == "auto" and many and has_bf16(torch.device(device)))
        classifiers = self.fit(train.to(device), targets, settings, num_steps, half)

        @torch.no_grad()
        def hits(x: Tensor, y: Tensor) -> Bool[Tensor, "n G"]:
            predicted = [classifiers(chunk.to(device)).argmax(dim=2) for chunk in x.split(self.batch_size)]
            return classes[torch.cat(predicted)].cpu() == y.unsqueeze(1)

        accuracy = 100 * hits(*val).double().mean(dim=0)
        order = accuracy.argsort(descending=True, stable=True).tolist()
        best = order[0]
        ranking = tuple(settings[place] for place in order)
        return Probe(settings[best], ranking, accuracy[best].item(), hits(*test)[:, best])

    @torch.enable_grad()
    def fit(
        self,
        x: Float[Tensor, "n width"],
        y: Int[Tensor, " n"],
        settings: tuple[Setting, ...],
        num_steps: int,
        half: bool = False,
    ) -> Classifiers:
        """Train all G classifiers at once.

        Args:
            x: features of the train images.
            y: their classes, 0 to C - 1.
            settings: G of them.
            num_steps: of the schedule.
            half: products in bf16; weights, sums and the loss stay in float32.
        """
        classifiers = Classifiers(x, int(y.max()) + 1, len(settings))
        groups = [
            {"params": [parameter], "lr": rate, "weight_decay": decay * (parameter.ndim > 1)}
            for (rate, decay), *pair in zip(settings, classifiers.weights, classifiers.biases, strict=True)
            for parameter in pair
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        generator = torch.Generator().manual_seed(self.seed)
        batches: list[Tensor] = []
        for _ in range(num_steps):
            batches = batches or list(torch.randperm(len(x), generator=generator).to(x.device).split(self.batch_size))
            batch = batches.pop(0)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                scores = classifiers(x[batch])
            targets = y[batch, None].expand(-1, len(settings)).flatten()
            loss = F.cross_entropy(scores.flatten(0, 1).float(), targets, reduction="sum") / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return classifiers


def has_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are quicker than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
