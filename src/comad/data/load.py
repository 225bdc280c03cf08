"""The one door to images: a bundled set by its name, a folder, tar shards, or what Python has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from comad.data.bundled import BUNDLED
from comad.data.folders import load_folder
from comad.data.images import Splits
from comad.data.index import index_folder
from comad.data.objects import load_objects
from comad.data.shards import expand, load_shards
from comad.runtime.options import COMMON, NO_EFFECT


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images a command reads, and where their labels come from: options that all commands share.

    A run that goes on knows its images by names, sizes and labels, and not by these options: paths may be others.

    Args:
        data: a folder of images, or the name of a bundled set.
        label_depth: levels of sub-folders that make the label; of 2 or more, the first alone is the label set coarse.
        labels: CSV file with the columns path, relative to the folder, and label, in the place of sub-folders. Each
            further column is a label set of its own; an image without a row has no label.
        subset: text file of relative paths, one a line; other images of the parts that it names are left out.
    """

    data: str = field(default="stamps", metadata=COMMON | NO_EFFECT)
    label_depth: int = field(default=1, metadata=NO_EFFECT)
    labels: str = field(default="", metadata=NO_EFFECT)
    subset: str = field(default="", metadata=NO_EFFECT)

    @property
    def data_options(self) -> dict[str, Any]:
        """The options by their names, for another config of the same images."""
        return {own.name: getattr(self, own.name) for own in fields(DataConfig)}

    def load_images(self) -> Splits:
        """Open the images, see `load_images`."""
        return load_images(
            self.data, label_depth=self.label_depth, labels=self.labels or None, subset=self.subset or None
        )


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
    if label_depth < 1 or not (labels is None or isinstance(labels, (str, os.PathLike))):
        raise ValueError("label_depth is 1 or more, and labels of a folder are the path of a CSV file.")
    labels = None if labels is None else Path(labels)
    if root.suffix == ".tar":
        return load_shards(root.parent, expand(root), labels, subset)
    if not root.is_dir():
        raise ValueError(f"no folder {str(root)!r}; pass --data FOLDER with images, or one of: {', '.join(BUNDLED)}.")
    index = index_folder(root)
    if not index.files and ".tar" in index.left_out:
        return load_shards(root, sorted(root.rglob("*.tar")), labels, subset)
    return load_folder(root, label_depth, labels, subset, index)
