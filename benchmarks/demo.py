"""The demo over several seeds: does the student learn, by how much, and how long does it take?

Prints one JSON object and writes it to `benchmarks/results/NAME.json`. Options after `--` go to the run, so that
`python benchmarks/demo.py --name long --seeds 0 -- --optim.epochs 200` is the long run of the same command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from comad.distillation.config import DistillConfig
from comad.distillation.run import distill
from comad.evaluation.intervals import paired_interval
from comad.evaluation.scoreboard import Score
from comad.presets import recipe

RESULTS = Path(__file__).parent / "results"
BASELINES = ("untrained", "init-only", "pixels")


def main() -> None:
    """Run the demo once per seed and compare the student with its baselines, paired, over seeds and concepts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="demo")
    parser.add_argument("--preset", default="comad")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, rest = parser.parse_known_args()
    default = recipe(options.preset, demo=True)
    config = tyro.cli(tyro.conf.AvoidSubcommands[DistillConfig], args=[a for a in rest if a != "--"], default=default)
    scores, seconds, curves = [], [], []
    for seed in options.seeds:
        out = Path("runs") / "benchmarks" / f"{options.name}-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        result = distill(replace(config, run=replace(config.run, seed=seed, out=str(out))))
        seconds.append(time.perf_counter() - start)
        scores.append({part.row.name: part for part in result.scores})
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        curves.append([{"step": line["step"], "knn": line["knn"]} for line in log if "knn" in line])
    report = {
        "preset": config.preset,
        "epochs": config.optim.epochs,
        "seeds": options.seeds,
        "seconds": seconds,
        "rows": [
            {"seed": seed, **part.row.as_dict()}
            for seed, run in zip(options.seeds, scores, strict=True)
            for part in run.values()
        ],
        "intervals": {
            f"{method}_over_{name}": _gain(scores, method, name) for method in ("knn", "linear") for name in BASELINES
        },
        "validation_curves": curves,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("preset", "seeds", "seconds", "intervals")}))


def _gain(runs: list[dict[str, Score]], method: str, baseline: str) -> dict[str, float]:
    """Student minus baseline, over seeds and concepts."""
    student, other = (torch.stack([run[name].correct[method] for run in runs]) for name in ("student", baseline))
    return paired_interval(student, other, runs[0]["student"].groups[method])._asdict()


if __name__ == "__main__":
    main()
