"""One table for teachers, students and the baselines they must beat."""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comad.data.images import Splits
from comad.evaluate.features import FeatureSplits, evaluating, split_features
from comad.evaluate.knn import NearestNeighbours
from comad.evaluate.linear import LinearProbe
from comad.models.backbone import Backbone

Role = Literal["teacher", "untrained", "init_only", "student", "pixels"]
"""What a row is. ``init_only``: the student's starting weights, before distillation; ``pixels``: no network at all."""

LABEL_SETS = {"fine": "", "coarse": "_coarse"}
"""Label set → ending of the score's name: ``knn`` and ``knn_coarse``. The first one is required."""
MIN_CLASSES = 2
MIN_TRAIN_LABELS = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network on the board; scores are percent of the test images, None where there are no labels.

    Attributes:
        name, role: what it is.
        params: number of parameters.
        flops: floating point operations of one image's forward; a multiplication and an addition count as two.
        latency_ms: milliseconds of one image's forward on the CPU, median.
        knn, knn_coarse, linear, linear_coarse: top-1 accuracy per method and label set.
        finetune, finetune_coarse: the same after training the whole network with labels.
        pool_knn, pool_linear, k: choices made on the validation images.
        knn_share: ``knn`` in percent of the best teacher's; set by the board.
        reason: why scores are missing.
    """

    name: str
    role: Role
    params: int
    flops: int
    latency_ms: float
    knn: float | None = None
    knn_coarse: float | None = None
    linear: float | None = None
    linear_coarse: float | None = None
    finetune: float | None = None
    finetune_coarse: float | None = None
    pool_knn: str | None = None
    pool_linear: str | None = None
    k: int | None = None
    knn_share: float | None = None
    reason: str | None = None


class Score(NamedTuple):
    """A row and what it rests on.

    Attributes:
        row: for the board.
        correct: score name (``knn``, ``linear_coarse``, …) → bool (n,), one per labelled test image.
        groups: score name → int64 (n,), the concepts of these images, for `paired_interval`.
    """

    row: Row
    correct: dict[str, Bool[Tensor, " _"]]
    groups: dict[str, Int[Tensor, " _"]]


class Interval(NamedTuple):
    """A difference of accuracies and its 95 % interval, in percentage points."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Scoreboard:
    """Rows in the order in which they are shown."""

    rows: tuple[Row, ...]

    @property
    def shared_rows(self) -> tuple[Row, ...]:
        """The rows with ``knn_share`` filled in, where there is a teacher to compare with."""
        best = max((row.knn for row in self.rows if row.role == "teacher" and row.knn is not None), default=0.0)
        if not best:
            return self.rows
        return tuple(row if row.knn is None else replace(row, knn_share=100 * row.knn / best) for row in self.rows)

    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Give the board as plain values: ``{"rows": [...]}``."""
        return {"rows": [asdict(row) for row in self.shared_rows]}

    def write(self, path: Path) -> None:
        """Write JSON. A reader never sees half a file: it is renamed into place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def table(self) -> str:
        """Lay the board out for a terminal; the reasons for missing scores stand below."""
        titles = ("name", "role", "params", "GFLOPs", "ms", "kNN %", "share %", "coarse %", "linear %", "coarse %")
        cells = [titles, *(_cells(row) for row in self.shared_rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
        lines = ["  ".join(_pad(line, widths)).rstrip() for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        reasons = dict.fromkeys(row.reason for row in self.rows if row.reason)
        return "\n".join([*lines, *(f"no scores: {reason}" for reason in reasons)])


def score(
    name: str,
    role: Role,
    backbone: Backbone | None,
    splits: Splits,
    image_size: int,
    dtype: torch.dtype | None = None,
) -> Score:
    """Measure one network: cost, kNN and linear probe, from features that are extracted once.

    Args:
        name, role: of the row.
        backbone: the network, on the device to compute on; None for the row of raw pixels.
        splits: the images. With too few labels the scores are None and the row says why.
        image_size: pixels on the side of the square view.
        dtype: see `extract_features`; cost is always measured as the weights are.
    """
    row = replace(cost(backbone, image_size), name=name, role=role)
    if reason := shortage(splits, next(iter(LABEL_SETS))):
        return Score(replace(row, reason=reason), {}, {})
    device = torch.device("cpu") if backbone is None else next(backbone.parameters()).device
    features = split_features(backbone, splits, image_size, dtype)
    features = _only(features, [name for name in LABEL_SETS if shortage(splits, name) is None])
    neighbours, probe = NearestNeighbours()(features, device), LinearProbe()(features, device)
    top1, correct, groups = {}, {}, {}
    for method, result in (("knn", neighbours), ("linear", probe)):
        for label_set, hits in result.correct.items():
            key = method + LABEL_SETS[label_set]
            top1[key], correct[key] = result.top1[label_set], hits
            groups[key] = features.test.groups[features.test.labels[label_set] >= 0]
    row = replace(row, **top1, pool_knn=neighbours.pool, pool_linear=probe.pool, k=neighbours.k)
    return Score(row, correct, groups)


def shortage(splits: Splits, label_set: str) -> str | None:
    """Say why a label set cannot be scored, or None if it can."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    known = {part: images.labels.get(label_set) for part, images in parts.items()}
    counts = {part: 0 if labels is None else int((labels >= 0).sum()) for part, labels in known.items()}
    train = known["train"]
    num_classes = 0 if train is None else len(train[train >= 0].unique())
    if counts["train"] < MIN_TRAIN_LABELS:
        return f"{counts['train']} train images have a {label_set} label; at least {MIN_TRAIN_LABELS} are needed."
    if num_classes < MIN_CLASSES:
        return f"the train images have {num_classes} {label_set} class; at least {MIN_CLASSES} are needed."
    missing = [part for part in ("val", "test") if not counts[part]]
    return f"no image of {' and '.join(missing)} has a {label_set} label." if missing else None


def count_flops(backbone: Backbone, image_size: int) -> int:
    """Count the floating point operations of one image's forward; a multiply-add counts as two."""
    with evaluating(backbone) as device, torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops()


def measure_latency(backbone: Backbone, image_size: int, num_runs: int = 9) -> float:
    """Median time of one image's forward on the CPU, in milliseconds, after two runs to warm up.

    A backbone on another device is copied. The number of threads is the caller's (``torch.set_num_threads``).
    """
    on_cpu = next(backbone.parameters()).device.type == "cpu"
    network = backbone if on_cpu else copy.deepcopy(backbone).cpu()
    image = torch.zeros(1, 3, image_size, image_size)
    times = []
    with evaluating(network), torch.inference_mode():
        for _ in range(num_runs + 2):
            start = time.perf_counter()
            network(image)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def paired_interval(
    correct_a: Bool[Tensor, "*seeds n"],
    correct_b: Bool[Tensor, "*seeds n"],
    groups: Int[Tensor, " n"],
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Accuracy of a minus accuracy of b on the same images, with a 95 % interval.

    A paired bootstrap over clusters: whole concepts are drawn with replacement, since images of one concept are not
    independent (Field and Welsh 2007, doi:10.1111/j.1467-9868.2007.00593.x). With several seeds these are drawn as
    well, apart from the concepts (the pigeonhole bootstrap, Owen 2007, doi:10.1214/07-AOAS122). The difference of a
    draw is a ratio of sums. Two or three seeds say little about seeds; the interval is then too short.

    Args:
        correct_a, correct_b: was each test image named rightly; a row per training seed, the same seed in both.
        groups: the concept of each image.
        num_resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: there are no images.
    """
    if not len(groups):
        raise ValueError("no images to compare; both scores need labelled test images.")
    _, cluster, sizes = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
    gain = (correct_a.double() - correct_b.double()).view(-1, len(groups)).numpy()
    gains = np.stack([np.bincount(cluster, row) for row in gain])  # (seeds, concepts)
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(sizes))  # draws at once: bounds memory with many clusters
    differences = []
    for start in range(0, num_resamples, chunk):
        count = min(chunk, num_resamples - start)
        seeds = generator.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), count)  # how often each is drawn
        concepts = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), count)
        differences.append(((seeds @ gains) * concepts).sum(axis=1) / (len(gains) * (concepts @ sizes)))
    low, high = 100 * np.quantile(np.concatenate(differences), (0.025, 0.975))
    return Interval(float(100 * gains.sum() / (len(gains) * sizes.sum())), float(low), float(high))


def cost(backbone: Backbone | None, image_size: int) -> Row:
    """A row without a name and without scores: parameters, operations, latency; zeros for raw pixels."""
    if backbone is None:
        return Row(name="", role="pixels", params=0, flops=0, latency_ms=0.0)
    params = sum(parameter.numel() for parameter in backbone.parameters())
    flops, latency = count_flops(backbone, image_size), measure_latency(backbone, image_size)
    return Row(name="", role="pixels", params=params, flops=flops, latency_ms=latency)


def _only(features: FeatureSplits, label_sets: Sequence[str]) -> FeatureSplits:
    return FeatureSplits(*(part._replace(labels={name: part.labels[name] for name in label_sets}) for part in features))


def _cells(row: Row) -> tuple[str, ...]:
    percents = (row.knn, row.knn_share, row.knn_coarse, row.linear, row.linear_coarse)
    costs = (f"{row.params:,}", f"{row.flops / 1e9:.3f}", f"{row.latency_ms:.1f}")
    return (row.name, row.role, *costs, *("–" if value is None else f"{value:.1f}" for value in percents))


def _pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words to the left, numbers to the right."""
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
