"""How near an opened export is to the network it was made of, and how fast it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from comad.data.images import ImageSet, Splits
from comad.data.loader import evaluation_batches
from comad.evaluation.features import Features, FeatureSplits
from comad.evaluation.knn import KNN
from comad.evaluation.scoreboard import LABEL_SETS, shortage
from comad.exporting.encoder import Preprocessing
from comad.exporting.formats import Arrays, Run

TOLERANCE = 1e-4
"""Largest difference of a float32 export over all images, relative to the largest value of an output."""
HALF_COSINE, INT8_COSINE = 0.999, 0.99
"""Least cosine of a 16-bit export's vectors over the images; least mean cosine of an 8-bit one's."""
POINTS = 1.0
"""Most percentage points that an 8-bit export's score on validation images may differ by."""
BANK, QUERIES = 2000, 1000
"""At most so many training and validation images are scored."""
CHUNK = 32
FEWEST_RUNS, SECONDS = 5, 1.0
"""A latency is the median of at least so many runs, and of as many as fit into so long, up to 50."""

Accuracy = Callable[[Run, int | None], float]
"""Percent right on validation images, given what runs a network and its number of images per call."""


@dataclass(frozen=True, kw_only=True)
class ExportRow:
    """One export as measured, for card and scoreboard.

    Attributes:
        format, file, note: what it is; the file's place in the folder.
        bytes: of the file, and what lies beside it for it.
        images: validation images that it was compared on.
        max_difference: see `difference`.
        cosine, mean_cosine: of its vectors with the network's; the least, and the mean.
        score, own_score: percent right of the export and of the network on validation images; None: not measured.
        scored: how; with the number of images.
        ms_one_thread, ms_all_threads: median milliseconds per call.
        sound: it holds what its kind promises.
    """

    format: str
    file: str
    note: str
    bytes: int
    images: int
    max_difference: float
    cosine: float
    mean_cosine: float
    score: float | None = None
    own_score: float | None = None
    scored: str = ""
    ms_one_thread: float | None = None
    ms_all_threads: float | None = None
    sound: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_all(run: Run, pixels: Float[np.ndarray, "n 3 H W"], batch: int | None) -> Arrays:
    """Run a network over all images; a fixed batch is filled up with copies of its last image."""
    size = batch or CHUNK
    parts = []
    for start in range(0, len(pixels), size):
        chunk = pixels[start : start + size]
        missing = size - len(chunk) if batch else 0
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
        parts.append([output[: len(chunk)] for output in run(np.ascontiguousarray(padded))])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def difference(found: Arrays, expected: Arrays) -> float:
    """The largest, relative to the largest value of the output; infinite if a number is none or a shape differs."""
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    sizes = [max(float(np.abs(b).max()), 1e-12) for b in expected]
    largest = max(float(np.abs(a - b).max()) / size for a, b, size in zip(found, expected, sizes, strict=True))
    return largest if np.isfinite(largest) else float("inf")


def cosines(found: Float[np.ndarray, "n E"], expected: Float[np.ndarray, "n E"]) -> Float[np.ndarray, " n"]:
    """Of each image's two vectors; 0 where one has no length or no numbers, or the shapes differ."""
    if found.shape != expected.shape:
        return np.zeros(len(expected))
    a, b = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.nan_to_num((a * b).sum(axis=1) / np.maximum(lengths, 1e-12))


def latency(run: Run, pixels: Float[np.ndarray, "n 3 H W"], batch: int | None) -> float:
    """Median milliseconds of one call, after two to warm up."""
    image = np.ascontiguousarray(np.repeat(pixels[:1], batch or 1, axis=0))
    for _ in range(2):
        run(image)
    times: list[float] = []
    while len(times) < FEWEST_RUNS or (sum(times) < SECONDS and len(times) < 50):
        start = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def is_sound(row: ExportRow, exact: bool, half: bool) -> bool:
    """Whether an export holds what its kind promises; see the constants of this module."""
    if exact and not half:
        return row.max_difference <= TOLERANCE
    if exact:
        return row.cosine >= HALF_COSINE
    if row.score is not None and row.own_score is not None and abs(row.score - row.own_score) > POINTS:
        return False
    return row.mean_cosine >= INT8_COSINE


def pixels_of(
    images: ImageSet, indices: Int[Tensor, " n"], preprocessing: Preprocessing
) -> Float[np.ndarray, "n 3 H W"]:
    """Real images as an exported network is given them."""
    batches = evaluation_batches(images, preprocessing.size, CHUNK, indices)
    parts = [preprocessing.normalised(batch).numpy() for batch in batches]
    return np.concatenate(parts).astype(np.float32)


def some(images: ImageSet, count: int, label_set: str = "") -> Int[Tensor, " n"]:
    """At most so many images, always the same, in order; with ``label_set`` of those that have a label in it."""
    known = (images.labels[label_set] >= 0).nonzero().flatten() if label_set else torch.arange(len(images))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    return known[order[:count]].sort().values


class NeighbourAccuracy:
    """kNN on validation images; k and temperature are chosen for the first network that is asked, the original.

    Raises:
        ValueError: the images have too few labels.
    """

    def __init__(self, splits: Splits, preprocessing: Preprocessing):
        self.label_set = next(iter(LABEL_SETS))
        if reason := shortage(splits._replace(test=splits.val), self.label_set):
            raise ValueError(reason)
        self.preprocessing, self.k = preprocessing, 0
        self.images = {"train": splits.train, "val": splits.val}
        self.chosen = {
            "train": some(splits.train, BANK, self.label_set),
            "val": some(splits.val, QUERIES, self.label_set),
        }
        self.name = f"kNN, {len(self.chosen['val']):,} images"

    def __call__(self, run: Run, batch: int | None) -> float:
        """Percent."""
        parts = {name: self._features(name, run, batch) for name in self.images}
        splits = FeatureSplits(parts["train"], parts["val"], parts["val"])
        method = KNN()
        percent = 100 * method.hits(splits, self.label_set, "vector", "val").double().mean(dim=1)
        if not self.k:
            self.k = method.neighbours[int(percent.argmax())]
        return percent[method.neighbours.index(self.k)].item()

    def _features(self, part: str, run: Run, batch: int | None) -> Features:
        images, indices = self.images[part], self.chosen[part]
        vectors = []
        for group in indices.split(8 * CHUNK):
            vectors.append(torch.from_numpy(run_all(run, pixels_of(images, group, self.preprocessing), batch)[0]))
        labels = {self.label_set: images.labels[self.label_set][indices]}
        return Features({"vector": torch.cat(vectors)}, labels, images.groups[indices])


class ClassAccuracy:
    """Top-1 of class scores on validation images.

    Raises:
        ValueError: no validation image has a label.
    """

    def __init__(self, splits: Splits, preprocessing: Preprocessing):
        self.label_set = next(iter(LABEL_SETS))
        labels = splits.val.labels.get(self.label_set)
        if labels is None or not (labels >= 0).any():
            raise ValueError("no validation image has a label.")
        self.images, self.preprocessing = splits.val, preprocessing
        self.chosen = some(splits.val, QUERIES, self.label_set)
        self.name = f"top-1, {len(self.chosen):,} images"

    def __call__(self, run: Run, batch: int | None) -> float:
        """Percent."""
        right = 0
        for group in self.chosen.split(8 * CHUNK):
            scores = run_all(run, pixels_of(self.images, group, self.preprocessing), batch)[0]
            right += int((scores.argmax(axis=1) == self.images.labels[self.label_set][group].numpy()).sum())
        return 100 * right / len(self.chosen)
