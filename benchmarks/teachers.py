"""Train the three bundled teachers (`comad pretrain`), or score the bundled ones: `--score`.

Scores are on the test concepts: kNN and linear probe, each against the same network untrained, with a paired interval
over concepts, and the pairwise CKA of the three. Prints one JSON object and writes it to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from comad.data.images import load_images
from comad.evaluate.features import extract_features
from comad.evaluate.scoreboard import paired_interval, score
from comad.evaluate.similarity import linear_cka
from comad.models.teachers import BUNDLED, load_teacher
from comad.pretrain.config import METHODS, PretrainConfig

RESULTS = Path(__file__).parent / "results"
IMAGE_SIZE = 48


def train(name: str) -> None:
    """Run `comad pretrain NAME` with its defaults and bundle what it exports."""
    subprocess.run([sys.executable, "-m", "comad.cli", "pretrain", name], check=True)
    shutil.copytree(Path("runs") / name / "teacher", BUNDLED / f"{name}-stamps", dirs_exist_ok=True)


def evaluate() -> dict[str, object]:
    """Score the bundled teachers and one untrained network of their architecture."""
    splits = load_images("stamps")
    torch.manual_seed(0)
    vit = PretrainConfig().vit
    untrained = score("untrained", "untrained", vit.build(), splits, IMAGE_SIZE)
    rows, pooled = [{"name": "untrained", "knn": untrained.row.knn, "linear": untrained.row.linear}], {}
    for name in METHODS:
        teacher = load_teacher(f"{name}-stamps", IMAGE_SIZE)
        result = score(teacher.name, "teacher", teacher.backbone, splits, IMAGE_SIZE)
        gains = {
            method: paired_interval(result.correct[method], untrained.correct[method], result.groups[method])._asdict()
            for method in ("knn", "linear")
        }
        rows.append({"name": name, "knn": result.row.knn, "linear": result.row.linear, "gain": gains})
        pooled[name] = extract_features(teacher.backbone, splits.test, IMAGE_SIZE)["patch"]
    cka = {f"{a}-{b}": linear_cka(pooled[a], pooled[b]) for a, b in itertools.combinations(pooled, 2)}
    return {"rows": rows, "cka": cka, "image_size": IMAGE_SIZE}


def main() -> None:
    """Train unless told to score only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--score", action="store_true", help="score the bundled teachers as they are")
    if not parser.parse_args().score:
        for name in METHODS:
            train(name)
    report = evaluate()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "teachers.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
