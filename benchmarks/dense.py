"""Which backbone serves segmentation and detection best, on composed scenes? Train and score each, over seeds.

Name the backbones as NAME=SPEC; ``{seed}`` in SPEC is the seed. Beside what `comad evaluate segment` takes, SPEC may be
``single:TEACHER``, the demo's student of that teacher alone, distilled if it is not there, and ``untrained:FOLDER``,
the network of an export with the random weights that a student of that seed starts from: untrained and init-only in
one. The first one is compared with the others; by default these are

    comad=runs/benchmarks/demo-{seed}/student single=single:ibot-stamps
    untrained=untrained:runs/benchmarks/demo-{seed}/student

Runs that are done are not repeated, those that were stopped go on. A task in `benchmarks/results/dense.json` is written
anew when all backbones have done it with one more seed; the other tasks stay. Intervals: 95 %, paired bootstrap over
seeds and validation scenes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from comad.data.scene_files import ScenesConfig, write_scenes
from comad.distillation.run import distill
from comad.evaluation.detection import config as detection
from comad.evaluation.detection.run import detect
from comad.evaluation.segmentation import config as segmentation
from comad.evaluation.segmentation.run import segment
from comad.exporting.package import ModelCard, export_backbone
from comad.models.students import VitConfig
from comad.presets import recipe

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs") / "benchmarks" / "dense"
BACKBONES = (
    "comad=runs/benchmarks/demo-{seed}/student",
    "single=single:ibot-stamps",
    "untrained=untrained:runs/benchmarks/demo-{seed}/student",
)
SECONDS = "cpu_seconds.txt"
DRAWS = {"segment": 2000, "linear": 2000, "detect": 300}
METRICS = {"segment": ("miou", "aacc"), "linear": ("linear_miou", "linear_aacc"), "detect": ("box_ap", "mask_ap")}
RECALLS = np.linspace(0, 1, 101)

Score = Callable[[np.ndarray], float]
"""Weights of the validation pictures → a score in percent."""
Scores = dict[tuple[str, str, int], Score]
"""By metric, backbone and seed."""


def main() -> None:
    """Run what is missing, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", metavar="NAME=SPEC", default=BACKBONES)
    parser.add_argument("--tasks", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", default="runs/scenes")
    options = parser.parse_args()
    named = dict(backbone.split("=", 1) for backbone in options.backbones)
    if not Path(options.scenes).exists():
        write_scenes(ScenesConfig(out=options.scenes))
    path = RESULTS / "dense.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "tasks": {}}
    for task in options.tasks:
        scores: Scores = {}
        for number, seed in enumerate(options.seeds, start=1):
            for name, spec in named.items():
                out = RUNS / f"{task}-{name}-{seed}"
                if not (out / "scores.json").is_file():
                    run(task, named_network(spec, seed), options.scenes, seed, out)
                if (out / SECONDS).is_file():
                    report["seconds"][out.name] = float((out / SECONDS).read_text())
                for metric, score in read_scores(task, out, options.scenes).items():
                    scores[metric, name, seed] = score
            done = options.seeds[:number]
            report["tasks"][task] = {"backbones": named, "seeds": done, **compare(task, scores, list(named), done)}
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def named_network(spec: str, seed: int) -> str:
    """What `load_teacher` takes; a student of one teacher and an export with random weights are made if missing."""
    kind, _, rest = spec.replace("{seed}", str(seed)).partition(":")
    if kind == "single":
        return single_student(rest, seed)
    return untrained(Path(rest), seed) if kind == "untrained" else spec.replace("{seed}", str(seed))


def single_student(teacher: str, seed: int) -> str:
    """What `comad distill --teachers TEACHER` exports."""
    out = RUNS.parent / f"{teacher}-{seed}"
    if not (out / "student").is_dir():
        config = recipe("comad", demo=True)
        resume = any((out / "checkpoints").glob("step-*.pt"))
        distill(replace(config, teachers=(teacher,), run=replace(config.run, seed=seed, out=str(out), resume=resume)))
    return str(out / "student")


def untrained(export: Path, seed: int) -> str:
    """An export of the same network with random weights."""
    out = RUNS / f"untrained-{seed}"
    if not out.is_dir():
        known = json.loads((export / "config.json").read_text())
        sizes = known["model_args"]
        vit = VitConfig(
            name=known["architecture"],
            image_size=sizes["img_size"][0],
            patch_size=sizes["patch_size"],
            width=sizes["embed_dim"],
            depth=sizes["depth"],
            heads=sizes["num_heads"],
        )
        torch.manual_seed(seed)
        about = {"about": "Random weights.", "preset": "none", "data": "none", "data_licence": "none"}
        card = ModelCard(
            name=f"untrained {seed}",
            licence="apache-2.0",
            architecture=vit.name,
            token_types=("cls", "patch"),
            seed=seed,
            images_seen=0,
            **about,
        )
        export_backbone(vit.build(), out, model_args=vit.arguments, card=card)
    return str(out)


def run(task: str, spec: str, scenes: str, seed: int, out: Path) -> None:
    """Train and score; of a run that was not stopped the CPU seconds are kept."""
    resume = any((out / "checkpoints").glob("step-*.pt"))
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    head = "linear" if task == "linear" else "upernet"
    config: Any = detection.recipe("scenes") if task == "detect" else segmentation.recipe("scenes", head)
    place = replace(config.run, out=str(out), seed=seed, resume=resume, probe_every=0, tensorboard=False)
    start = time.process_time()
    (detect if task == "detect" else segment)(replace(config, backbone=spec, data=scenes, run=place))
    if not resume:
        (out / SECONDS).write_text(f"{time.process_time() - start:.0f}\n")


def read_scores(task: str, out: Path, scenes: str) -> dict[str, Score]:
    """The scores of a run as functions of the weights of the pictures, checked against what the run itself said."""
    told = json.loads((out / "scores.json").read_text())
    pictures = told["images"]
    if task != "detect":
        counts = np.load(out / "counts.npz")["counts"].astype(np.float64)
        found: list[Score] = [
            lambda weights: mean_iou(np.tensordot(weights, counts, 1)),
            lambda weights: pixel_accuracy(np.tensordot(weights, counts, 1)),
        ]
        expected = [told["miou"], told["aacc"]]
    else:
        results = json.loads((out / "results.json").read_text())
        found = [precision_of(scenes, results, kind) for kind in ("bbox", "segm")]
        expected = [told["box"]["ap"], told["mask"]["ap"]]
    for name, score, value in zip(METRICS[task], found, expected, strict=True):
        assert abs(score(np.ones(pictures)) - value) < 0.01, f"{out}: {name} differs from the run's own"
    return dict(zip(METRICS[task], found, strict=True))


def mean_iou(sums: np.ndarray) -> float:
    """Of sums (3, C): named rightly, named so, truly so."""
    union = sums[1] + sums[2] - sums[0]
    return float(100 * np.mean(sums[0][union > 0] / union[union > 0]))


def pixel_accuracy(sums: np.ndarray) -> float:
    """Share of the labelled pixels that are named rightly."""
    return float(100 * sums[0].sum() / sums[2].sum())


def precision_of(scenes: str, results: list[dict], kind: str) -> Score:
    """COCO's average precision at overlaps of .5 to .95 as a function of the weights of the pictures."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(Path(scenes) / "annotations" / "instances_val2017.json"))
        if not results:
            return lambda weights: 0.0
        own = [{key: value for key, value in r.items() if kind == "segm" or key != "segmentation"} for r in results]
        matches = COCOeval(truth, truth.loadRes(own), kind)
        matches.evaluate()
    pictures, areas = len(matches.params.imgIds), len(matches.params.areaRng)
    tables = []
    for category in range(len(matches.params.catIds)):
        first = category * areas * pictures  # the first range of areas is all
        tables.append(table_of(matches.evalImgs[first : first + pictures]))

    def score(weights: np.ndarray) -> float:
        values = [value for table in tables if (value := table(weights)) is not None]
        return 100 * float(np.mean(values))

    return score


def table_of(entries: list[dict | None]) -> Callable[[np.ndarray], float | None]:
    """Average precision of one category by the weights of the pictures; None without an object."""
    kept = [(number, entry) for number, entry in enumerate(entries) if entry is not None]
    objects = np.zeros(len(entries))
    for number, entry in kept:
        objects[number] = np.sum(np.asarray(entry["gtIgnore"]) == 0)
    confidence = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in kept)])
    order = np.argsort(-confidence, kind="mergesort")
    picture = np.concatenate([np.zeros(0, int), *(np.full(len(e["dtScores"]), n) for n, e in kept)])[order]
    empty = np.zeros((10, 0))
    matched = np.concatenate([empty, *(entry["dtMatches"] for _, entry in kept)], axis=1)[:, order] > 0
    counted = np.concatenate([empty, *(entry["dtIgnore"] for _, entry in kept)], axis=1)[:, order] == 0

    def precision(weights: np.ndarray) -> float | None:
        total = float(weights @ objects)
        if not total:
            return None
        weight = weights[picture] * counted
        right, wrong = np.cumsum(weight * matched, axis=1), np.cumsum(weight * ~matched, axis=1)
        values = []
        for tp, fp in zip(right, wrong, strict=True):
            envelope = np.maximum.accumulate((tp / np.maximum(tp + fp, 1e-12))[::-1])[::-1]
            places = np.searchsorted(tp / total, RECALLS, side="left")
            values.append(np.mean(np.where(places < len(tp), np.append(envelope, 0)[np.minimum(places, len(tp))], 0)))
        return float(np.mean(values))

    return precision


def compare(task: str, scores: Scores, names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Means over seeds, and the first network minus each other one on the same scenes and seeds."""
    pictures = json.loads((RUNS / f"{task}-{names[0]}-{seeds[0]}" / "scores.json").read_text())["images"]
    means: dict[str, dict[str, Any]] = {name: {} for name in names}
    gains = {}
    for metric in METRICS[task]:
        whole = {name: [scores[metric, name, seed](np.ones(pictures)) for seed in seeds] for name in names}
        for name, values in whole.items():
            means[name][metric] = {"mean": float(np.mean(values)), "per_seed": values}
        drawn = resample(scores, metric, names, seeds, pictures, DRAWS[task])
        for name in names[1:]:
            gap = np.mean(np.subtract(whole[names[0]], whole[name]))
            low, high = np.quantile(drawn[names[0]] - drawn[name], (0.025, 0.975))
            gains[f"{metric}_over_{name}"] = {"difference": float(gap), "low": float(low), "high": float(high)}
    return {"means": means, "gains": gains}


def resample(
    scores: Scores, metric: str, names: list[str], seeds: list[int], pictures: int, draws: int
) -> dict[str, np.ndarray]:
    """Name → the mean score over drawn seeds on drawn pictures, the same draws for every name."""
    generator = np.random.default_rng(0)
    found = {name: np.zeros(draws) for name in names}
    for draw in range(draws):
        weights = np.bincount(generator.integers(0, pictures, pictures), minlength=pictures).astype(np.float64)
        chosen = generator.choice(seeds, len(seeds))
        for name in names:
            by_seed = {seed: scores[metric, name, seed](weights) for seed in set(chosen.tolist())}
            found[name][draw] = np.mean([by_seed[seed] for seed in chosen.tolist()])
    return found


if __name__ == "__main__":
    main()
