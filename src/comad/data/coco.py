"""Folders in the format of COCO 2017: pictures and a JSON file of their objects, with polygons or run lengths."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.images import UnreadableImageError

LAYOUT = "train2017/*.jpg, val2017/*.jpg and annotations/instances_{train,val}2017.json"


class Picture(NamedTuple):
    """One entry of the JSON file."""

    id: int
    file: str
    height: int
    width: int


class Instance(NamedTuple):
    """One object. ``segmentation`` is a list of polygons, or run lengths; ``label`` counts from 1."""

    label: int
    segmentation: Any
    crowd: bool


class DetectionImages:
    """One part of such a folder.

    Attributes:
        annotations: the JSON file.
        pictures: what it lists, less ``missing``.
        instances: the objects of each picture, crowd regions too.
        categories: ids of the classes in the file; label n is the n-th, 0 is the background.
        class_names: their names.
        missing: files that the JSON lists and the folder lacks.
        skipped: reason → number of objects left out.
    """

    def __init__(self, root: Path, part: str):
        self.folder = root / f"{part}2017"
        self.annotations = root / "annotations" / f"instances_{part}2017.json"
        content = _read(self.annotations, root)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.categories = [category["id"] for category in categories]
        self.class_names = tuple(str(category["name"]) for category in categories)
        self.skipped: Counter[str] = Counter()
        listed = [Picture(x["id"], x["file_name"], x["height"], x["width"]) for x in content["images"]]
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        self.pictures = [picture for picture in listed if picture.file in present]
        self.missing = [picture.file for picture in listed if picture.file not in present]
        if not self.pictures:
            raise ValueError(f"{self.annotations} fits no picture of {self.folder}; the format is {LAYOUT}.")
        known = self._instances(content["annotations"], {picture.id: picture for picture in listed})
        self.instances = [known[picture.id] for picture in self.pictures]

    def _instances(self, annotations: list[dict], pictures: dict[int, Picture]) -> dict[int, list[Instance]]:
        """The objects of each picture; those that cannot be used are counted."""
        labels = {category: number for number, category in enumerate(self.categories, start=1)}
        found: dict[int, list[Instance]] = defaultdict(list)
        for entry in annotations:
            picture = pictures.get(entry["image_id"])
            reason = _fault(entry, picture, labels)
            if reason or picture is None:
                self.skipped[reason] += 1
                continue
            crowd = bool(entry.get("iscrowd", 0))
            found[picture.id].append(Instance(labels[entry["category_id"]], entry["segmentation"], crowd))
        if annotations and not found:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise ValueError(f"{self.annotations}: not one of its objects can be used: {reasons}; use another file.")
        return found

    def __len__(self) -> int:
        return len(self.pictures)

    def path(self, index: int) -> str:
        """The file of a picture."""
        return str(self.folder / self.pictures[index].file)

    def load_picture(self, index: int) -> Tensor:
        """A picture, uint8 (3, h, w).

        Raises:
            UnreadableImageError: the file is missing or damaged, or not of the size that the JSON says.
        """
        picture = self.pictures[index]
        try:
            with Image.open(self.path(index)) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableImageError(f"{self.path(index)}: {error}") from error
        if pixels.shape[:2] != (picture.height, picture.width):
            raise UnreadableImageError(f"{self.path(index)}: {_sizes(pixels.shape[:2], picture)}")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def load(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A picture, uint8 (3, h, w); masks, uint8 (n, h, w), and labels, int64 (n,), of its objects but for crowds.

        Raises:
            UnreadableImageError: see `load_picture`.
        """
        image, picture = self.load_picture(index), self.pictures[index]
        objects = [instance for instance in self.instances[index] if not instance.crowd]
        masks = [decode_mask(instance.segmentation, picture.height, picture.width) for instance in objects]
        stacked = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        return image, (stacked, torch.tensor([instance.label for instance in objects], dtype=torch.int64))

    def check_pictures(self) -> None:
        """Decode every picture once, and compare its size with the JSON.

        Raises:
            ValueError: a picture is missing or damaged, or of another size.
        """
        if self.missing:
            what = f"{len(self.missing)} pictures that {self.annotations.name} lists, such as {self.missing[0]}"
            raise ValueError(f"{self.folder} lacks {what}; complete the folder.")
        for index, picture in enumerate(self.pictures):
            try:
                with Image.open(self.path(index)) as image:
                    size = image.height, image.width
                    image.load()
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"{self.path(index)} cannot be read; restore it: {error}") from error
            if size != (picture.height, picture.width):
                raise ValueError(f"{self.path(index)}: {_sizes(size, picture)}")


class DetectionSplits(NamedTuple):
    """Both parts, and the names of the classes in order."""

    train: DetectionImages
    validation: DetectionImages
    class_names: tuple[str, ...]


def load_coco(data: str) -> DetectionSplits:
    """Open a folder in the published format.

    Raises:
        ValueError: it is no such folder, or its two JSON files have other classes.
    """
    root = Path(data).expanduser()
    train, validation = DetectionImages(root, "train"), DetectionImages(root, "val")
    if (train.categories, train.class_names) != (validation.categories, validation.class_names):
        raise ValueError(f"{data!r}: its two JSON files list other categories; use two of one data set.")
    return DetectionSplits(train, validation, train.class_names)


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """A mask, uint8 (height, width), of polygons, run lengths or compressed run lengths, as COCO's tools draw it."""
    masks = coco_tools("mask")
    if isinstance(segmentation, list):
        return torch.from_numpy(masks.decode(masks.merge(masks.frPyObjects(segmentation, height, width))))
    if isinstance(segmentation["counts"], list):
        segmentation = masks.frPyObjects(segmentation, height, width)
    return torch.from_numpy(masks.decode(segmentation))


def coco_tools(part: str) -> Any:
    """A module of faster-coco-eval.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(f"faster_coco_eval.core.{part}")
    except ModuleNotFoundError as error:
        raise ValueError("COCO's format needs faster-coco-eval; pip install 'comad[dense]'.") from error


def _read(path: Path, root: Path) -> dict[str, Any]:
    """The JSON file, with the three lists that the format has.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if not path.is_file():
        raise ValueError(
            f"{str(root)!r} is no folder of COCO's format; it needs {LAYOUT} (comad data scenes makes one)."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields = {"images": {"id", "file_name", "height", "width"}, "annotations": {"image_id", "category_id"}}
        fields["categories"] = {"id", "name"}
        good = all(needed <= entry.keys() for name, needed in fields.items() for entry in content[name])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON of COCO's format; restore the published file.") from error
    if not good or not content["categories"]:
        raise ValueError(f"{path}: entries without the fields of COCO's format; restore the published file.")
    return content


def _fault(entry: dict[str, Any], picture: Picture | None, labels: dict[int, int]) -> str:
    """Why an object cannot be used; empty if it can."""
    if picture is None:
        return "of pictures that are not listed"
    if entry["category_id"] not in labels:
        return "of categories that are not listed"
    left, top, width, height = entry.get("bbox", (0, 0, 0, 0))
    seen = min(left + width, picture.width) - max(left, 0), min(top + height, picture.height) - max(top, 0)
    if min(seen) <= 0:
        return "with a box outside the picture"
    return _mask_fault(entry.get("segmentation"), picture)


def _mask_fault(segmentation: Any, picture: Picture) -> str:
    if isinstance(segmentation, list) and segmentation:
        return "" if all(len(polygon) >= 6 for polygon in segmentation) else "with a polygon of fewer than 3 points"
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= segmentation.keys():
        return "without a mask"
    return "" if list(segmentation["size"]) == [picture.height, picture.width] else "with a mask of another size"


def _sizes(size: tuple[int, ...], picture: Picture) -> str:
    found = f"the file has {size[0]} × {size[1]} pixels, the JSON says {picture.height} × {picture.width}"
    return f"{found}; use the pictures that belong to it."
