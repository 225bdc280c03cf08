"""Folders in the format of COCO 2017: images and a JSON file of their objects, with polygons or run lengths.

Nothing in the JSON is trusted. An object that cannot be used is left out, counted and told by its id; an image or a
category without what it needs ends the reading in one line.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.decoding import UnreadableImageError, load_file
from comad.data.identity import file_size, writable
from comad.data.summary import Summary, dense_text

LAYOUT = "train2017/*.jpg, val2017/*.jpg and annotations/instances_{train,val}2017.json"
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Of an image in the JSON; Pillow decodes no larger one."""
CLOSE, APART = 0.9, 0.5
"""Overlap from which a box is that of its mask, and below which it is not, unless it is around it."""
Id = int | str


class ImageRecord(NamedTuple):
    """One entry of the JSON file."""

    id: Id
    file: str
    height: int
    width: int


class Instance(NamedTuple):
    """One object.

    Attributes:
        label: from 1 on.
        segmentation: a list of polygons, or run lengths.
        crowd: whether it is a region of many.
        box: left, top, width, height; None: the JSON has none.
        area: pixels; None: the JSON has none.
    """

    label: int
    segmentation: Any
    crowd: bool
    box: list[float] | None = None
    area: float | None = None


class DetectionImages:
    """One part of such a folder.

    Attributes:
        annotations: the JSON file.
        records: the images that it lists, less ``missing``.
        instances: the objects of each image, crowd regions too.
        categories: ids of the classes in the file; label n is the n-th, 0 is the background.
        class_names: their names.
        missing: files that the JSON lists and the folder lacks.
        box_notes: what was done with boxes that are not around their masks.
        skipped: reason → number of objects left out.
        examples: reason → which object was the first.
    """

    def __init__(self, root: Path, part: str):
        self.folder = root / f"{part}2017"
        self.annotations = root / "annotations" / f"instances_{part}2017.json"
        content = _read(self.annotations, root)
        classes = sorted(_categories(content["categories"], self.annotations).items(), key=_by_id)
        self.categories = [number for number, _ in classes]
        self.class_names = tuple(name for _, name in classes)
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        listed = list(_records(content["images"], self.annotations))
        there = [os.path.isfile(self.folder / record.file) for record in listed]  # False also of impossible names
        self.records = [record for record, found in zip(listed, there, strict=True) if found]
        self.missing = [writable(record.file) for record, found in zip(listed, there, strict=True) if not found]
        if not self.records:
            raise ValueError(f"{self.annotations} fits no image of {self.folder}; the format is {LAYOUT}.")
        known = self._instances(content["annotations"], {record.id: record for record in listed})
        self.instances = [known[record.id] for record in self.records]
        self.box_notes = list(self._correct_boxes())

    def _correct_boxes(self) -> Iterator[str]:
        """Hold boxes against masks. Corners are read as such; a box that is not around its mask gives way to that."""
        places = [
            (record, found, number)
            for record, found in zip(self.records, self.instances, strict=True)
            for number, instance in enumerate(found)
            if instance.box is not None
        ]
        boxes = np.array([found[number].box for _, found, number in places], dtype=np.float64).reshape(-1, 4)
        masks = np.array([_extent(found[number].segmentation, record) for record, found, number in places])
        masks = masks.reshape(-1, 4)
        corners, sized = boxes, np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        if (_overlap(corners, masks) > CLOSE).sum() > (_overlap(sized, masks) > CLOSE).sum():
            sized = corners
            for found in self.instances:
                found[:] = [part if part.box is None else part._replace(box=_sized(part.box)) for part in found]
            yield "boxes are left, top, right and bottom, not left, top, width and height; they are read as such"
        around = (sized[:, :2] <= masks[:, :2] + 2).all(axis=1) & (sized[:, 2:] >= masks[:, 2:] - 2).all(axis=1)
        wrong = np.flatnonzero(~around & (_overlap(sized, masks) < APART))
        for place in wrong:
            _, found, number = places[place]
            found[number] = found[number]._replace(box=None)
        if len(wrong):
            yield f"{len(wrong)} boxes are not around their masks and left out"

    def _instances(self, entries: list[Any], records: dict[Id, ImageRecord]) -> dict[Id, list[Instance]]:
        """The objects of each image; those that cannot be used are counted."""
        labels = {category: number for number, category in enumerate(self.categories, start=1)}
        found: dict[Id, list[Instance]] = {number: [] for number in records}
        for place, entry in enumerate(entries):
            image_id = _identifier(entry.get("image_id")) if isinstance(entry, dict) else None
            instance = _instance(entry, records.get(image_id) if image_id is not None else None, labels)
            if isinstance(instance, str):
                self.skipped[instance] += 1
                name = entry.get("id", f"number {place}") if isinstance(entry, dict) else f"number {place}"
                self.examples.setdefault(instance, f"{str(name)[:40]} of image {image_id}")
            elif image_id is not None:
                found[image_id].append(instance)
        if entries and not any(found.values()):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise ValueError(f"{self.annotations}: not one of its objects can be used: {reasons}; use another file.")
        return found

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> str:
        """The file of an image."""
        return str(self.folder / self.records[index].file)

    def key(self, index: int) -> str:
        """Name one image wherever the set lies."""
        return self.records[index].file

    def content_numbers(self) -> np.ndarray:
        """int64 (n,): bytes of the images."""
        return np.array([file_size(self.path(index)) for index in range(len(self))], dtype=np.int64)

    @property
    def labels(self) -> dict[str, Tensor]:
        """What tells the objects of an image from others: a checksum over classes, boxes and areas.

        Masks are gone through only where one of these is missing, for there are gigabytes of them.
        """
        plain = [[part if None in part[3:] else (part[0], *part[2:]) for part in found] for found in self.instances]
        return {"objects": torch.tensor([zlib.crc32(repr(part).encode()) for part in plain])}

    def load_image(self, index: int) -> Tensor:
        """An image, uint8 (3, h, w), turned as its EXIF data asks, unless only the unturned one has the JSON's size.

        Raises:
            UnreadableImageError: the file is missing or damaged, or not of the size that the JSON says.
        """
        record, path = self.records[index], self.path(index)
        expected = (record.height, record.width)
        image = load_file(path)
        if image.shape[1:] != expected:
            unturned = load_file(path, upright=False)
            if unturned.shape[1:] != expected:
                raise UnreadableImageError(f"{path}: {_sizes(image.shape[1:], record)}")
            return unturned
        return image

    def load(self, index: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """An image, uint8 (3, h, w); masks, uint8 (n, h, w), and labels, int64 (n,), of its objects but for crowds.

        Raises:
            UnreadableImageError: see `load_image`.
        """
        image, record = self.load_image(index), self.records[index]
        objects = [instance for instance in self.instances[index] if not instance.crowd]
        masks = [decode_mask(instance.segmentation, record.height, record.width) for instance in objects]
        stacked = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        return image, (stacked, torch.tensor([instance.label for instance in objects], dtype=torch.int64))

    def as_coco(self) -> dict[str, Any]:
        """What `records` and `instances` hold in COCO's format, for scoring.

        Images, categories and objects have numbers from 1 on: ids of files repeat, and a scorer needs them unique.
        """
        truth: dict[str, Any] = {"images": [], "annotations": []}
        truth["categories"] = [{"id": label} for label in range(1, len(self.categories) + 1)]
        masks = coco_tools("mask")
        for number, (record, instances) in enumerate(zip(self.records, self.instances, strict=True), start=1):
            truth["images"].append({"id": number, "height": record.height, "width": record.width})
            for label, segmentation, crowd, box, area in instances:
                lengths = encode_mask(segmentation, record.height, record.width) if None in (box, area) else None
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": number,
                        "category_id": label,
                        "segmentation": segmentation,
                        "iscrowd": int(crowd),
                        "bbox": masks.toBbox(lengths).tolist() if box is None else box,
                        "area": float(masks.area(lengths)) if area is None else area,
                    }
                )
        return truth

    def check_images(self) -> None:
        """Decode every image once, compare its size with the JSON, and make the scorer's truth.

        Raises:
            ValueError: an image is missing or damaged, or of another size.
        """
        if self.missing:
            what = f"{len(self.missing)} images that {self.annotations.name} lists, such as {self.missing[0]}"
            raise ValueError(f"{self.folder} lacks {what}; complete the folder.")
        for index in range(len(self)):
            try:
                self.load_image(index)
            except UnreadableImageError as error:
                raise ValueError(f"{error}; the image cannot be read; restore it.") from error
        self.as_coco()

    def notes(self) -> list[str]:
        """What of the file is not used, one sentence each."""
        name = self.annotations.name
        lines = [
            f"{name}: {count} objects {reason} are left out, the first {self.examples[reason]}; correct the file."
            for reason, count in self.skipped.items()
        ]
        lines += [f"{name}: {note}." for note in self.box_notes]
        boxless = sum(instance.box is None for found in self.instances for instance in found)
        if boxless:
            lines.append(f"{name}: {boxless} objects have no box; theirs is that of the mask.")
        if self.missing:
            lines.append(
                f"{len(self.missing)} images are not in {self.folder}, such as {self.missing[0]}; they are left out."
            )
        return lines


class DetectionSplits(NamedTuple):
    """Both parts, and the names of the classes in order."""

    train: DetectionImages
    validation: DetectionImages
    class_names: tuple[str, ...]

    def summary(self) -> Summary:
        """What is there and what is left out."""
        parts = {"train": self.train, "validation": self.validation}
        counts = {
            name: Counter(instance.label for found in images.instances for instance in found)
            for name, images in parts.items()
        }
        facts: dict[str, Any] = {
            "images": {name: len(images) for name, images in parts.items()},
            "objects": {name: count.total() for name, count in counts.items()},
            "classes": len(self.class_names),
            "classes_without_training": [
                self.class_names[label - 1] for label in sorted(counts["validation"].keys() - counts["train"].keys())
            ],
            "notes": self.train.notes() + self.validation.notes(),
        }
        return Summary(dense_text(self.train.folder.parent.name, facts), facts)


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


def encode_mask(segmentation: Any, height: int, width: int) -> Any:
    """Compressed run lengths of polygons, run lengths or compressed run lengths, as COCO's tools draw them."""
    masks = coco_tools("mask")
    if isinstance(segmentation, list):
        return masks.merge(masks.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return masks.frPyObjects(segmentation, height, width)
    return segmentation


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """The mask, uint8 (height, width), of the same."""
    return torch.from_numpy(coco_tools("mask").decode(encode_mask(segmentation, height, width)))


def coco_tools(part: str) -> Any:
    """A module of faster-coco-eval.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(f"faster_coco_eval.core.{part}")
    except ModuleNotFoundError as error:
        raise ValueError("COCO's format needs faster-coco-eval; pip install 'comad[dense]'.") from error


def _read(path: Path, root: Path) -> dict[str, list[Any]]:
    """The JSON file, with the three lists that the format has.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if not path.is_file():
        raise ValueError(
            f"{str(root)!r} is no folder of COCO's format; it needs {LAYOUT} (comad data scenes makes one)."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        lists = {name: content[name] for name in ("images", "annotations", "categories")}
        if not all(isinstance(entries, list) for entries in lists.values()):
            raise TypeError("entries are no lists")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON of COCO's format; restore the published file.") from error
    return lists


def _categories(entries: list[Any], path: Path) -> dict[Id, str]:
    found: dict[Id, str] = {}
    for place, entry in enumerate(entries):
        number = _identifier(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or "name" not in entry:
            raise ValueError(f"{path}: category number {place} has no id or no name; restore the published file.")
        if number in found:
            raise ValueError(f"{path}: two categories have the id {number}; give each its own.")
        found[number] = writable(str(entry["name"]))
    if not found:
        raise ValueError(f"{path}: no categories; restore the published file.")
    return found


def _by_id(item: tuple[Id, str]) -> tuple[bool, Id]:
    return isinstance(item[0], str), item[0]


def _records(entries: list[Any], path: Path) -> Iterator[ImageRecord]:
    """The images; one that cannot be told from others, found or bounded is an error."""
    seen: set[Id] = set()
    for place, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        number, file = _identifier(entry.get("id")), entry.get("file_name")
        where = f"{path}: image {number if number is not None else f'number {place}'}"
        if number is None or not isinstance(file, str) or not file:
            raise ValueError(f"{where} has no id or no file_name; restore the published file.")
        if number in seen:
            raise ValueError(f"{where} is listed twice; give each image an id of its own.")
        seen.add(number)
        if _leaves(file):
            raise ValueError(f"{where}: file_name {file[:80]!r} leaves the folder; use names relative to it.")
        height, width = _whole(entry.get("height")), _whole(entry.get("width"))
        if height is None or width is None or min(height, width) < 1 or height * width > MAX_PIXELS:
            size = f"{str(entry.get('height'))[:20]} × {str(entry.get('width'))[:20]}"
            raise ValueError(f"{where} ({file[:80]}) has a size of {size} pixels; correct the file.")
        yield ImageRecord(number, file, height, width)


def _leaves(file: str) -> bool:
    """Whether a name may lead out of its folder, on any system."""
    path = PurePosixPath(file.replace("\\", "/"))
    return not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in file


def _instance(entry: Any, record: ImageRecord | None, labels: dict[Id, int]) -> Instance | str:
    """An object, or why it cannot be used."""
    if record is None:
        return "of images that are not listed"
    category = _identifier(entry.get("category_id"))
    if category is None or category not in labels:
        return "of categories that are not listed"
    crowd = CROWD.get(str(entry.get("iscrowd")).strip().lower())
    if crowd is None:
        return "with an iscrowd that is neither 0 nor 1"
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, list) and segmentation and not isinstance(segmentation[0], list):
        segmentation = [segmentation]  # one polygon without its list
    elif isinstance(segmentation, dict) and segmentation.get("size") == [record.height, record.width]:
        segmentation = {"size": [record.height, record.width], "counts": segmentation.get("counts")}
    box, area = entry.get("bbox"), entry.get("area")
    reason = _box_fault(box, record) or _mask_fault(segmentation, record)
    if reason:
        return reason
    return Instance(labels[category], segmentation, crowd, box, area if _are_numbers([area], 0, MAX_PIXELS) else None)


def _extent(segmentation: Any, record: ImageRecord) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a mask."""
    if isinstance(segmentation, list):
        x, y = [v for part in segmentation for v in part[::2]], [v for part in segmentation for v in part[1::2]]
        return min(x), min(y), max(x), max(y)
    left, top, w, h = coco_tools("mask").toBbox(encode_mask(segmentation, record.height, record.width)).tolist()
    return left, top, left + w, top + h


def _sized(corners: list[Any]) -> list[Any]:
    left, top, right, bottom = corners
    return [left, top, right - left, bottom - top]


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes by their corners, (n, 4) each; 0 for one without an area."""
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (one, other)]
    return common / np.maximum(sum(areas) - common, 1e-9)


CROWD = {"none": False, "0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True, "": False}


def _box_fault(box: Any, record: ImageRecord) -> str:
    """Why a box cannot be used; empty if it can, or if there is none."""
    if box is None:
        return ""
    far = 3 * max(record.height, record.width)
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return "with a box that is not four numbers"
    left, top, width, height = box
    seen = min(left + width, record.width) - max(left, 0), min(top + height, record.height) - max(top, 0)
    return "" if min(seen) > 0 and max(map(abs, box)) <= far else "with a box outside the image"


def _mask_fault(segmentation: Any, record: ImageRecord) -> str:
    if isinstance(segmentation, list) and segmentation:
        return next((fault for polygon in segmentation if (fault := _polygon_fault(polygon, record))), "")
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= segmentation.keys():
        return "without a mask"
    if segmentation["size"] != [record.height, record.width]:
        return "with a mask of another size"
    counts = segmentation["counts"]
    lengths = run_lengths_of(counts) if isinstance(counts, str) else counts
    if isinstance(lengths, list) and set(map(type, lengths)) <= {int} and min(lengths, default=-1) >= 0:
        return "" if sum(lengths) == record.height * record.width else "with run lengths that do not fill the image"
    return "with run lengths that are no lengths"


def _polygon_fault(polygon: Any, record: ImageRecord) -> str:
    side = max(record.height, record.width)
    if not isinstance(polygon, list) or len(polygon) % 2 or not polygon:
        return "with a polygon that is not pairs of numbers"
    if not _are_numbers(polygon, -side, 2 * side):
        return f"with a polygon {'far outside the image' if _are_numbers(polygon) else 'that is not pairs of numbers'}"
    if len(polygon) < 6:
        return "with a polygon of fewer than 3 points"
    most = 4 * record.height * record.width  # drawing takes memory for every pixel of the outline
    if len(polygon) * 2 * side <= most:
        return ""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    outline = sum(max(abs(x - left), abs(y - top)) for (x, y), (left, top) in pairs)
    return "" if outline <= most else "with a polygon that crosses the image too often"


def _are_numbers(values: list[Any], low: int | float = -1e15, high: int | float = 1e15) -> bool:
    """Whether all are finite numbers in a range; it is quick, for there are millions."""
    try:
        numbers = set(map(type, values)) <= {int, float} and math.isfinite(sum(values))
    except OverflowError:  # a whole number that no float can hold
        return False
    return numbers and low <= min(values) and max(values) <= high


def run_lengths_of(text: str) -> list[int] | None:
    """Lengths of compressed run lengths; None if the text is none.

    A length is written in digits of 5 bits, the lowest first, each the code of a character less 48: bit 5 says that
    another digit follows, bit 4 of the last is the sign. From the fourth on it is the difference to the one two before.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for code in map(ord, text):
        digit = code - 48
        if not 0 <= digit < 64 or shift > 30:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    return None if shift else lengths


def _identifier(value: Any) -> Id | None:
    """An id: a whole number, also one written as text or 3.0, or another text; None if it is neither."""
    number = _whole(value)
    return number if number is not None else (value if isinstance(value, str) and value else None)


def _whole(value: Any) -> int | None:
    """A whole number, also as text or float; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value) if isinstance(value, float) else int(value)
        return int(number) if number == int(number) else None
    except (ValueError, OverflowError):
        return None


def _sizes(size: tuple[int, ...], record: ImageRecord) -> str:
    found = f"the file has {size[0]} × {size[1]} pixels, the JSON says {record.height} × {record.width}"
    return f"{found}; use the images that belong to it."
