"""Image sets that ship with the package. Add one: its files, a loader, an entry in `BUNDLED`."""

from __future__ import annotations

import csv
import io
import mmap
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comad.data.images import SPLIT_NAMES, ImageSet, Splits, UnreadableImageError

STAMPS = Path(__file__).parent / "stamps"
SIDE = 96
"""Pixels on the side of a stamp, padded to a square."""


class StampImages(ImageSet):
    """Cut-out images of 96 px with alpha, read from one zip file.

    An image is decoded once: the decoded bytes live in memory that forked worker processes share (36 KiB an image).
    """

    eval_crop = 1.0

    def __init__(self, name: str, files: list[str], labels: dict[str, Tensor], groups: Tensor):
        self.name = name
        self.files = files
        self.labels = labels
        self.groups = groups
        self._allocate()

    def _allocate(self) -> None:
        count = len(self.files)
        memory = np.frombuffer(mmap.mmap(-1, count * (4 * SIDE * SIDE + 1)), dtype=np.uint8)
        self._decoded = torch.from_numpy(memory[:count])
        self._pixels = torch.from_numpy(memory[count:]).view(count, 4, SIDE, SIDE)
        self._archive: zipfile.ZipFile | None = None
        self._archive_owner = 0

    def __getstate__(self) -> dict:
        return {key: self.__dict__[key] for key in ("name", "files", "labels", "groups")}

    def __setstate__(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, value)
        self._allocate()

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return f"stamps/{self.files[index]}"

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`."""
        if not self._decoded[index]:
            self._pixels[index] = torch.from_numpy(_premultiplied(self._read(index)))
            self._decoded[index] = 1
        return self._pixels[index]

    def _read(self, index: int) -> Image.Image:
        if (
            self._archive is None or self._archive_owner != os.getpid()
        ):  # a forked worker needs a file handle of its own
            self._archive, self._archive_owner = zipfile.ZipFile(STAMPS / "images96.zip"), os.getpid()
        try:
            return Image.open(io.BytesIO(self._archive.read(self.files[index]))).convert("RGBA")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UnreadableImageError(f"{self.path(index)}: {error}") from error


def _premultiplied(image: Image.Image) -> np.ndarray:
    """Centre an image on a transparent square, colours multiplied by alpha: uint8 (4, 96, 96)."""
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.array(canvas.convert("RGBa")).transpose(2, 0, 1)


def load_stamps() -> Splits:
    """Open the bundled set of stamps, split by concept: 7,573 train, 1,095 val, 2,167 test images."""
    with (STAMPS / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {
        "fine": tuple(sorted({row["label"] for row in rows} - {""})),
        "coarse": tuple(sorted({row["coarse"] for row in rows} - {""})),
    }
    number = {level: {name: i for i, name in enumerate(listed)} for level, listed in names.items()}
    concept = {name: i for i, name in enumerate(sorted({row["concept"] for row in rows}))}

    def build(part: str) -> StampImages:
        chosen = [row for row in rows if row["split"] == part]
        labels = {
            "fine": torch.tensor([number["fine"].get(row["label"], -1) for row in chosen]),
            "coarse": torch.tensor([number["coarse"].get(row["coarse"], -1) for row in chosen]),
        }
        groups = torch.tensor([concept[row["concept"]] for row in chosen])
        return StampImages(f"stamps/{part}", [row["file"] for row in chosen], labels, groups)

    train, val, test = (build(part) for part in SPLIT_NAMES)
    return Splits(train, val, test, names, "public domain, MIT, Apache-2.0 and CC BY 4.0 (see NOTICE)")


BUNDLED: dict[str, Callable[[], Splits]] = {"stamps": load_stamps}
