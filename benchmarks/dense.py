"""Which backbone serves segmentation and detection best, on composed scenes? Train and score each, over seeds.

Name the backbones as NAME=SPEC; ``{seed}`` in SPEC is the seed. Beside what `comad evaluate segment` takes, SPEC may be
``single:TEACHER``, the demo's student of that teacher alone, distilled if it is not there, and ``untrained:FOLDER``,
the network of an export with the random weights that a student of that seed starts from: untrained and init-only in
one. The first one is compared with the others; by default these are

    comad=runs/benchmarks/demo-{seed}/student single=single:ibot-stamps
    untrained=untrained:runs/benchmarks/demo-{seed}/student

Runs that are done are not repeated, those that were stopped go on. A task in `benchmarks/results/dense.json` is written
anew when all backbones have done it with one more seed; the other tasks stay. `benchmarks/results.py` gives the
differences, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
METRICS = {"segment": ("miou", "aacc"), "linear": ("linear_miou", "linear_aacc"), "detect": ("box_ap", "mask_ap")}

Scores = dict[tuple[str, str, int], float]
"""By metric, backbone and seed."""


def main() -> None:
    """Run what is missing, and write the scores of every seed."""
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
                for metric, score in read_scores(task, out).items():
                    scores[metric, name, seed] = score
            done = options.seeds[:number]
            means = means_of(task, scores, list(named), done)
            report["tasks"][task] = {"backbones": named, "seeds": done, "means": means}
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


def read_scores(task: str, out: Path) -> dict[str, float]:
    """The scores of a run, in percent."""
    told = json.loads((out / "scores.json").read_text())
    found = [told["box"]["ap"], told["mask"]["ap"]] if task == "detect" else [told["miou"], told["aacc"]]
    return dict(zip(METRICS[task], found, strict=True))


def means_of(task: str, scores: Scores, names: list[str], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Network → metric → its mean over seeds, and each seed's."""
    values = {name: {m: [scores[m, name, seed] for seed in seeds] for m in METRICS[task]} for name in names}
    return {
        name: {metric: {"mean": float(np.mean(own)), "per_seed": own} for metric, own in found.items()}
        for name, found in values.items()
    }


if __name__ == "__main__":
    main()
