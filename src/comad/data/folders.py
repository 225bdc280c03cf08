"""Image files of your own: those below a folder, or those that a table names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comad.data.decoding import HEIF_ENDINGS, endings, load_file, read_bytes
from comad.data.identity import file_size
from comad.data.images import ImageSet, Splits
from comad.data.index import FolderIndex, PathTable, index_folder
from comad.data.parts import (
    PART_COLUMNS,
    PART_NAMES,
    LabelOptions,
    Listing,
    divide,
    labels_of,
    labels_of_table,
    read_table,
)
from comad.data.summary import some


class FolderImages(ImageSet):
    """Image files below a folder. ``labels``: label set → label of each file."""

    def __init__(self, name: str, root: Path, files: Iterable[str], labels: dict[str, Tensor] | None = None):
        self.name = name
        self.root = root
        self.files = PathTable(files)
        self.labels = labels or {}
        self.groups = torch.arange(len(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return str(self.root / self.files[index])

    def key(self, index: int) -> str:
        """See `ImageSet.key`: the path relative to the folder."""
        return self.files[index]

    def load(self, index: int, min_side: int = 0) -> Tensor:
        """See `ImageSet.load`."""
        return load_file(self.path(index), min_side)

    def content(self, index: int) -> bytes:
        """See `ImageSet.content`."""
        return read_bytes(self.path(index))

    def content_numbers(self) -> np.ndarray:
        """See `ImageSet.content_numbers`: sizes in bytes, -1 of a file that is gone or empty."""
        prefix = self.root
        return np.fromiter((file_size(os.path.join(prefix, file)) for file in self.files), dtype=np.int64)


def load_folder(root: Path, options: LabelOptions | None = None, index: FolderIndex | None = None) -> Splits:
    """Open a folder of images.

    It may hold ``train`` and ``val`` or ``test`` sub-folders, also spelt as in `comad.data.parts.PART_NAMES`. Without a
    test folder, ``val`` is the test and a tenth of ``train`` is held out. Without either, images are split by a hash of
    their path, so that the split stays the same when files are added; so are those of ``train`` where nothing lies
    beside it. Labels are the names of the sub-folders, if most training images lie in some; an image that lies in none
    has no label. Names are compared in Unicode's form NFC. ``index`` is what lies below the folder, if that is known.

    Raises:
        ValueError: no image, two sub-folders for the same part, or a list that fits no image.
    """
    index = index or index_folder(root)
    if not index.files:
        raise ValueError(
            f"no images below {str(root)!r}; expected files ending in {', '.join(endings())}{_hint(index)}."
        )
    notes = (f"Folders of the system are ignored: {some(index.ignored)}.",) if index.ignored else ()
    return _divide(root, root.name, Listing(index.files, left_out=index.left_out, notes=notes), options)


def load_table(path: Path, options: LabelOptions | None = None) -> Splits:
    """Open the images that a CSV file names: a column ``path``, relative to the folder of the file, and labels.

    A column ``split`` names parts. Without a column of labels these are the folders in the paths. The order of the
    images is that of the rows.

    Raises:
        ValueError: see `comad.data.parts.read_table`; or no row, or a word in ``split`` that names no part.
    """
    table, notes = read_table(path), list[str]()
    if not table.paths:
        raise ValueError(f"{path}: no image in it; give a row for each.")
    columns = dict(table.columns)
    given = next((columns.pop(name) for name in table.columns if name.lower() in PART_COLUMNS), None)
    if unknown := sorted({word for word in given or () if word and word.lower() not in PART_NAMES}):
        raise ValueError(f"{path}: {some(unknown)} in the column split is no part; use train, val and test.")
    parts = None if given is None else [PART_NAMES[word.lower()] if word else "" for word in given]
    labels = {name: labels_of(words) for name, words in labels_of_table(path, columns, notes).items()}
    listing = Listing(table.paths, labels if columns else None, parts, notes=tuple(notes))
    return _divide(path.parent, path.stem, listing, options)


def _divide(root: Path, name: str, listing: Listing, options: LabelOptions | None) -> Splits:
    def build(part: str, rows: np.ndarray, labels: dict[str, Tensor]) -> FolderImages:
        return FolderImages(f"{name}/{part}", root, (listing.names[int(row)] for row in rows), labels)

    return divide(root, listing, options or LabelOptions(), build)


def _hint(index: FolderIndex) -> str:
    """What was there instead of images."""
    found = f"; there are {some(index.left_out)}" if index.left_out else ""
    return found + ("; pip install 'comad[heic]'" if set(HEIF_ENDINGS) & index.left_out.keys() else "")
