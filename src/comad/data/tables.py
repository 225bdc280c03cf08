"""Images in a column of a table: data sets that Hugging Face's library saved (arrow), and parquet files."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from comad.data.decoding import MAX_BYTES, naming
from comad.data.images import ImageSet, PackedImages, Splits
from comad.data.index import PathTable
from comad.data.objects import IMAGE_KEYS, LABEL_KEYS
from comad.data.parts import LABEL_SETS, LabelOptions, Labels, Listing, divide, labels_of, part_of
from comad.data.shards import ShardImages
from comad.runtime.progress import track

COARSE_KEYS = ("coarse_label", "coarse")
KEPT_GROUPS = 4
"""Row groups of parquet files that a process keeps in memory."""
MAGIC = b"ARROW1"
"""At the start of arrow's file format; the other one is a stream."""


class ParquetImages(PackedImages):
    """Images in parquet files, whose rows are packed in groups: an image costs the reading of its group.

    Args:
        name: of the set.
        tables: the files.
        files: what each image is called.
        places: int64 (n, 3): number of the file, group in it, row in that.
        numbers: int64 (n,): one that tells the content of its group apart.
        labels: label set → label of each image.
    """

    def __init__(
        self,
        name: str,
        tables: Sequence[Path],
        files: Iterable[str],
        places: np.ndarray,
        numbers: np.ndarray,
        labels: dict[str, Tensor],
    ):
        self.name = name
        self.tables = PathTable(map(str, tables))
        self.files = PathTable(files)
        self.places = places
        self.numbers = numbers
        self.labels = labels
        self.groups = torch.arange(len(places))
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def path(self, index: int) -> str:
        """See `ImageSet.path`."""
        return f"row {self.files[index].rpartition('/')[2]} of {self.tables[self.places[index, 0]]}"

    def content(self, index: int) -> bytes:
        """See `ImageSet.content`."""
        table, group, row = self.places[index].tolist()
        with naming(self.path(index)):
            value = self._group(table, group)[row].as_py()
            if isinstance(value, dict):
                value = value.get("bytes")
            if not value or len(value) > MAX_BYTES:
                raise ValueError(f"{len(value or b'')} bytes; an image has 1 to {MAX_BYTES}")
            return value

    def _group(self, table: int, group: int) -> Any:
        """The column of images of a row group; the last few are kept, by each process its own."""
        if self._owner != os.getpid():
            self._kept, self._owner = OrderedDict(), os.getpid()
        if (table, group) not in self._kept:
            path = Path(self.tables[table])
            with _parquet().ParquetFile(path) as file:
                column = image_column(file.schema_arrow, path)
                read = file.read_row_group(group, columns=[column], use_threads=False)
            self._kept[table, group] = read.column(column)
            if len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end((table, group))
        return self._kept[table, group]

    def shard_numbers(self) -> np.ndarray:
        """See `ImageSet.shard_numbers`: row groups."""
        return np.unique(self.places[:, :2], axis=0, return_inverse=True)[1].reshape(-1)

    def content_numbers(self) -> np.ndarray:
        """See `ImageSet.content_numbers`: of the group in which an image lies."""
        return self.numbers.copy()


class _Rows(NamedTuple):
    """Of one file: places, content numbers and label columns."""

    places: np.ndarray
    numbers: np.ndarray
    labels: dict[str, list[Any]]
    class_names: dict[str, list[str]]


def load_tables(root: Path, tables: Sequence[Path], options: LabelOptions | None = None) -> Splits:
    """Open arrow or parquet files with a column of images.

    The column is the one that Hugging Face's features call an image, else one called ``image`` or ``img``; it holds
    the bytes of files, alone or beside a path. Labels are in a column ``label``, and ``coarse_label``, by name or by
    number. Parts are named by the paths, as those of tar shards are, see `comad.data.shards.load_shards`.

    Raises:
        ValueError: pyarrow is missing, a file cannot be read, is compressed (arrow), or has no such column.
    """
    shards, found = list(tables), list[_Rows]()
    kind = tables[0].suffix
    for number, table in enumerate(track(tables, f"indexing {root}", "files")):
        try:
            found.append(_arrow_rows(table, number, shards) if kind == ".arrow" else _parquet_rows(table, number))
        except Exception as error:  # of a damaged file pyarrow raises whatever there is
            if type(error) is ValueError:  # ours
                raise
            words = " ".join(str(error).split())
            raise ValueError(f"{table} cannot be read as {kind.removeprefix('.')}; restore it: {words}") from error
    called = [table.relative_to(root).as_posix() for table in tables]
    names = PathTable(
        f"{file}/{row:08}" for file, own in zip(called, found, strict=True) for row in range(len(own.places))
    )
    parts = [part_of(file) for file, own in zip(called, found, strict=True) for _ in range(len(own.places))]
    if not len(names):
        raise ValueError(f"no images in the {len(tables)} files of {str(root)!r}.")
    places = np.concatenate([own.places for own in found])
    numbers = np.concatenate([own.numbers for own in found])
    notes = list[str]()
    labels = _labels(found, notes)
    if kind == ".parquet":
        groups = len(np.unique(places[:, :2], axis=0))
        notes.append(
            f"Parquet is read {round(len(names) / groups):,} images at a time, also for a single one: comad data shard "
            "writes tar files of it, which are quick in any order."
        )

    def build(part: str, rows: np.ndarray, numbered: dict[str, Tensor]) -> ImageSet:
        name, files = f"{root.name}/{part}", (names[int(row)] for row in rows)
        if kind == ".arrow":
            return ShardImages(name, shards, files, places[rows], numbered)
        return ParquetImages(name, tables, files, places[rows], numbers[rows], numbered)

    return divide(root, Listing(names, labels, parts, notes=tuple(notes)), options or LabelOptions(), build)


def _labels(found: Sequence[_Rows], notes: list[str]) -> dict[str, Labels]:
    sets = {}
    for name in found[0].labels:
        values = [value for own in found for value in own.labels.get(name, [None] * len(own.places))]
        if any(isinstance(value, list) for value in values):
            notes.append("Images have several labels each, which are not scored; they are learnt from without them.")
        elif names := found[0].class_names.get(name):
            known = [value if isinstance(value, int) and 0 <= value < len(names) else -1 for value in values]
            sets[name] = Labels(np.array(known, dtype=np.int64), names, in_order=True)
        else:
            sets[name] = labels_of(_word(value) for value in values)
    return sets


def _word(value: Any) -> str | None:
    if isinstance(value, int):
        return None if value < 0 else f"{value:06}"
    return None if value is None else str(value) or None


def _arrow_rows(table: Path, number: int, shards: list[Path]) -> _Rows:
    """Where in an arrow file each image lies; an image that it names by a path becomes a shard of its own."""
    pyarrow = _pyarrow()
    with pyarrow.memory_map(str(table)) as mapped:
        whole = mapped.read_buffer(mapped.size())
        opened = pyarrow.ipc.open_file if bytes(whole[: len(MAGIC)]) == MAGIC else pyarrow.ipc.open_stream
        with opened(whole) as reader:
            read = reader.read_all()
    column = image_column(read.schema, table)
    places = []
    for chunk in _sound(read.column(column)).chunks:
        own = np.zeros((len(chunk), 3), dtype=np.int64)
        own[:, 0] = number
        content = chunk.field("bytes") if _is_struct(chunk.type) else chunk
        offset = chunk.offset + content.offset if _is_struct(chunk.type) else content.offset
        valid = np.array(content.is_valid())[: len(chunk)] & np.array(chunk.is_valid())
        _, offsets, data = content.buffers()
        if data is not None and data.size and len(chunk):
            width = np.int64 if pyarrow.types.is_large_binary(content.type) else np.int32
            bounds = np.frombuffer(offsets, dtype=width)[offset : offset + len(chunk) + 1].astype(np.int64)
            start = data.address - whole.address
            if not 0 <= start <= whole.size - data.size:
                raise ValueError(f"{table} is compressed; save the data set again without compression.")
            own[:, 1], own[:, 2] = start + bounds[:-1], np.where(valid, np.diff(bounds), 0)
        if _is_struct(chunk.type) and not valid.all():
            _find_files(chunk, own, np.flatnonzero(~valid), table.parent, shards)
        places.append(own)
    labels, names = _label_columns(read.schema, lambda name: _sound(read.column(name)).to_pylist())
    whole_places = np.concatenate(places) if places else np.zeros((0, 3), dtype=np.int64)
    return _Rows(whole_places, whole_places[:, 2], labels, names)


def _sound(column: Any) -> Any:
    """A column whose offsets lie within it: arrow itself would follow those of a damaged file anywhere."""
    column.validate(full=True)
    return column


def _find_files(chunk: Any, places: np.ndarray, rows: np.ndarray, folder: Path, shards: list[Path]) -> None:
    """Images that are named by a path, and lie elsewhere."""
    for row in rows.tolist():
        value = chunk[row].as_py()
        path = Path(folder, value["path"]) if value and value.get("path") else None
        if path and path.is_file():
            places[row] = len(shards), 0, path.stat().st_size
            shards.append(path)


def _parquet_rows(table: Path, number: int) -> _Rows:
    """The groups of a parquet file; images stay where they are."""
    places, numbers = [np.zeros((0, 3), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    with _parquet().ParquetFile(table) as file:
        image_column(file.schema_arrow, table)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            sizes = [about.column(i).total_compressed_size for i in range(about.num_columns)]
            digest = hashlib.blake2b(repr((group, about.num_rows, sizes)).encode(), digest_size=7).digest()
            rows = np.arange(about.num_rows)
            places.append(np.stack([np.full_like(rows, number), np.full_like(rows, group), rows], axis=1))
            numbers.append(np.full(about.num_rows, int.from_bytes(digest, "big")))
        labels, names = _label_columns(
            file.schema_arrow, lambda name: file.read(columns=[name], use_threads=False).column(name).to_pylist()
        )
    return _Rows(np.concatenate(places), np.concatenate(numbers), labels, names)


def image_column(schema: Any, table: Path) -> str:
    """The name of the column of images.

    Raises:
        ValueError: there is none, or it does not hold files.
    """
    features = _features(schema)
    named = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
    column = next((name for name in (*named, *IMAGE_KEYS) if name in schema.names), None)
    if column is None:
        raise ValueError(f"{table}: no column of images among {', '.join(schema.names)}; call it image.")
    kind, types = schema.field(column).type, _pyarrow().types
    if _is_struct(kind):
        kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), None)
    if kind is None or not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ValueError(
            f"{table}: the column {column} holds no files but {schema.field(column).type}; save encoded images."
        )
    return column


def _label_columns(schema: Any, read: Any) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """Label set → values, and the names that Hugging Face's features give to numbers."""
    labels, class_names = {}, {}
    features = _features(schema)
    for label_set, keys in zip(LABEL_SETS, (LABEL_KEYS, COARSE_KEYS), strict=True):
        if column := next((key for key in keys if key in schema.names), None):
            labels[label_set] = read(column)
            kind = features.get(column)
            if isinstance(kind, dict) and isinstance(kind.get("names"), list):
                class_names[label_set] = [str(name) for name in kind["names"]]
    return labels, class_names


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's library notes of the columns."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return dict(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    return {}


def _is_struct(kind: Any) -> bool:
    return _pyarrow().types.is_struct(kind)


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ValueError("arrow and parquet files need pyarrow; pip install 'comad[parquet]'.") from error


def _parquet() -> Any:
    _pyarrow()
    return importlib.import_module("pyarrow.parquet")
