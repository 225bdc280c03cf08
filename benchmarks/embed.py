"""Images per second of `comad embed`, against bare forwards of the same network over as many images.

Pixels that are there, which only need a resize and a crop, and photographs as JPEG files, which are decoded as well.
Where that costs as much as the network, forward and views together are what one process can reach. The rounds are
interleaved; without workers they count the CPU seconds of this process, so that other processes disturb them little.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from comad.data.images import ImageSet, Splits
from comad.data.load import load_images
from comad.data.loader import LoaderConfig
from comad.evaluation.embed import EmbedConfig, EvaluationViews, embed_images
from comad.evaluation.views import view_size
from comad.models.backbone import Backbone
from comad.models.teachers import load_teacher
from pictures import write_pictures


class Kept(ImageSet):
    """Images that are decoded already."""

    def __init__(self, count: int):
        self.name, self.labels, self.groups = "kept", {}, torch.arange(count)
        self.pixels = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.groups)

    def load(self, index: int, min_side: int = 0) -> Tensor:
        return self.pixels

    def path(self, index: int) -> str:
        return f"kept/{index}"


def forward(backbone: Backbone, count: int, batch_size: int) -> None:
    """The network alone, on pixels that are there."""
    images = torch.rand(batch_size, 3, view_size(backbone), view_size(backbone))
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            backbone(images[: count - start])


def make_views(images: ImageSet, size: int) -> None:
    """Decoding, resize and crop alone."""
    made = EvaluationViews(images, range(len(images)), size)
    for position in range(len(images)):
        made[position]


def measure(backbone: Backbone, splits: Splits, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per image of each, median of the rounds."""
    config = EmbedConfig(batch_size=options.batch, loader=LoaderConfig(workers=options.workers))
    clock = time.perf_counter if options.workers else time.process_time
    count, size = sum(map(len, splits[:3])), view_size(backbone)

    def whole() -> None:
        with TemporaryDirectory() as folder:
            out = Path(folder) / "features.npy"
            embed_images(backbone, splits, out, pool="patch", config=config, name="benchmark")

    parts: dict[str, Callable[[], None]] = {
        "embed": whole,
        "forward": lambda: forward(backbone, count, options.batch),
        "views": lambda: [make_views(images, size) for images in splits[:3]] and None,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(options.rounds + 1):
        for name, run in parts.items():
            start = clock()
            run()
            if number:  # the first round warms up
                seconds[name].append((clock() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure both kinds of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", default="vit_small_patch16_224:random")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone, result = load_teacher(options.network, 224).backbone, {}
    with TemporaryDirectory() as name:
        write_pictures(Path(name) / "photos", options.images)
        kept = Splits(Kept(options.images), Kept(0), Kept(0), {}, "none")
        for kind, splits in {"kept": kept, "jpeg": load_images(str(Path(name) / "photos"))}.items():
            found = measure(backbone, splits, options)
            result |= {f"{kind}_{part}_per_s": 1 / value for part, value in found.items()}
            result[f"{kind}_of_forward"] = found["forward"] / found["embed"]
            result[f"{kind}_of_forward_and_views"] = (found["forward"] + found["views"]) / found["embed"]
    print(json.dumps({**result, **vars(options), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
