"""A cached epoch against a live one: 3 × ViT-B/16 → ViT-Ti/16 at 224 px, random weights, a folder of photographs' size.

Two whole runs of `comad distill`, decoding and augmentation included: one without the cache, and one whose first epoch
fills it. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from comad.distillation.config import DistillConfig
from comad.distillation.run import distill
from comad.presets import recipe
from pictures import write_pictures

TEACHERS = tuple(f"vit_base_patch16_{kind}224:random" for kind in ("", "clip_", "siglip_"))


def main() -> None:
    """Run both and compare the medians of their steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps of an epoch")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data" / "train", options.batch_size * options.steps)
        write_pictures(data.parent / "val", 1)
        config = settings(data.parent, options.batch_size)
        live = rates(config, Path(folder) / "live", cached=False, epochs=2)
        filled = rates(config, Path(folder) / "cached", cached=True, epochs=4)
    filling, cached = (statistics.median(part) for part in (filled[: options.steps], filled[options.steps :]))
    lived = statistics.median(live)
    result = {
        "live_images_per_s": lived,
        "filling_images_per_s": filling,
        "cached_images_per_s": cached,
        "times_live": cached / lived,
        "batch_size": options.batch_size,
        "torch": torch.__version__,
        "device": f"cpu, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result))


def settings(data: Path, batch_size: int) -> DistillConfig:
    """The paper's recipe on a folder, with two fixed views and few images to calibrate on."""
    config = recipe("comad", demo=False)
    aligner = replace(config.method.aligner, calibration_images=16)
    return replace(
        config,
        data=str(data),
        teachers=TEACHERS,
        method=replace(config.method, aligner=aligner),
        optim=replace(config.optim, batch_size=batch_size, warmup_epochs=1.0),
        loader=replace(config.loader, workers=1, fixed_views=1),
        run=replace(config.run, log_every=1, tensorboard=False),
    )


def rates(config: DistillConfig, out: Path, cached: bool, epochs: int) -> list[float]:
    """Images per second of every step of a run."""
    optim, run = replace(config.optim, epochs=float(epochs)), replace(config.run, out=str(out))
    distill(replace(config, optim=optim, run=run, cache_teachers=cached))
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["images_per_s"] for line in lines if "images_per_s" in line][0 if cached else 1 :]


if __name__ == "__main__":
    main()
