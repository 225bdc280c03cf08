"""Scenes on disk: one folder that is a folder of ADE20K and one of COCO 2017 at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from comad.data.bundled import load_stamps
from comad.data.images import Splits
from comad.data.scenes import Composer, Scene, SceneConfig
from comad.runtime.atomic import write_text
from comad.runtime.progress import track

PARTS = {"training": "train", "validation": "val"}
"""Names of the parts in ADE20K and in COCO."""

README = """Scenes composed by `comad data scenes` of the images bundled with comad; licences: comad's NOTICE.

images/, annotations/*/*.png, objectInfo{count}.txt   the format of ADE20K (ADEChallengeData2016); 0 is ignored
train2017/, val2017/, annotations/*.json              the format of COCO 2017

Training scenes show training concepts, validation scenes {concepts} concepts. They are drawn things on drawn backdrops:
numbers on them say nothing about photographs.
"""


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Compose images with many objects of the bundled cut-outs, labelled for segmentation and detection.

    Args:
        out: folder to write, in the formats of ADE20K and of COCO 2017.
        train: number of training scenes.
        validation: number of validation scenes.
        concepts: what these show: the bundled test concepts, or val, by which choices are made.
        seed: of everything that is drawn.
        scene: what scenes look like.
    """

    out: str
    train: int = 2400
    validation: int = 600
    concepts: Literal["test", "val"] = "test"
    seed: int = 0
    scene: SceneConfig = field(default_factory=SceneConfig)


def write_scenes(config: ScenesConfig) -> str:
    """Write the folder; returns a summary.

    Raises:
        ValueError: the folder holds something already, or a count is not positive.
    """
    root = Path(config.out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{config.out!r} is not an empty folder; pass --out with a new one.")
    if min(config.train, config.validation) < 1:
        raise ValueError("both parts need scenes; give --train and --validation of at least 1.")
    splits = load_stamps()
    names = splits.class_names["fine"]
    pixels = np.zeros((2, len(names) + 1), dtype=np.int64)
    shown = np.zeros_like(pixels)  # images that show a class
    counts = []
    for place, (part, count) in enumerate(zip(PARTS, (config.train, config.validation), strict=True)):
        images = splits.train if part == "training" else getattr(splits, config.concepts)
        composer = Composer(images, images.labels["fine"], config.scene)
        coco = _empty_coco(names, splits)
        for number in track(range(1, count + 1), f"composing {part} scenes", "scenes"):
            scene = composer(np.random.default_rng((config.seed, place, number)))
            classes = _class_map(scene)
            _write_images(root, part, number, scene, classes)
            coco["images"].append(_image(number, classes.shape))
            coco["annotations"] += _annotations(scene, number, len(coco["annotations"]) + 1)
            pixels[place] += np.bincount(classes.ravel(), minlength=len(names) + 1)
            shown[place, np.unique(classes)] += 1
        path = root / "annotations" / f"instances_{PARTS[part]}2017.json"
        write_text(path, json.dumps(coco))
        counts.append(f"{count} {part} scenes with {len(coco['annotations'])} objects")
    (root / f"objectInfo{len(names)}.txt").write_text(_object_info(names, pixels[0], shown), encoding="utf-8")
    (root / "README.txt").write_text(README.format(count=len(names), concepts=config.concepts), encoding="utf-8")
    return f"{config.out}: {', '.join(counts)}, {len(names)} classes, in the formats of ADE20K and COCO."


def _class_map(scene: Scene) -> np.ndarray:
    """ADE20K's label map: uint8 (h, w), 1 and more for classes, 0 elsewhere."""
    classes = np.array([*(thing.label + 1 for thing in scene.things), 0], dtype=np.uint8)
    return classes[scene.owner]  # -1 is the last entry


def _write_images(root: Path, part: str, number: int, scene: Scene, classes: np.ndarray) -> None:
    """Write one image, its label map, and a second name of the image for COCO."""
    name = f"{number:012}"
    image, labels = root / "images" / part / f"{name}.jpg", root / "annotations" / part / f"{name}.png"
    second = root / f"{PARTS[part]}2017" / f"{name}.jpg"
    for path in (image, labels, second):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.pixels).save(image, quality=92)
    Image.fromarray(classes).save(labels)
    try:
        os.link(image, second)
    except OSError:  # a file system without hard links
        shutil.copyfile(image, second)


def _image(number: int, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012}.jpg", "height": shape[0], "width": shape[1], "license": 1}


def _annotations(scene: Scene, image: int, first: int) -> Iterator[dict[str, Any]]:
    """COCO's annotations: the visible part of each thing, as uncompressed run lengths."""
    for number, thing in enumerate(scene.things):
        mask = scene.owner == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
        yield {
            "id": first + number,
            "image_id": image,
            "category_id": thing.label + 1,
            "segmentation": run_lengths(mask),
            "area": int(mask.sum()),
            "bbox": [int(columns[0]), int(rows[0]), int(width), int(height)],
            "iscrowd": int(thing.crowd),
        }


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a bool mask (h, w): down the columns, first the zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F")])  # a leading zero, for the first run is of zeros
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[1], changes, [len(flat)]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def _empty_coco(names: tuple[str, ...], splits: Splits) -> dict[str, Any]:
    fine, coarse = splits.train.labels["fine"], splits.train.labels["coarse"]
    groups = [splits.class_names["coarse"][int(coarse[fine == label].mode().values)] for label in range(len(names))]
    return {
        "info": {"description": "Scenes composed by comad data scenes", "version": "1.0"},
        "licenses": [{"id": 1, "name": splits.licence, "url": ""}],
        "images": [],
        "annotations": [],
        "categories": [
            {"id": label + 1, "name": name, "supercategory": group}
            for label, (name, group) in enumerate(zip(names, groups, strict=True))
        ],
    }


def _object_info(names: tuple[str, ...], pixels: np.ndarray, shown: np.ndarray) -> str:
    """ADE20K's list of classes: number, share of the labelled pixels, images that show it, whether stuff, name."""
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for label, name in enumerate(names, start=1):
        share = pixels[label] / max(1, pixels[1:].sum())
        lines.append(f"{label}\t{share:.4f}\t{shown[0, label]}\t{shown[1, label]}\t0\t{name}")
    return "\n".join(lines) + "\n"
