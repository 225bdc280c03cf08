"""The seconds of a step of LightlyTrain: ViT-B/16 → ViT-Ti/16 at 224 px, one teacher on whole views, random weights.

Its `distillation` in bf16 for six steps, in a process of its own, by its own clock (`profiling/batch_time`, without
loading); the median of all steps but the first two. Needs `lightly-train`. The last line printed is one JSON object;
`--tiny` takes a ViT-Ti as the teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import lightly_train
import torch

from pictures import write_pictures

STEPS, UNCOUNTED = 6, 2


def main() -> None:
    """Train, and read the clock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        lightly_train.pretrain(
            out=f"{folder}/out",
            data=str(write_pictures(Path(folder) / "data", options.batch_size * STEPS)),
            model="dinov3/vitt16-notpretrained",
            method="distillation",
            method_args={"teacher": f"dinov3/vit{'t' if options.tiny else 'b'}16-notpretrained"},
            epochs=1,
            batch_size=options.batch_size,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",  # "auto" computes in fp32 on a CPU
            precision="bf16-mixed",
            num_workers=1,
            trainer_args={"log_every_n_steps": 1},
        )
        lines = map(json.loads, (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines())
        seconds = [line["profiling/batch_time"] for line in lines if "profiling/batch_time" in line]
    print(json.dumps({"seconds_per_step": statistics.median(seconds[UNCOUNTED:]), "steps": len(seconds)}))


if __name__ == "__main__":
    main()
