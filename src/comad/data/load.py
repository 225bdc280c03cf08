"""The one door to images: a bundled set by its name, a folder, shards, tables, or what Python has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from comad.data.bundled import BUNDLED
from comad.data.folders import load_folder, load_table
from comad.data.images import Splits
from comad.data.index import index_folder
from comad.data.objects import load_objects
from comad.data.parts import LabelOptions
from comad.data.shards import expand, load_shards
from comad.data.tables import load_tables
from comad.runtime.options import COMMON, NO_EFFECT

SHARDED = {".tar": load_shards, ".arrow": load_tables, ".parquet": load_tables}
"""Ending of files that hold many images → what opens them."""
TABLES = (".csv", ".tsv")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images a command reads, and where their labels come from: options that all commands share.

    A run that goes on knows its images by names, sizes and labels, and not by these options: paths may be others.

    Args:
        data: a folder of images, tar shards, an arrow or parquet data set, a CSV file, or the name of a bundled set.
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
        data: a name; or the path of a folder (`comad.data.folders.load_folder`), of tar shards such as
            ``train-{000..127}.tar`` (`comad.data.shards.load_shards`), of arrow or parquet files
            (`comad.data.tables.load_tables`), of a folder of such files, or of a CSV file
            (`comad.data.folders.load_table`). Or a dataset, or a dict of ``train`` and others to datasets; see
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
        if label_depth < 1 or not (labels is None or isinstance(labels, (str, os.PathLike))):
            raise ValueError("label_depth is 1 or more, and labels of a folder are the path of a CSV file.")
        files = (None if file is None else Path(file) for file in (labels, subset))
        return _load_path(Path(data).expanduser(), LabelOptions(label_depth, *files))
    if label_depth != 1 or labels is not None or subset is not None:
        raise ValueError(f"label_depth, labels and subset are options of own folders; leave them out for {data!r}.")
    return BUNDLED[os.fspath(data)]()


def _load_path(root: Path, options: LabelOptions) -> Splits:
    if root.suffix in SHARDED:
        return SHARDED[root.suffix](root.parent, expand(root), options)
    if root.suffix in TABLES:
        return load_table(root, options)
    if not root.is_dir():
        raise ValueError(f"no folder {str(root)!r}; pass --data FOLDER with images, or one of: {', '.join(BUNDLED)}.")
    index = index_folder(root)
    ending = next((ending for ending in SHARDED if ending in index.left_out), None)
    found = () if index.files or ending is None else sorted(root.rglob(f"*{ending}"))
    shards = [path for path in found if path.is_file() and not path.name.startswith(("cache-", "."))]
    return SHARDED[ending](root, shards, options) if ending and shards else load_folder(root, options, index)
