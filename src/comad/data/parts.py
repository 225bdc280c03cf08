"""Which part and which label each image of a source has: by folders, tables, or what the source says."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from comad.data.identity import normalised
from comad.data.images import SPLIT_NAMES, ImageSet, Source, Splits
from comad.data.summary import some

PART_NAMES = {"training": "train", "testing": "test", **{name: name for name in SPLIT_NAMES}}
PART_NAMES |= dict.fromkeys(("valid", "validation", "dev", "development"), "val")
"""Spellings of the parts; capitals and a year behind (``val2017``) do not matter."""
LABEL_SETS = ("fine", "coarse")
SEVERAL = "|"
"""Stands between the labels of one image in a cell of a CSV file."""
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
PART_COLUMNS = ("split", "part")


class Labels(NamedTuple):
    """One label set of a source.

    Attributes:
        numbers: int64 (n,): place in ``names``, -1 where unlabelled.
        names: of the classes.
        in_order: whether the order of the names is the source's; else it is that of the alphabet.
    """

    numbers: np.ndarray
    names: Sequence[str]
    in_order: bool = False


class Listing(NamedTuple):
    """What a source holds, in its order.

    Attributes:
        names: what each image is called, in folders that stand between slashes.
        labels: label set → labels; None: those of the folders in the names.
        parts: the part of each image, empty if it has none; None: that of the first folder in its name.
        left_out, notes: see `comad.data.images.Source`.
    """

    names: Sequence[str]
    labels: dict[str, Labels] | None = None
    parts: Sequence[str] | None = None
    left_out: Mapping[str, int] = {}
    notes: tuple[str, ...] = ()


class LabelOptions(NamedTuple):
    """Those of `comad.data.load.load_images`."""

    label_depth: int = 1
    labels: Path | None = None
    subset: Path | None = None


def labels_of(words: Iterable[str | None]) -> Labels:
    """Labels of words, None where there is none."""
    known: dict[str, int] = {}
    numbers = (-1 if word is None else known.setdefault(word, len(known)) for word in words)
    return Labels(np.fromiter(numbers, dtype=np.int64), list(known))


def part_of(name: str) -> str:
    """The part that a word in the path of a file names, such as ``imagenet-train-0001.tar``; empty if none does."""
    return next((PART_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in PART_NAMES), "")


def divide(
    root: Path,
    listing: Listing,
    options: LabelOptions,
    build: Callable[[str, np.ndarray, dict[str, Tensor]], ImageSet],
) -> Splits:
    """Put images into parts, give them labels, and build the sets.

    Args:
        root: for messages.
        listing: what is there.
        options: which of it, and other labels.
        build: name of a part, rows of the listing, label set → labels → the set.

    Raises:
        ValueError: two folders for the same part, or a table or list that fits no image.
    """
    if listing.labels is not None and options.label_depth != 1:
        raise ValueError(f"{str(root)!r} brings labels of its own; leave out --label-depth, which counts folders.")
    parts = _find_parts(root, listing)
    notes = [*listing.notes, *parts.notes]
    rows = parts.rows if options.subset is None else _read_subset(options.subset, listing.names, parts, notes)
    if options.labels is not None:
        labels = _labels_from_csv(options.labels, parts.depth, listing.names, notes)
    elif listing.labels is None:
        labels = _labels_from_folders(listing.names, parts.depth, options.label_depth)
    else:
        labels = dict(listing.labels)
    first = next(iter(labels.values()), None)
    chosen = rows[0] if len(rows[0]) else np.arange(len(listing.names))
    labelled = first is not None and 2 * int((first.numbers[chosen] >= 0).sum()) > len(chosen)
    listed = _hash_split(rows[0], listing.names, labelled) if parts.hashed else rows
    if options.labels is None and listing.labels is None and not labelled:
        labels = {}  # most images lie in no folder: those of the others are no classes
    labels = {name: found for name, found in labels.items() if len(found.names)}
    numbered, class_names = _number(labels, listed)
    train, val, test = map(build, SPLIT_NAMES, listed, numbered)
    source = Source(parts.told(labelled), listing.left_out, tuple(notes))
    return Splits(train, val, test, class_names, "your own", source)


def _number(
    labels: dict[str, Labels], parts: Sequence[np.ndarray]
) -> tuple[list[dict[str, Tensor]], dict[str, tuple[str, ...]]]:
    """Labels of each part as numbers, and what the numbers stand for: the classes that some image has, in order."""
    numbered: list[dict[str, Tensor]] = [{} for _ in parts]
    class_names = {}
    for name, (numbers, names, in_order) in labels.items():
        seen = np.unique(numbers[np.concatenate(parts)])
        known = list(range(len(names))) if in_order else sorted(seen[seen >= 0].tolist(), key=lambda i: names[int(i)])
        class_names[name] = tuple(names[i] for i in known)
        new = np.full(len(names) + 1, -1, dtype=np.int64)  # the last one is that of -1
        new[known] = np.arange(len(known))
        for found, part in zip(numbered, parts, strict=True):
            found[name] = torch.from_numpy(new[numbers[part]])
    return numbered, class_names


class _Parts(NamedTuple):
    """Images of each part, how deep the labels lie, and where the parts come from; one if they are to be hashed."""

    rows: list[np.ndarray]
    depth: int
    folders: dict[str, str]
    notes: list[str]

    @property
    def hashed(self) -> bool:
        return len(self.rows) == 1

    def told(self, labelled: bool) -> str:
        """How the parts were made."""
        if self.hashed:
            shares = "80, 10 and 10 % are train, val and test" if labelled else "95 and 5 % are train and val"
            return f"by a hash of each path about {shares}"
        names = {part: folder for folder, part in self.folders.items()}
        sources = {part: f"{names.get(part, '')}/" for part in SPLIT_NAMES}
        if "test" not in names:
            sources["test"] = sources["val"]
        if "val" not in names or "test" not in names:
            sources["val"] = f"a tenth of {names['train']}/, by a hash of each path"
            sources["train"] = f"the rest of {names['train']}/"
        return ", ".join(f"{part} is {source}" for part, source in sources.items())


def _find_parts(root: Path, listing: Listing) -> _Parts:
    by_folder = listing.parts is None
    tops = (name.partition("/")[0] if "/" in name else "" for name in listing.names)
    found = labels_of(tops if listing.parts is None else listing.parts)
    counts = {top: int(count) for top, count in zip(found.names, np.bincount(found.numbers), strict=False)}
    folders = {top: part for top in sorted(counts) if (part := _part_of(top) if by_folder else top)}
    rows = {
        part: np.flatnonzero(
            np.isin(found.numbers, [found.names.index(top) for top in folders if folders[top] == part])
        )
        for part in SPLIT_NAMES
    }
    if not (len(rows["train"]) and (len(rows["val"]) or len(rows["test"]))):
        alone = len(folders) == len(counts) == 1
        notes = [
            f"The folder {top}/ counts as a class, for there are not both train and val or test." for top in folders
        ]
        depth = int(alone and by_folder)
        return _Parts([np.arange(len(listing.names))], depth, {}, notes if by_folder and not alone else [])
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"{str(root)!r} has two folders for one part: {', '.join(folders)}; merge or rename one.")
    others = {top or "in no folder": count for top, count in counts.items() if top not in folders}
    notes = [f"{sum(others.values())} images outside of the parts are left out: {some(others)}."] if others else []
    return _Parts(_named_parts(rows, listing.names), int(by_folder), folders, notes)


def _part_of(folder: str) -> str | None:
    return PART_NAMES.get(re.sub(r"[-_]?(19|20)\d\d$", "", folder.lower()))


def _named_parts(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """Use the source's own parts. A missing test is all of ``val``; a missing val is a hashed tenth of ``train``."""
    train, val, test = (rows[part] for part in SPLIT_NAMES)
    if not len(test):
        val, test = test, val
    if not len(val):
        held_out = _buckets(names, train) < 0.1
        train, val = train[~held_out], train[held_out]
    return [train, val, test]


def _hash_split(rows: np.ndarray, names: Sequence[str], labelled: bool) -> list[np.ndarray]:
    val, test = (0.1, 0.2) if labelled else (0.05, 0.05)
    buckets = _buckets(names, rows)
    return [rows[buckets >= test], rows[buckets < val], rows[(buckets >= val) & (buckets < test)]]


def _buckets(names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each image, that its name alone decides."""
    hashes = (hashlib.blake2b(os.fsencode(normalised(names[int(row)])), digest_size=4).digest() for row in rows)
    return np.frombuffer(b"".join(hashes), dtype=">u4") / 2**32


def _labels_from_folders(names: Iterable[str], depth: int, label_depth: int) -> dict[str, Labels]:
    """The label is the name of ``label_depth`` folders below ``depth``; of more than one, the first is coarse."""
    folders = labels_of(name.rpartition("/")[0] for name in names)
    levels = [normalised(folder).split("/")[depth:] if folder else [] for folder in folders.names]
    fine = labels_of("/".join(own[:label_depth]) if len(own) >= label_depth else None for own in levels)
    coarse = labels_of(own[0] if own else None for own in levels)
    sets = zip(LABEL_SETS[: 1 + (label_depth > 1)], (fine, coarse), strict=False)
    return {name: Labels(numbers[folders.numbers], words) for name, (numbers, words, _) in sets}


class Table(NamedTuple):
    """A CSV file of images.

    Attributes:
        paths: of the images.
        columns: name → what each image has in it, None where the cell is empty.
    """

    paths: list[str]
    columns: dict[str, list[str | None]]


def read_table(path: Path) -> Table:
    """Read a CSV file with a header, a column of paths and others.

    Raises:
        ValueError: no such file, no such column, a row of another length, or a path that comes twice.
    """
    header, rows = _read_csv(path)
    found = [name.lower() for name in header]
    place = next((found.index(name) for name in PATH_COLUMNS if name in found), None)
    if place is None:
        raise ValueError(f"{path}: the first line must name a column path and one label, not {some(header)}.")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise ValueError(f"{path}: the first line names {some(twice)} twice; give each column its own name.")
    paths = [normalised(row[place]).removeprefix("./") for row in rows]
    if twice := [name for name, count in Counter(paths).items() if count > 1]:
        raise ValueError(f"{path}: {some(twice, 3)} {'comes' if len(twice) == 1 else 'come'} twice; give one row each.")
    columns = {
        name: [normalised(row[i].strip()) or None for row in rows] for i, name in enumerate(header) if i != place
    }
    return Table(paths, columns)


def labels_of_table(
    path: Path, columns: Mapping[str, list[str | None]], notes: list[str]
) -> dict[str, list[str | None]]:
    """Label set → labels, of the columns with one label in each cell.

    Scores are accuracies, so a column with several in a cell is no label set, and is told.
    """
    sets = {}
    for column, words in columns.items():
        if any(word and SEVERAL in word for word in words):
            notes.append(
                f"{path.name}: the column {column} has several labels in a cell ({SEVERAL} between them) and is not "
                "scored: images are learnt from without them; a column for each label would be."
            )
        else:
            sets[LABEL_SETS[len(sets)] if len(sets) < len(LABEL_SETS) else column] = words
    return sets


def _labels_from_csv(path: Path, depth: int, names: Sequence[str], notes: list[str]) -> dict[str, Labels]:
    """Labels by relative path, or by the path within the part."""
    table = read_table(path)
    if not table.columns:
        raise ValueError(f"{path}: the first line must name a column path and one label, not path alone.")
    columns = labels_of_table(path, table.columns, notes)
    place = {name: row for row, name in enumerate(table.paths)}
    rows = [next((place[form] for form in _forms(name, depth) if form in place), None) for name in names]
    hits = len(rows) - rows.count(None)
    if not hits:
        raise ValueError(f"{path}: none of its {len(place)} paths, such as {next(iter(place), '')!r}, is below --data.")
    if hits < max(len(names), len(place)):
        notes.append(f"{path.name} has {len(place)} rows; {hits} of {len(names)} images have one.")
    return {name: labels_of(None if row is None else words[row] for row in rows) for name, words in columns.items()}


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a file with commas or tabs.

    Raises:
        ValueError: no such file, or a row of another length.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        lines = list(csv.reader(text.splitlines(), delimiter="\t" if "\t" in text.partition("\n")[0] else ","))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV in UTF-8; correct it: {error}") from error
    header, *rows = lines or [[]]
    for number, row in enumerate(rows, start=2):
        if row and len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} values, the first line has {len(header)}; correct it.")
    return [name.strip() for name in header], [row for row in rows if row]


def _read_subset(path: Path, names: Sequence[str], parts: _Parts, notes: list[str]) -> list[np.ndarray]:
    """The images that a list names, by path below the folder or within the part; a part without any stays whole."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a list of paths in UTF-8; correct it: {error}") from error
    wanted = {normalised(line.strip()).removeprefix("./") for line in lines} - {""}
    kept = [
        part[[not wanted.isdisjoint(_forms(names[int(row)], parts.depth)) for row in part]] if len(part) else part
        for part in parts.rows
    ]
    found = sum(map(len, kept))
    if not found:
        raise ValueError(f"{path}: none of its {len(wanted)} paths is below --data; give paths relative to it.")
    notes.append(f"{path.name} names {len(wanted)} images; {found} are there, of {len(names)}.")
    return [few if len(few) else whole for few, whole in zip(kept, parts.rows, strict=True)]


def _forms(name: str, depth: int) -> tuple[str, str]:
    """By what a table may call an image: its name, or that within its part."""
    name = normalised(name)
    return name, name.split("/", depth)[-1]
