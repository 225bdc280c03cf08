"""Folders in the format of ADE20K's scene parsing benchmark (ADEChallengeData2016): images and label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from comad.data.decoding import UnreadableImageError, check_label_map, load_file, load_label_map
from comad.data.identity import file_size
from comad.data.summary import Summary, dense_text

IGNORED = 255
"""What a pixel without a class is in our label maps; in the files it is 0."""
THINNEST = 64
"""Times that a side may be as long as the other one: views and windows are as high as the shorter side is made."""
LAYOUT = "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png and objectInfo150.txt"


class SegmentationImages:
    """One part of such a folder.

    Args:
        root: the folder.
        part: "training" or "validation".
        num_classes: classes in the list.
    """

    def __init__(self, root: Path, part: str, num_classes: int, names: Sequence[str]):
        self.root = root
        self.part = part
        self.num_classes = num_classes
        self.names = np.array(names, dtype=np.str_)  # one block of memory, cheap to share with worker processes

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """The file of an image."""
        return str(self.root / "images" / self.part / f"{self.names[index]}.jpg")

    def label_path(self, index: int) -> str:
        """The file of its label map."""
        return str(self.root / "annotations" / self.part / f"{self.names[index]}.png")

    def key(self, index: int) -> str:
        """Name one image wherever the set lies."""
        return str(self.names[index])

    def content_numbers(self) -> np.ndarray:
        """int64 (n,): bytes of the images."""
        return np.array([file_size(self.path(index)) for index in range(len(self))], dtype=np.int64)

    @property
    def labels(self) -> dict[str, Tensor]:
        """What tells label maps apart: bytes of their files."""
        return {"map": torch.tensor([file_size(self.label_path(index)) for index in range(len(self))])}

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """An image, uint8 (3, h, w), and its classes, uint8 (h, w), from 0 on, `IGNORED` where there is none.

        The image is turned as its EXIF data asks, unless only the unturned one has the size of the label map.

        Raises:
            UnreadableImageError: a file is missing or damaged, or the two do not fit.
        """
        classes = load_label_map(self.label_path(index))
        image = load_file(self.path(index))
        if image.shape[1:] != classes.shape:
            unturned = load_file(self.path(index), upright=False)
            image = unturned if unturned.shape[1:] == classes.shape else image
        self._check(index, tuple(image.shape[1:]), classes)
        return image, torch.from_numpy(classes.astype(np.uint8) - np.uint8(1))

    def _check(self, index: int, size: tuple[int, ...], classes: np.ndarray) -> None:
        where = self.label_path(index)
        if classes.shape != size:
            raise UnreadableImageError(
                f"{where}: a label map of {_by(classes.shape)}, its image {_by(size)}; replace it by one that fits"
            )
        low, high = int(classes.min(initial=0)), int(classes.max(initial=0))
        if low < 0 or high > self.num_classes:
            found = f"class {high if low >= 0 else low}, but the list has {self.num_classes} classes"
            raise UnreadableImageError(f"{where}: {found}; correct one of them")
        longer, shorter = max(size), min(size)
        if longer > THINNEST * shorter:
            raise UnreadableImageError(f"{where}: {_by(size)} pixels are too thin to be resized; remove the image")

    def check_images(self) -> None:
        """Decode all images and label maps once.

        Raises:
            ValueError: a file is missing or damaged, two differ in size, or a class is not in the list.
        """
        for index in range(len(self)):
            try:
                self.load(index)
            except UnreadableImageError as error:
                raise ValueError(f"{error}; the image cannot be used: restore or remove it.") from error

    def check_label_maps(self) -> None:
        """Look at the headers of all label maps, which takes seconds.

        Raises:
            ValueError: one has colours.
        """
        for index in range(len(self)):
            try:
                check_label_map(self.label_path(index))
            except UnreadableImageError as error:
                raise ValueError(f"{error}.") from error


class SegmentationSplits(NamedTuple):
    """Both parts, and the names of the classes in order."""

    train: SegmentationImages
    validation: SegmentationImages
    class_names: tuple[str, ...]

    def summary(self) -> Summary:
        """What is there."""
        images = {"train": len(self.train), "validation": len(self.validation)}
        facts = {"images": images, "classes": len(self.class_names)}
        return Summary(dense_text(self.train.root.name, facts), facts)


def load_ade20k(data: str) -> SegmentationSplits:
    """Open a folder in the published format; the number of classes is that of its ``objectInfo*.txt``.

    Raises:
        ValueError: it is no such folder, an image has no label map, or a label map no image.
    """
    root = Path(data).expanduser()
    lists = sorted(path for path in root.glob("objectInfo*.txt") if path.is_file())
    if len(lists) != 1:
        raise ValueError(f"{data!r} is no folder of ADE20K's format; it needs {LAYOUT} (comad data scenes makes one).")
    class_names = _class_names(lists[0])
    train, validation = (
        SegmentationImages(root, part, len(class_names), _pairs(root, part)) for part in ("training", "validation")
    )
    return SegmentationSplits(train, validation, class_names)


def _class_names(path: Path) -> tuple[str, ...]:
    """The last column of a list whose first one is a number."""
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text in UTF-8; restore the published file: {error}") from error
    rows = [line for line in lines if line[0].strip().isdigit()]
    if not rows or [int(line[0]) for line in rows] != list(range(1, len(rows) + 1)) or len(rows) >= IGNORED:
        raise ValueError(f"{path}: no list of classes 1, 2, ... (fewer than {IGNORED}); restore the published file.")
    return tuple(line[-1].strip() for line in rows)


def _pairs(root: Path, part: str) -> list[str]:
    """Names of the images, each with its label map."""
    images = {path.stem for path in (root / "images" / part).glob("*.jpg")}
    maps = {path.stem for path in (root / "annotations" / part).glob("*.png")}
    if not images and not maps:
        raise ValueError(f"{str(root)!r}: no images of {part}; the format is {LAYOUT}.")
    if alone := sorted(images ^ maps):
        folder = "annotations" if alone[0] in images else "images"
        raise ValueError(
            f"{str(root)!r}: {len(alone)} files of {part} are alone, such as {alone[0]}; add its fellow in {folder}."
        )
    return sorted(images)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
