"""One table for teachers, students and the baselines they must beat."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from comad.data.images import ImageSet, Splits
from comad.evaluation.evaluation import LABEL_SETS, Evaluation, PerImage, choose, score_names, title_of
from comad.evaluation.features import (
    PIXELS,
    Features,
    FeatureSplits,
    View,
    evaluating,
    labelled_indices,
    split_features,
)
from comad.evaluation.knn import KNN
from comad.evaluation.linear import LinearProbe
from comad.models.backbone import Backbone
from comad.runtime.atomic import write_text
from comad.runtime.processes import count, exchange, rank
from comad.runtime.progress import track
from comad.runtime.seal import sealed

OURS: tuple[type[Evaluation], ...] = (KNN, LinearProbe)
"""The evaluations of the package; those of plugins follow them on a board."""
Role = Literal["teacher", "untrained", "init_only", "student", "pixels"]
"""What a row is. ``init_only``: the student's starting weights, before distillation; ``pixels``: no network at all."""

REHEARSED = 2048
"""Images of each part by which evaluations of plugins are tried."""
MIN_CLASSES = 2
MIN_TRAIN_LABELS = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network on the board.

    Attributes:
        name, role: what it is.
        params: number of parameters.
        flops: floating point operations of one image's forward; a multiplication and an addition count as two.
        latency_ms: milliseconds of one image's forward on the CPU, median.
        scores: score name (``knn``, ``linear_coarse``, …) → percent of the test images, unrounded.
        num_images, num_concepts: score name → how many test images, and concepts of them, it is the mean over.
        choices: what was chosen on the validation images: ``pool_knn``, ``k``, ``pool_linear``, …
        knn_share: ``knn`` in percent of the best teacher's; set by the board.
        reason: why there are no scores.
    """

    name: str
    role: Role
    params: int
    flops: int
    latency_ms: float
    scores: dict[str, float] = field(default_factory=dict)
    num_images: dict[str, int] = field(default_factory=dict)
    num_concepts: dict[str, int] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    knn_share: float | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row in JSON's types, scores and choices among the other keys; a usual score that is missing is None."""
        plain = asdict(self)
        scores, choices = plain.pop("scores"), plain.pop("choices")
        return plain | dict.fromkeys(score_names()) | scores | choices


class Score(NamedTuple):
    """A row and what it rests on.

    Attributes:
        row: for the board.
        correct: score name (``knn``, ``linear_coarse``, …) → (n,), one per labelled test image: bool, or 0 to 1.
        groups: score name → int64 (n,), the concepts of these images, for `paired_interval`.
    """

    row: Row
    correct: dict[str, Bool[Tensor, " _"] | Float[Tensor, " _"]]
    groups: dict[str, Int[Tensor, " _"]]

    def joined(self, found: dict[str, PerImage], choices: dict[str, Any] | None = None) -> Score:
        """The same with more scores."""
        row = replace(
            self.row,
            scores=self.row.scores | {name: part.percent for name, part in found.items()},
            num_images=self.row.num_images | {name: len(part.correct) for name, part in found.items()},
            num_concepts=self.row.num_concepts | {name: len(part.groups.unique()) for name, part in found.items()},
            choices=self.row.choices | (choices or {}),
        )
        correct = {name: part.correct for name, part in found.items()}
        return Score(row, self.correct | correct, self.groups | {name: part.groups for name, part in found.items()})

    @property
    def found(self) -> dict[str, PerImage]:
        """Score name → result of each test image."""
        return {name: PerImage(correct, self.groups[name]) for name, correct in self.correct.items()}


@dataclass(frozen=True)
class Scoreboard:
    """Rows in the order in which they are shown, and what was warned of in the run."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What the rows are called."""
        return tuple(row.name for row in self.rows)

    @property
    def shared_rows(self) -> tuple[Row, ...]:
        """The rows with ``knn_share`` filled in, where there is a teacher to compare with."""
        best = max((row.scores.get("knn", 0.0) for row in self.rows if row.role == "teacher"), default=0.0)
        if not best:
            return self.rows
        return tuple(
            replace(row, knn_share=100 * row.scores["knn"] / best) if "knn" in row.scores else row for row in self.rows
        )

    def as_dict(self) -> dict[str, list[Any]]:
        """Give the board as plain values: ``{"rows": [...]}``, and ``warnings`` if there are some."""
        told = {"warnings": list(self.warnings)} if self.warnings else {}
        return {"rows": [row.as_dict() for row in self.shared_rows], **told}

    def below_untrained(self) -> tuple[str, ...]:
        """A sentence for each score in which the student is below its untrained self."""
        own, untrained = (
            next((row.scores for row in self.rows if row.role == role), {}) for role in ("student", "untrained")
        )
        return tuple(
            f"{title_of(name)} of the student, {own[name]:.1f} %, is below the {score:.1f} % of its untrained self"
            for name, score in untrained.items()
            if name in own and own[name] < score
        )

    def write(self, path: Path) -> None:
        """Write JSON. A reader never sees half a file: it is renamed into place."""
        write_text(path, json.dumps(sealed(self.as_dict()), indent=2) + "\n")

    @property
    def score_names(self) -> list[str]:
        """Scores that any row has."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def cells(self) -> list[tuple[str, ...]]:
        """Titles, then a line for each row."""
        names = self.score_names
        columns = {name: f"{title_of(name)} %" for name in names or ["knn"]}
        if any(row.knn_share is not None for row in self.shared_rows):
            place = list(columns).index("knn") + 1
            columns = dict([*list(columns.items())[:place], ("share", "share %"), *list(columns.items())[place:]])
        titles = ("name", "role", "params", "GFLOPs", "ms", *columns.values())
        return [titles, *(_cells(row, columns) for row in self.shared_rows)]

    def table(self) -> str:
        """Lay the board out for a terminal; below stand what scores rest on, and the reasons for missing ones."""
        cells = self.cells()
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(_pad(line, widths)).rstrip() for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        reasons = dict.fromkeys(row.reason for row in self.rows if row.reason)
        told = [*(f"no scores: {reason}" for reason in reasons), *(f"WARNING: {text}" for text in self.warnings)]
        return "\n".join([*lines, *self._counts(self.score_names), *told])

    def _counts(self, names: Sequence[str]) -> list[str]:
        """What the scores rest on, those of equal numbers together."""
        alike: dict[str, list[str]] = {}
        for name in names:
            numbers = {(r.num_images[name], r.num_concepts[name]) for r in self.rows if name in r.num_images}
            for images, concepts in sorted(numbers):
                alike.setdefault(f"{images:,} test images of {concepts:,} concepts", []).append(title_of(name))
        return [f"{', '.join(titles)}: {counts}, one seed" for counts, titles in alike.items()]


class Candidate(NamedTuple):
    """A network to be scored.

    Attributes:
        name, role: of its row.
        backbone: on the device to compute on; None for the row of raw pixels.
        image_size: pixels on the side of the square view; None is the size it was built for.
    """

    name: str
    role: Role
    backbone: Backbone | None
    image_size: int | None = None

    @property
    def view(self) -> View:
        """What it sees; raw pixels have their own size."""
        if self.backbone is None:
            return View(None, PIXELS)
        return View(self.backbone, self.image_size or self.backbone.image_size)


def score_all(
    candidates: Sequence[Candidate],
    splits: Splits,
    dtype: torch.dtype | None = None,
    evaluations: tuple[Evaluation | str, ...] | None = None,
) -> tuple[Score, ...]:
    """Measure networks: cost, and every evaluation, from features of images that are decoded once for all.

    Processes that share (see `comad.runtime.processes.together`) extract features together, then each scores networks
    of its own; all of them get all scores.

    Args:
        candidates: the networks, in the order of the scores.
        splits: the images. With too few labels there are no scores and each row says why.
        dtype: see `extract_many`; cost is always measured as the weights are.
        evaluations: by name or as objects; None is every one that exists, also of plugins, with its defaults.

    Raises:
        ValueError: no evaluation has that name.
    """
    chosen = choose(evaluations)
    timed = track(candidates if rank() == 0 else (), "timing networks", "networks")
    costs = [cost(*c.view) for c in timed]  # the first process alone, for the time of a pass
    costs = exchange({0: costs} if rank() == 0 else {})[0]
    scores = [Score(replace(row, name=c.name, role=c.role), {}, {}) for row, c in zip(costs, candidates, strict=True)]
    if reason := shortage(splits, next(iter(LABEL_SETS))):
        return tuple(score._replace(row=replace(score.row, reason=reason)) for score in scores)
    known = [name for name in LABEL_SETS if shortage(splits, name) is None]
    every = split_features([candidate.view for candidate in candidates], splits, dtype)
    for number, candidate in enumerate(track(candidates, "kNN and probes", "networks")):
        features = _only(every.pop(0), known)
        if number % count() != rank():
            continue
        device = torch.device("cpu") if candidate.backbone is None else next(candidate.backbone.parameters()).device
        for evaluation in chosen:
            scores[number] = scores[number].joined(*evaluation(features, device))
    return tuple(exchange({number: score for number, score in enumerate(scores) if number % count() == rank()}))


def rehearse(splits: Splits) -> None:
    """Try the evaluations of plugins on random features of some images, so that one that fails does so before a run.

    Raises:
        ValueError: one fails.
    """
    if shortage(splits, next(iter(LABEL_SETS))):
        return
    known = [name for name in LABEL_SETS if shortage(splits, name) is None]
    features = _only(FeatureSplits(*map(_random_features, (splits.train, splits.val, splits.test))), known)
    for evaluation in choose(None):
        if isinstance(evaluation, OURS):
            continue
        try:
            Score(Row(name="", role="student", params=0, flops=0, latency_ms=0.0), {}, {}).joined(*evaluation(features))
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"evaluation {evaluation.name!r} fails on random features of {len(features.train.groups)} images: "
                f"{words}; mend it, or leave out its plugin."
            ) from error


def _random_features(images: ImageSet) -> Features:
    chosen = labelled_indices(images)
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), REHEARSED)).long()]
    pools = {name: torch.randn(len(chosen), 8, generator=torch.Generator().manual_seed(0)) for name in ("cls", "patch")}
    return Features(pools, {name: labels[chosen] for name, labels in images.labels.items()}, images.groups[chosen])


def score(
    name: str,
    role: Role,
    backbone: Backbone | None,
    splits: Splits,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    evaluations: tuple[Evaluation | str, ...] | None = None,
) -> Score:
    """Measure one network; see `Candidate` and `score_all`."""
    return score_all([Candidate(name, role, backbone, image_size)], splits, dtype, evaluations)[0]


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


def cost(backbone: Backbone | None, image_size: int) -> Row:
    """A row without a name and without scores: parameters, operations, latency; zeros for raw pixels."""
    if backbone is None:
        return Row(name="", role="pixels", params=0, flops=0, latency_ms=0.0)
    params = sum(parameter.numel() for parameter in backbone.parameters())
    flops, latency = count_flops(backbone, image_size), measure_latency(backbone, image_size)
    return Row(name="", role="pixels", params=params, flops=flops, latency_ms=latency)


def _only(features: FeatureSplits, label_sets: Sequence[str]) -> FeatureSplits:
    return FeatureSplits(*(part._replace(labels={name: part.labels[name] for name in label_sets}) for part in features))


def _cells(row: Row, columns: dict[str, str]) -> tuple[str, ...]:
    percents = [row.knn_share if name == "share" else row.scores.get(name) for name in columns]
    costs = (f"{row.params:,}", f"{row.flops / 1e9:.3f}", f"{row.latency_ms:.1f}")
    return (row.name, row.role, *costs, *("–" if value is None else f"{value:.1f}" for value in percents))


def _pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words to the left, numbers to the right."""
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
