"""Sets of labelled or unlabelled images: what every command reads, and `load_images`, the one door to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.decoding import UnreadableImageError, decode_bytes, naming
from comad.data.identity import fingerprint
from comad.data.summary import Summary, summarise
from comad.data.transforms import evaluation_view, paste

__all__ = ["SPLIT_NAMES", "ImageSet", "Source", "Splits", "UnreadableImageError"]

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
    ahead: int = 0
    """Bytes that the disk is asked for ahead of each image, where images lie one behind another in shards."""

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

    def shard_numbers(self) -> np.ndarray | None:
        """int64 (n,): the shard in which each image lies, behind those before it; None: they are files of their own."""
        return None

    def content(self, index: int) -> bytes:
        """The file of an image as it is, encoded.

        Raises:
            ValueError: the set has no files, or this one cannot be read.
        """
        raise ValueError(f"the images of {self.name} are no files; only those of folders, tables and shards are.")

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


class PackedImages(ImageSet):
    """Images within larger files, each read by its place.

    Attributes:
        files: what each image is called, or was called before it came there.
        places: int64 (n, ...): where each lies.
    """

    files: Sequence[str]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        """See `ImageSet.key`."""
        return self.files[index]

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`."""
        content = self.content(index)
        with naming(self.path(index)):
            return decode_bytes(content, min_side)


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
