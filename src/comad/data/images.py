"""Sets of labelled or unlabelled images: what every command reads, and `load_images`, the one door to them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.decoding import UnreadableImageError
from comad.data.identity import fingerprint
from comad.data.summary import Summary, summarise
from comad.data.transforms import evaluation_view, paste

__all__ = ["SPLIT_NAMES", "ImageSet", "Source", "Splits", "UnreadableImageError", "load_images"]

SPLIT_NAMES = ("train", "val", "test")
DECODED_FOR = 224
"""Pixels of the view that images are decoded for, at least, when they are scored."""


class ImageSet(ABC):
    """One split of a set of images.

    Attributes:
        name: for messages and cards.
        labels: label set name ("fine", "coarse") → int64 (n,), -1 where unlabelled; empty without labels.
        groups: int64 (n,), images of one concept share a number: the unit of the bootstrap.
        eval_crop: share of the shorter side that an evaluation view shows.
    """

    name: str
    labels: dict[str, Tensor]
    groups: Tensor
    eval_crop: float = 0.875

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, min_side: int = 0) -> Tensor:
        """Decode one image to uint8 (3, h, w), or (4, h, w) with alpha and premultiplied colours.

        Args:
            index: which image.
            min_side: a decoder may shrink the image while it decodes, to no less than this; 0: it does not.

        Raises:
            UnreadableImageError: the file is missing, truncated or not an image.
        """

    def view(self, index: int, size: int) -> Tensor:
        """The view of one image that scores are made of: float32 (3, size, size) in [0, 1].

        Raises:
            UnreadableImageError: see `load`.
        """
        image = self.load(index, round(max(DECODED_FOR, size) / self.eval_crop))
        return evaluation_view(image, size, self.eval_crop).float() / 255

    def pil(self, index: int) -> Image.Image:
        """One whole image, alpha on white.

        Raises:
            UnreadableImageError: see `load`.
        """
        image = self.load(index)
        pixels = image if len(image) == 3 else paste(image, torch.full_like(image[:3], 255))
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    @abstractmethod
    def path(self, index: int) -> str:
        """Name one image in a message."""

    def key(self, index: int) -> str:
        """Name one image wherever the set lies."""
        return self.path(index)

    def content_numbers(self) -> np.ndarray:
        """int64 (n,): the size of each file in bytes, or a number that tells contents apart; 0: unknown, -1: none."""
        return np.zeros(len(self), dtype=np.int64)

    def fingerprint(self) -> str:
        """Hash what the images are called, their sizes and their labels; the place of a folder does not matter."""
        return fingerprint(self)


class Source(NamedTuple):
    """Where a set comes from and what is not in it.

    Attributes:
        split: how the parts were made.
        left_out: ending or reason → number of files that are not used.
        notes: what else to know, one sentence each.
    """

    split: str = "as published"
    left_out: Mapping[str, int] = {}
    notes: tuple[str, ...] = ()


class Splits(NamedTuple):
    """The parts of a set: students learn from ``train``, choices are made on ``val``, scores come from ``test``."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: dict[str, tuple[str, ...]]
    licence: str
    source: Source = Source()

    def summary(self) -> Summary:
        """Say what is there and what is left out; see `comad.data.summary.summarise`."""
        return summarise(self)


def load_images(
    data: Any,
    *,
    label_depth: int = 1,
    labels: str | Path | Sequence[int] | None = None,
    subset: str | Path | None = None,
) -> Splits:
    """Open the bundled set by its name (``stamps``), a folder of images by its path, or images that Python has.

    Args:
        data: a name, the path of a folder, or that of tar shards such as ``train-{000..127}.tar``; see
            `comad.data.folders.load_folder`. Or a dataset, or a dict of ``train`` and others to datasets; see
            `comad.data.objects.load_objects`. Splits are taken as they are.
        label_depth: how many levels of sub-folders make the label.
        labels: CSV file with the columns ``path``, relative to the folder, and ``label``; a second column of labels is
            the label set ``coarse``. For a dataset: one label per image.
        subset: text file of relative paths, one a line; other images of the parts that it names are left out.

    Raises:
        ValueError: no such folder, no image in it, two sub-folders for the same part, or options that do not fit.
    """
    from comad.data.bundled import BUNDLED
    from comad.data.objects import load_objects

    if isinstance(data, Splits):
        return data
    if not isinstance(data, (str, os.PathLike)):
        if label_depth != 1 or subset is not None:
            raise ValueError("label_depth and subset are options of folders; pass a dataset of the images wanted.")
        return load_objects(data, labels)
    if data not in BUNDLED:
        return _load_path(Path(data).expanduser(), label_depth, labels, subset)
    if label_depth != 1 or labels is not None or subset is not None:
        raise ValueError(f"label_depth, labels and subset are options of own folders; leave them out for {data!r}.")
    return BUNDLED[os.fspath(data)]()


def _load_path(root: Path, label_depth: int, labels: Any, subset: str | Path | None) -> Splits:
    from comad.data.bundled import BUNDLED
    from comad.data.folders import load_folder
    from comad.data.shards import expand, load_shards

    if label_depth < 1 or not (labels is None or isinstance(labels, (str, os.PathLike))):
        raise ValueError("label_depth is 1 or more, and labels of a folder are the path of a CSV file.")
    labels = None if labels is None else Path(labels)
    if root.suffix == ".tar":
        return load_shards(root.parent, expand(root), labels, subset)
    if not root.is_dir():
        raise ValueError(f"no folder {str(root)!r}; pass --data FOLDER with images, or one of: {', '.join(BUNDLED)}.")
    return load_folder(root, label_depth, labels, subset)
