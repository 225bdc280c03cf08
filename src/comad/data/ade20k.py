"""Folders in the format of ADE20K's scene parsing benchmark (ADEChallengeData2016): pictures and label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.images import UnreadableImageError

IGNORED = 255
"""What a pixel without a class is in our label maps; in the files it is 0."""
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
        """The file of a picture."""
        return str(self.root / "images" / self.part / f"{self.names[index]}.jpg")

    def label_path(self, index: int) -> str:
        """The file of its label map."""
        return str(self.root / "annotations" / self.part / f"{self.names[index]}.png")

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """A picture, uint8 (3, h, w), and its classes, uint8 (h, w), from 0 on, `IGNORED` where there is none.

        Raises:
            UnreadableImageError: a file is missing or damaged, or the two do not fit.
        """
        try:
            with Image.open(self.path(index)) as picture, Image.open(self.label_path(index)) as labels:
                pixels, classes = np.array(picture.convert("RGB")), np.array(labels)
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableImageError(f"{self.path(index)} or its label map: {error}") from error
        self._check(index, pixels.shape[:2], classes)
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(classes.astype(np.uint8) - np.uint8(1))

    def _check(self, index: int, size: tuple[int, ...], classes: np.ndarray) -> None:
        where = self.label_path(index)
        if classes.shape != size:
            raise UnreadableImageError(
                f"{where}: {_by(classes.shape)}, its picture {_by(size)}; they must be one size."
            )
        if classes.max(initial=0) > self.num_classes:
            raise UnreadableImageError(f"{where}: class {classes.max()}, but the list has {self.num_classes} classes.")

    def check_pictures(self) -> None:
        """Decode all pictures and label maps once.

        Raises:
            ValueError: a file is missing or damaged, two differ in size, or a class is not in the list.
        """
        for index in range(len(self)):
            try:
                with Image.open(self.path(index)) as picture, Image.open(self.label_path(index)) as labels:
                    sizes, most = (picture.size, labels.size), np.asarray(labels).max(initial=0)
                    picture.load()
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"{self.path(index)} or its label map cannot be read; restore it: {error}") from error
            if sizes[0] != sizes[1]:
                found = f"{_by(sizes[1][::-1])}, its picture {_by(sizes[0][::-1])}"
                raise ValueError(f"{self.label_path(index)}: a label map of {found}; replace it by one that fits.")
            if most > self.num_classes:
                found = f"class {most}, but the list has {self.num_classes} classes"
                raise ValueError(f"{self.label_path(index)}: {found}; correct one of them.")


class SegmentationSplits(NamedTuple):
    """Both parts, and the names of the classes in order."""

    train: SegmentationImages
    validation: SegmentationImages
    class_names: tuple[str, ...]


def load_ade20k(data: str) -> SegmentationSplits:
    """Open a folder in the published format; the number of classes is that of its ``objectInfo*.txt``.

    Raises:
        ValueError: it is no such folder, a picture has no label map, or a label map no picture.
    """
    root = Path(data).expanduser()
    lists = sorted(root.glob("objectInfo*.txt"))
    if len(lists) != 1:
        raise ValueError(f"{data!r} is no folder of ADE20K's format; it needs {LAYOUT} (comad data scenes makes one).")
    class_names = _class_names(lists[0])
    train, validation = (
        SegmentationImages(root, part, len(class_names), _pairs(root, part)) for part in ("training", "validation")
    )
    return SegmentationSplits(train, validation, class_names)


def _class_names(path: Path) -> tuple[str, ...]:
    """The last column of a list whose first one is a number."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [line for line in lines if line[0].strip().isdigit()]
    if not rows or [int(line[0]) for line in rows] != list(range(1, len(rows) + 1)) or len(rows) >= IGNORED:
        raise ValueError(f"{path}: no list of classes 1, 2, ... (fewer than {IGNORED}); restore the published file.")
    return tuple(line[-1].strip() for line in rows)


def _pairs(root: Path, part: str) -> list[str]:
    """Names of the pictures, each with its label map."""
    pictures = {path.stem for path in (root / "images" / part).glob("*.jpg")}
    maps = {path.stem for path in (root / "annotations" / part).glob("*.png")}
    if not pictures and not maps:
        raise ValueError(f"{str(root)!r}: no pictures of {part}; the format is {LAYOUT}.")
    if alone := sorted(pictures ^ maps):
        folder = "annotations" if alone[0] in pictures else "images"
        raise ValueError(
            f"{str(root)!r}: {len(alone)} files of {part} are alone, such as {alone[0]}; add its fellow in {folder}."
        )
    return sorted(pictures)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
