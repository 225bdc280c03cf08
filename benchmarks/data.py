"""Views per second of one core, ours against torchvision's ImageFolder and v2 transforms: 500 × 375 JPEG at 224 px.

Both decode the same files, and crop, resize (bicubic, antialias), flip and change colours with the same settings. The
rounds are interleaved and count the CPU seconds of this process, so that other processes disturb them little. Parts of
our pipeline are measured alone, and the demo's view of a stamp. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision
from torchvision.transforms import InterpolationMode, v2

from comad.data.bundled import load_stamps
from comad.data.decoding import jpeg_library
from comad.data.folders import FolderImages
from comad.data.loader import ViewDataset
from comad.data.transforms import ColourChange, Crop
from comad.distill.setup import DistillViews
from pictures import write_pictures

SCALE, STRENGTH, HUE, SIZE = (0.25, 1.0), 0.4, 0.1, 224


def theirs(folder: Path, colours: bool) -> Callable[[Sequence[int]], object]:
    """torchvision as its documentation has it: decoded by Pillow, transformed as tensors."""
    crop = v2.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
    jitter = [v2.RandomApply([v2.ColorJitter(STRENGTH, STRENGTH, STRENGTH, HUE)], 0.8)] if colours else []
    data = torchvision.datasets.ImageFolder(
        str(folder), v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(), *jitter])
    )
    return lambda numbers: [data[i] for i in numbers]


def ours(images: FolderImages, colours: bool) -> Callable[[Sequence[int]], object]:
    """What a worker of a distillation does: also the noise of the masks, and a random state per sample."""
    colour = ColourChange(strength=STRENGTH, hue=HUE) if colours else None
    data = ViewDataset(images, DistillViews(Crop(size=SIZE, scale=SCALE), colour, (4, 196)), 0, 2 * SIZE)
    return lambda numbers: data.__getitems__([(0, i) for i in numbers])


def parts(images: FolderImages) -> dict[str, Callable[[Sequence[int]], object]]:
    """Our pipeline piece by piece, and a stamp as the demo sees it."""
    stamps, crop = load_stamps().train, Crop(size=SIZE, scale=SCALE)
    small = ViewDataset(stamps, DistillViews(Crop(size=48), ColourChange(), (4, 36)), 0, 96)
    picture, colour = images.load(0, 2 * SIZE), ColourChange(strength=STRENGTH, hue=HUE, jitter=1.0)
    view = crop(picture)
    for i in range(len(images)):
        small[0, i]  # a stamp is decoded once
    return {
        "decode": lambda numbers: [images.load(i, 2 * SIZE) for i in numbers],
        "crop": lambda numbers: [crop(picture) for _ in numbers],
        "colour": lambda numbers: [colour(view) for _ in numbers],
        "stamp": lambda numbers: small.__getitems__([(0, i) for i in numbers]),
    }


def main() -> None:
    """Measure everything in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = write_pictures(Path(name) / "class", options.images).parent
        files = sorted(path.name for path in (folder / "class").iterdir())
        images = FolderImages("images", folder / "class", files)
        measured = {
            "torchvision": theirs(folder, False),
            "ours": ours(images, False),
            "torchvision_colours": theirs(folder, True),
            "ours_colours": ours(images, True),
            **parts(images),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(options.rounds):
            for name, run in measured.items():
                start = time.process_time()
                run(range(options.images))
                seconds[name].append((time.process_time() - start) / options.images)
    result: dict[str, object] = {f"{name}_per_s": 1 / statistics.median(values) for name, values in seconds.items()}
    for kind in ("", "_colours"):
        pairs = zip(seconds[f"torchvision{kind}"], seconds[f"ours{kind}"], strict=True)
        result[f"times_torchvision{kind}"] = statistics.median(other / own for other, own in pairs)
    decoder = "simplejpeg" if jpeg_library() else "Pillow"
    print(json.dumps({**result, "decoder": decoder, "torch": torch.__version__, "device": "cpu, 1 thread"}))


if __name__ == "__main__":
    main()
